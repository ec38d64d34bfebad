"""Timings and counts of requests, and /metrics: in Prometheus' formats, under vLLM's names for the same things."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from minisgl.core import FinishReason
from minisgl.message.messages import Histogram, StatsReply, UserReply

_TABLES = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())
_BOUNDS = _TABLES["bounds"]


@dataclass(slots=True)
class Timing:
    """One output's times so far."""

    begin: float = field(default_factory=time.perf_counter)
    last: float = 0.0  # when tokens have come
    has_prompt: bool = False  # its prompt is counted
    num_output: int = 0


class RequestMetrics:
    """Counts since the server started. Each output is one request here: `n` of them where a client asks for `n`."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_BOUNDS["first_token"])
        self.inter_token_latency = Histogram(_BOUNDS["token"])
        self.end_to_end = Histogram(_BOUNDS["request"])
        self.prompt_len = Histogram(_BOUNDS["length"])
        self.output_len = Histogram(_BOUNDS["length"])
        self.num_finished = dict.fromkeys(FinishReason, 0)
        self.num_prompt = self.num_output = self.num_cached = 0  # tokens

    def take(self, timing: Timing, reply: UserReply) -> None:
        """More output of a request has come. Tokens that come together share the time since those before them."""
        now = time.perf_counter()
        if not timing.has_prompt and reply.num_prompt_tokens:
            timing.has_prompt = True
            self.num_prompt += reply.num_prompt_tokens
            self.num_cached += reply.num_cached_tokens
            self.prompt_len.add(reply.num_prompt_tokens)
        new = reply.num_output_tokens - timing.num_output
        if new > 0:
            if timing.num_output == 0:
                self.time_to_first_token.add(now - timing.begin)
            else:
                self.inter_token_latency.add((now - timing.last) / new, new)
            self.num_output += new
            timing.num_output, timing.last = reply.num_output_tokens, now
        if reply.finish_reason is not None:
            self.finish(timing, reply.finish_reason)

    def finish(self, timing: Timing, reason: FinishReason) -> None:
        """A request has ended, however."""
        self.num_finished[reason] += 1
        self.end_to_end.add(time.perf_counter() - timing.begin)
        self.output_len.add(timing.num_output)


_METHODS = ("GET", "POST", "OPTIONS", "HEAD", "PUT", "PATCH", "DELETE")
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8"  # else `:` becomes `_` in names
_KINDS = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily, "histogram": HistogramMetricFamily}


class Exposition(Collector):
    """Shows the metrics of requests, of the scheduler, of HTTP and of this process."""

    def __init__(self, model_name: str, requests: RequestMetrics, restarts: Mapping[str, int]) -> None:
        self._model_name = model_name
        self._requests = requests
        self._restarts = restarts  # of workers
        self._http: Counter[tuple[str, str, str]] = Counter()  # by method, route and status
        self._stats: StatsReply | None = None  # the scheduler's, which are shown

    def count_http(self, method: str, route: str, status: int) -> None:
        self._http[method if method in _METHODS else "other", route, str(status)] += 1

    def render(self, stats: StatsReply | None, accept: str) -> tuple[bytes, str]:
        """The text and its content type, in the format that the header `accept` asks for."""
        self._stats = stats
        # The header is not passed on: the library takes versions from it that it does not know, or fails.
        is_open = _OPENMETRICS.partition(";")[0] in [media.partition(";")[0].strip() for media in accept.split(",")]
        encode, content_type = choose_encoder(_OPENMETRICS if is_open else "")
        return encode(self), content_type

    def collect(self) -> Iterator[Metric]:
        yield from ProcessCollector(registry=None).collect()
        values: dict[str, Any] = {**vars(self._requests), "http": self._http}
        values["ended"] = {(self._model_name, reason.value): n for reason, n in self._requests.num_finished.items()}
        values["restarts"] = {(worker,): count for worker, count in self._restarts.items()}
        if (stats := self._stats) is not None:
            usage = stats.num_used_pages / max(1, stats.num_pages)
            values |= {**msgspec.structs.asdict(stats), "usage": usage}
            for key in ("num_drafted", "num_right"):
                values[key] = {(self._model_name, drafter): count for drafter, count in values[key].items()}
        for name, (kind, text, key, *labels) in _TABLES["families"].items():
            if key not in values:
                continue
            family = _KINDS[kind](name, text, labels=labels or ("model_name",))
            for label_values, value in values[key].items() if labels else [((self._model_name,), values[key])]:
                shown: tuple[Any, ...] = (value,)
                if kind == "histogram":
                    limits = [*map(str, map(float, value.bounds)), "+Inf"]
                    shown = list(zip(limits, accumulate(value.counts), strict=True)), value.total
                family.add_metric(label_values, *shown)
            yield family
