"""One measured request: streams from an OpenAI-compatible server, and notes when each piece came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from minisgl.benchmark.dataset import Sample
from minisgl.benchmark.metrics import Record


class RequestFailed(Exception):
    """The server refused the request, or broke off its answer."""


def request_body(sample: Sample, model: str, endpoint: str, temperature: float, ignore_eos: bool) -> dict[str, Any]:
    """The JSON body. A text prompt becomes a user message where the endpoint is `chat`."""
    body: dict[str, Any] = {"model": model, "max_tokens": sample.output_len, "temperature": temperature}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if ignore_eos:
        body["ignore_eos"] = True
    if endpoint == "completions":
        return body | {"prompt": sample.prompt}
    messages = sample.prompt if sample.is_chat else [{"role": "user", "content": sample.prompt}]
    return body | {"messages": messages}


async def measure(client: httpx.AsyncClient, url: str, body: dict[str, Any], epoch: float) -> Record:
    """Send one request and read its stream. Failures are records too. `epoch`: when the benchmark began."""
    begun = time.perf_counter()
    arrivals: list[float] = []
    usage: dict[str, Any] = {}
    error: str | None = None
    try:
        async for text, counts in _events(client, url, body):
            if text:
                arrivals.append(time.perf_counter() - begun)
            usage = counts or usage
    except RequestFailed as failure:
        error = str(failure)
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}".rstrip(": ")
    return Record(
        start=begun - epoch,
        e2e=time.perf_counter() - begun,
        arrivals=tuple(arrivals),
        num_prompt=usage.get("prompt_tokens") or 0,
        num_output=usage.get("completion_tokens") or len(arrivals),
        num_cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        error=error,
    )


async def _events(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The text and usage of each event. Raises: RequestFailed unless the answer comes to its end."""
    finished = False
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            raise RequestFailed(f"HTTP {response.status_code}: {_error_text(await response.aread())}")
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                break
            text, ended, usage = _parse_event(data)
            finished = finished or ended
            yield text, usage
    if not finished:
        raise RequestFailed("the stream ended before the answer did")


def _parse_event(data: str) -> tuple[str, bool, dict[str, Any]]:
    """Text, whether it is the answer's last, and usage."""
    try:
        event = json.loads(data)
    except ValueError:
        raise RequestFailed(f"an event is not JSON: {data[:80]!r}") from None
    if not isinstance(event, dict) or event.get("error"):
        raise RequestFailed(_error_text(data.encode()))
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or {}
    text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
    return text, bool(choice.get("finish_reason")), event.get("usage") or {}


def _error_text(content: bytes) -> str:
    """The message of an OpenAI-shaped error, or the start of whatever came."""
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return content[:200].decode(errors="replace").strip()
