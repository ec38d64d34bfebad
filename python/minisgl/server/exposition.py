"""/metrics: our counts in Prometheus' formats, under the names that vLLM has for the same things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily as Counted
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from minisgl.message.frontend import Counts, StatsReply
from minisgl.server.metrics import RequestMetrics
from minisgl.utils.math import Histogram

_METHODS = ("GET", "POST", "OPTIONS", "HEAD", "PUT", "PATCH", "DELETE")
_OPENMETRICS = "application/openmetrics-text"
_LABELS = ("model_name",)


class Exposition:
    """Shows the metrics of requests, of the scheduler, of HTTP and of this process."""

    def __init__(self, model_name: str, requests: RequestMetrics, restarts: Mapping[str, int]) -> None:
        self._model_name = model_name
        self._requests = requests
        self._restarts = restarts  # of workers
        self._http: Counter[tuple[str, str, str]] = Counter()  # by method, route and status

    def count_http(self, method: str, route: str, status: int) -> None:
        self._http[method if method in _METHODS else "other", route, str(status)] += 1

    def render(self, stats: StatsReply | None, accept: str) -> tuple[bytes, str]:
        """The text and its content type, in the format that the header `accept` asks for."""
        families = [*ProcessCollector(registry=None).collect(), *self._of_scheduler(stats), *self._of_requests()]
        # The header is not passed on: the library takes versions from it that it does not know, or fails.
        accepted = [media.partition(";")[0].strip() for media in accept.split(",")]
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in accepted else "")
        return encode(_Fixed(families)), content_type

    def _of_scheduler(self, stats: StatsReply | None) -> Iterator[Metric]:
        if stats is None:
            return
        used = 1 - stats.num_free_pages / max(1, stats.num_pages)
        yield self._family(Gauge, "num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._family(Gauge, "num_requests_waiting", "Requests waiting to be run.", stats.num_waiting)
        yield self._family(Gauge, "kv_cache_usage_perc", "KV cache in use by running requests; 1 is all of it.", used)
        yield self._family(Counted, "num_preemptions", "Times that a running request went back.", stats.num_retracted)
        yield self._histogram("iteration_num_requests", "Requests per engine step.", stats.step_requests)
        yield self._histogram("iteration_tokens_total", "Tokens per engine step.", stats.step_tokens)

    def _of_requests(self) -> Iterator[Metric]:
        requests = self._requests
        yield self._family(Counted, "prompt_tokens", "Prompt tokens, cached ones included.", requests.num_prompt)
        yield self._family(Counted, "generation_tokens", "Generated tokens.", requests.num_output)
        yield self._family(Counted, "prefix_cache_queries", "Prompt tokens looked up there.", requests.num_prompt)
        yield self._family(Counted, "prefix_cache_hits", "Prompt tokens found in the cache.", requests.num_cached)
        ended = {(self._model_name, reason.value): count for reason, count in requests.num_finished.items()}
        restarts = {(worker,): count for worker, count in self._restarts.items()}
        for name, text, labels, counts in (
            ("minisgl:request_success", "Requests that have ended.", (*_LABELS, "finished_reason"), ended),
            ("http_requests", "HTTP requests.", ("method", "handler", "status"), self._http),
            ("minisgl:worker_restarts", "Times that workers were started again.", ("worker",), restarts),
        ):
            family = Counted(name, text, labels=labels)
            for values, count in counts.items():
                family.add_metric(values, count)
            yield family
        yield self._histogram("time_to_first_token_seconds", "Until the first token.", requests.time_to_first_token)
        yield self._histogram("inter_token_latency_seconds", "Between tokens.", requests.inter_token_latency)
        yield self._histogram("e2e_request_latency_seconds", "Until the end of a request.", requests.end_to_end)
        yield self._histogram("request_prompt_tokens", "Prompt tokens of a request.", requests.prompt_len)
        yield self._histogram("request_generation_tokens", "Generated tokens of a request.", requests.output_len)

    def _family(self, kind: type[Counted | Gauge | HistogramMetricFamily], name: str, text: str, *value: Any) -> Metric:
        family = kind(f"minisgl:{name}", text, labels=_LABELS)
        family.add_metric((self._model_name,), *value)
        return family

    def _histogram(self, name: str, text: str, values: Histogram | Counts) -> Metric:
        limits = [*map(str, map(float, values.bounds)), "+Inf"]
        buckets = list(zip(limits, accumulate(values.counts), strict=True))
        return self._family(HistogramMetricFamily, name, text, buckets, values.total)


class _Fixed(Collector):
    """Hands out what was collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
