"""/metrics: our counts in Prometheus' formats, under the names that vLLM has for the same things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from minisgl.message.frontend import Counts, StatsReply
from minisgl.server.metrics import RequestMetrics
from minisgl.utils.histogram import Histogram

_METHODS = ("GET", "POST", "OPTIONS", "HEAD", "PUT", "PATCH", "DELETE")
_OPENMETRICS = "application/openmetrics-text"
_LABELS = ("model_name",)


class Exposition:
    """Shows the metrics of requests, of the scheduler, of HTTP and of this process."""

    def __init__(self, model_name: str, requests: RequestMetrics) -> None:
        self._model_name = model_name
        self._requests = requests
        self._http: Counter[tuple[str, str, str]] = Counter()  # by method, route and status

    def count_http(self, method: str, route: str, status: int) -> None:
        self._http[method if method in _METHODS else "other", route, str(status)] += 1

    def render(self, stats: StatsReply | None, accept: str) -> tuple[bytes, str]:
        """The text and its content type, in the format that the header `accept` asks for."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Fixed([*self._scheduler(stats), *self._counts(), *self._timings()]))
        # The header is not passed on: the library takes versions from it that it does not know, or fails.
        accepted = [media.partition(";")[0].strip() for media in accept.split(",")]
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in accepted else "")
        return encode(registry), content_type

    def _scheduler(self, stats: StatsReply | None) -> Iterator[Metric]:
        if stats is None:
            return
        used = 1 - stats.num_free_pages / max(1, stats.num_pages)
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests waiting to be run.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "KV cache in use by running requests; 1 is all of it.", used)
        yield self._counter("num_preemptions", "Times that a running request went back.", stats.num_retracted)
        yield self._histogram("iteration_num_requests", "Requests per engine step.", stats.step_requests)
        yield self._histogram("iteration_tokens_total", "Tokens per engine step.", stats.step_tokens)

    def _counts(self) -> Iterator[Metric]:
        requests = self._requests
        yield self._counter("prompt_tokens", "Prompt tokens, cached ones included.", requests.num_prompt)
        yield self._counter("generation_tokens", "Generated tokens.", requests.num_output)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.", requests.num_prompt)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the cache.", requests.num_cached)
        ended = CounterMetricFamily(
            "minisgl:request_success", "Requests that have ended.", labels=(*_LABELS, "finished_reason")
        )
        for reason, count in requests.num_finished.items():
            ended.add_metric((self._model_name, reason.value), count)
        yield ended
        http = CounterMetricFamily("http_requests", "HTTP requests.", labels=("method", "handler", "status"))
        for labels, count in self._http.items():
            http.add_metric(labels, count)
        yield http

    def _timings(self) -> Iterator[Metric]:
        requests, shown = self._requests, self._histogram
        yield shown("time_to_first_token_seconds", "Until the first token.", requests.time_to_first_token)
        yield shown("inter_token_latency_seconds", "Between tokens.", requests.inter_token_latency)
        yield shown("e2e_request_latency_seconds", "Until the end of a request.", requests.end_to_end)
        yield shown("request_prompt_tokens", "Prompt tokens of a request.", requests.prompt_len)
        yield shown("request_generation_tokens", "Generated tokens of a request.", requests.output_len)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"minisgl:{name}", text, labels=_LABELS)
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"minisgl:{name}", text, labels=_LABELS)
        family.add_metric((self._model_name,), value)
        return family

    def _histogram(self, name: str, text: str, values: Histogram | Counts) -> Metric:
        family = HistogramMetricFamily(f"minisgl:{name}", text, labels=_LABELS)
        limits = [*(str(float(bound)) for bound in values.bounds), "+Inf"]
        family.add_metric((self._model_name,), list(zip(limits, accumulate(values.counts), strict=True)), values.total)
        return family


class _Fixed(Collector):
    """Hands out what was collected already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families
