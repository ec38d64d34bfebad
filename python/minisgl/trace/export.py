"""Where the story of a request goes when its answer is out: the log, and an OpenTelemetry collector."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.trace.journal import Entry
from minisgl.trace.perfetto import SPANS
from minisgl.trace.recorder import Json

logger = logging.getLogger(__name__)

MAX_WAITING = 1024  # requests; the oldest are dropped
BATCH_SECONDS = 0.2  # in which requests end that are asked for at once
Export = Callable[[Entry, Json], None]
Tell = Callable[[Sequence[Entry]], Awaitable[list[Json]]]


def exports(config: ServerConfig) -> list[Export]:
    """What the operator asked for."""
    found: list[Export] = [_log] if config.log_requests else []
    return [*found, _otlp(config.otlp_endpoint, config.served_model_name)] if config.otlp_endpoint else found


def _log(entry: Entry, told: Json) -> None:  # noqa: ARG001
    """A line for each stage of each output."""
    for output in told["outputs"]:
        for stage in output["stages"]:
            fields = {"id": told["id"], "output": output["index"], **stage}
            text = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
            logger.info("request %s", text, extra={"fields": {"request": fields}})


def _otlp(endpoint: str, model: str) -> Export:
    """Spans of each request, children of the caller's where its `traceparent` says so."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    url = endpoint if endpoint.partition("://")[2].rstrip("/").count("/") else endpoint.rstrip("/") + "/v1/traces"
    about_us = {"service.name": "minisgl", "service.version": minisgl.__version__}
    provider = TracerProvider(resource=Resource.create(about_us))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=5), schedule_delay_millis=1000))
    tracer = provider.get_tracer("minisgl")

    def export(entry: Entry, told: Json) -> None:
        parent = TraceContextTextMapPropagator().extract(entry.headers)
        for output in told["outputs"]:
            at = {stage["name"]: round(1e9 * stage["time"]) for stage in output["stages"] if stage["time"]}
            about = {
                "gen_ai.response.id": told["response_id"],
                "gen_ai.response.model": model,
                "gen_ai.response.finish_reasons": [output["reason"] or ""],
                "gen_ai.usage.input_tokens": output["num_prompt"],
                "gen_ai.usage.output_tokens": output["num_output"],
                "minisgl.cached_tokens": output["num_cached"],
                "minisgl.id": told["id"],
            }
            span = tracer.start_span("request", parent, SpanKind.SERVER, about, start_time=at["received"])
            for name, _, first, last in (*SPANS, ("compute", "engine", "admitted", "finished")):
                if first in at and last in at:
                    child = tracer.start_span(name, set_span_in_context(span), start_time=at[first])
                    for chunk in output["chunks"] if name == "compute" else ():
                        child.add_event("prefill", {"tokens": chunk["num_new"]}, round(1e9 * chunk["time"]))
                    child.end(max(at[first], at[last]))
            span.end(at["sent"])

    return export


class Exporter:
    """Tells of requests in the background. tell: makes the stories of some."""

    def __init__(self, tell: Tell, exports: Sequence[Export]) -> None:
        self._tell, self._exports = tell, exports
        self._waiting: deque[Entry] = deque(maxlen=MAX_WAITING)
        self._task: asyncio.Task[None] | None = None

    def put(self, entry: Entry) -> None:
        """A request whose answer is out."""
        if self._exports:
            self._waiting.append(entry)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run(), name="trace-export")

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(BATCH_SECONDS)
            entries = [self._waiting.popleft() for _ in range(len(self._waiting))]
            for entry, told in zip(entries, await self._tell(entries), strict=True):
                for export in self._exports:
                    export(entry, told)
