"""What is made of requests beside JSON: lines of the log, OpenTelemetry's spans, and charts for ui.perfetto.dev."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.trace.records import EVENTS, STAGES, Output, Step

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Export = Callable[[Mapping[str, str], Json], None]  # of a request's headers, and its story
PROCESSES = {"api": 1, "tokenizer": 2, "scheduler": 3, "engine": 4, "detokenizer": 5, "rows": 6}  # of a chart


def spans(output: Output) -> Iterator[tuple[str, float, float]]:
    """What led to each stage but the first, by its name: from when, until when."""
    first = {event.name: event.time or 0.0 for event in output.events[::-1]}
    reached = [(name, first[name]) for name in STAGES if name in first]
    for (_, begin), (name, end) in pairwise(reached):
        yield name, begin, max(begin, end)  # a stop string ends an output for the detokenizer, and then for rank 0


def exports(config: ServerConfig) -> list[Export]:
    """What the operator asked for."""
    found: list[Export] = [_log] if config.log_requests else []
    return [*found, _otlp(config.otlp_endpoint, config.served_model_name)] if config.otlp_endpoint else found


def _log(headers: Mapping[str, str], told: Json) -> None:  # noqa: ARG001
    """A line for each event but the steps."""
    for output in told["outputs"]:
        for event in [event for event in output.events if event.name not in ("prefill", "decode", "accepted")]:
            fields = {"id": told["id"], "output": output.index, **msgspec.to_builtins(event)}
            text = " ".join(f"{name}={value}" for name, value in fields.items())
            logger.info("request %s", text, extra={"fields": {"request": fields}})


def _otlp(endpoint: str, model: str) -> Export:
    """Spans of each output, children of the caller's where its `traceparent` says so."""
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

    def export(headers: Mapping[str, str], told: Json) -> None:
        parent = TraceContextTextMapPropagator().extract(headers)
        for output in told["outputs"]:
            about = {"gen_ai.response.id": told["response_id"], "gen_ai.response.model": model}
            about |= {"gen_ai.response.finish_reasons": [output.reason or ""], "minisgl.id": told["id"]}
            about |= {"gen_ai.usage.input_tokens": output.num_prompt, "gen_ai.usage.output_tokens": output.num_output}
            about |= {"minisgl.cached_tokens": output.num_cached, "minisgl.accepted_tokens": output.num_accepted}
            times = [round(1e9 * event.time) for event in output.events]
            whole = tracer.start_span("request", parent, SpanKind.SERVER, about, start_time=times[0])
            for when, event in zip(times, output.events, strict=True):
                if event.name in ("prefill", "retracted", "refused"):
                    whole.add_event(event.name, {"tokens": event.num_new or 0}, when)
            for name, begin, end in spans(output):
                part = tracer.start_span(name, set_span_in_context(whole), start_time=round(1e9 * begin))
                part.end(round(1e9 * end))
            whole.end(times[-1])

    return export


def chart(requests: Sequence[Json], steps: Sequence[Step]) -> Json:
    """In the trace event format of Chrome, whose times are microseconds: tracks of each process, one for each row, and
    arrows along each output."""
    slices = [*_of_steps(steps)]
    for uid, (output, name) in {one.uid: (one, told["id"]) for told in requests for one in told["outputs"]}.items():
        for stage, begin, end in spans(output):  # asynchronous events: there are many at once
            about = {"ph": "b", "id": uid, "args": {"uid": uid, "id": name}}
            slices.append(_slice(stage, EVENTS[stage]["process"], 0, begin, end, **about))
    slices.sort(key=lambda item: item["ts"])
    paths: dict[int, list[Json]] = {}
    for item in [item for item in slices if "uid" in item["args"]]:
        paths.setdefault(item["args"]["uid"], []).append(item)
    for uid, path in paths.items():
        for before, after in pairwise(path):
            before |= {"bind_id": uid, "flow_out": True}
            after |= {"bind_id": uid, "flow_in": True}
    ends = [{**item, "ph": "e", "ts": item["ts"] + item["dur"]} for item in slices if item["ph"] == "b"]
    rows = {item["tid"]: f"row {item['tid']}" for item in slices if item["cat"] == "rows"}
    heads = [_head("process_name", pid, 0, name) for name, pid in PROCESSES.items()]
    heads += [_head("thread_name", PROCESSES["rows"], row, name) for row, name in sorted(rows.items())]
    return {"traceEvents": [*heads, *sorted(slices + ends, key=lambda item: item["ts"])], "displayTimeUnit": "ms"}


def _head(kind: str, pid: int, tid: int, name: str) -> Json:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _slice(name: str, where: str, tid: int, begin: float, end: float, **more: Any) -> Json:
    times = {"ts": int(1e6 * begin), "dur": max(1, int(1e6 * end) - int(1e6 * begin))}
    return {"ph": "X", "name": name, "cat": where, "pid": PROCESSES[where], "tid": tid, **times, **more}


def _of_steps(steps: Sequence[Step]) -> Iterator[Json]:
    """What the scheduler, the device and each row did in them; on the device one follows on the other."""
    end = 0.0
    for step, after in zip(steps, [*[step.time for step in steps[1:]], float("inf")], strict=True):
        about = {"step": step.step, "tokens": step.num_tokens, "pages": step.pages}
        turned = min(step.time + (step.host_ms or 0.0) / 1e3, after)
        yield _slice("turn", "scheduler", 0, step.time, turned, args=about)
        begin = max(step.time, end)
        end = begin + max((step.device_ms or 0.0) / 1e3, 2e-6)
        yield _slice("step", "engine", 0, begin, end, args=about)
        for row, uid, num_new, kind in step.rows:
            name = ("decode", f"prefill {num_new}", f"verify {num_new}")[kind]
            yield _slice(name, "rows", row, begin, end, args={"uid": uid, "step": step.step})
