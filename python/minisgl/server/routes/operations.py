"""Routes for whoever runs the server, and for clients that count tokens: no text is generated here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.errors import RequestError, WorkerDied, too_long
from minisgl.message.tokenizer import TextPrompt
from minisgl.server.access import owner_of, require_operator
from minisgl.server.bodies.chat import check_model
from minisgl.server.bodies.fields import load
from minisgl.server.bodies.intake import Bodies
from minisgl.server.bodies.native import AbortBody, DetokenizeBody, parse_tokenize
from minisgl.server.bodies.responses import ResponseStore
from minisgl.server.bodies.strict import shown
from minisgl.server.errors import json_response
from minisgl.server.frontend import Frontend
from minisgl.server.metrics import Exposition

SCRAPE_SECONDS = 2.0  # how long /metrics waits for the scheduler
MAX_PAGE = 100  # items


def add_text_routes(app: FastAPI, frontend: Frontend, config: ServerConfig, bodies: Bodies) -> None:
    """/tokenize and /detokenize."""
    max_len = config.scheduler.max_seq_len

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or a chat, as a request would have them."""
        body, prompt = await bodies.read(request, partial(parse_tokenize, max_len))
        check_model(body.model, config)
        special = isinstance(prompt, TextPrompt) and body.add_special_tokens is not False
        tokens = await frontend.encode(prompt, special=special)
        return json_response({"count": len(tokens), "max_model_len": max_len, "tokens": tokens})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = await bodies.read(request, partial(load, DetokenizeBody))
        check_model(body.model, config)
        if len(body.tokens) > max_len:
            raise too_long("tokens", str(len(body.tokens)), max_len)
        skip = body.skip_special_tokens is not False
        text = await frontend.decode(body.tokens, skip_special=skip)
        return json_response({"prompt": text, "text": text})  # vLLM's name for it, and SGLang's


def add_admin_routes(
    app: FastAPI, frontend: Frontend, config: ServerConfig, exposition: Exposition, bodies: Bodies, seconds: float
) -> None:
    """What the operator asks and does. seconds: that the scheduler has to answer."""

    @app.get("/version")
    async def version() -> Response:
        """The version of minisgl."""
        return json_response({"version": minisgl.__version__})

    @app.get("/server_info")
    async def server_info() -> Response:
        """What was decided at start, and what is going on."""
        stats = await frontend.stats(seconds)
        load = {
            "num_requests_in_flight": frontend.num_streams,
            "num_running_requests": stats.num_running,
            "num_waiting_requests": stats.num_waiting,
            "num_pages_in_use": stats.num_pages - stats.num_free_pages,
        }
        return json_response({**_settings(config), "num_pages": stats.num_pages, "load": load})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counts and timings, in Prometheus' text format."""
        try:
            stats = await frontend.stats(SCRAPE_SECONDS)
        except WorkerDied:
            stats = None  # what is known here may tell why
        data, media_type = exposition.render(stats, request.headers.get("accept", ""))
        return Response(data, headers={"content-type": media_type})

    @app.post("/flush_cache")
    async def flush_cache() -> Response:
        """Forget all cached prefixes that no running request uses."""
        return json_response({"status": "ok", "num_pages": await frontend.flush_cache(seconds)})

    @app.post("/abort_request")
    async def abort_request(request: Request) -> Response:
        """End requests: their answers end with `abort`. Ids that are not there, or another key's, are no error."""
        body = await bodies.read(request, partial(load, AbortBody))
        if (body.rid is None) == (not body.abort_all):
            raise RequestError("give either rid or abort_all: true", param="rid")
        require_operator(request.scope["state"], "abort_all", body.abort_all)
        rids = None if body.rid is None else {body.rid} if isinstance(body.rid, str) else {*body.rid}
        owner = None if request.state.operator else owner_of(request)
        return json_response({"num_aborted": frontend.cancel(rids, owner)})


def add_response_routes(app: FastAPI, store: ResponseStore) -> None:
    """What /v1/responses has kept."""

    def kept(request: Request, response_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return store.get(owner_of(request), response_id)

    @app.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        """A response that was stored."""
        if request.query_params.get("stream", "false").lower() == "true":
            raise RequestError("stream: what is stored is not streamed again", param="stream")
        return json_response(kept(request, response_id)[0])

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        """Forget a response."""
        store.delete(owner_of(request), response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        """The items that it answers, the last one first."""
        return json_response(_page(kept(request, response_id)[1], request.query_params))

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        """Refused: none is made in the background. `/abort_request` ends one that is under way."""
        kept(request, response_id)
        raise RequestError("only a response that is made in the background can be cancelled", param="response_id")


def _page(items: list[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, not {shown(order)!r}", param="order")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise RequestError(f"limit must be a whole number from 1 to {MAX_PAGE}, not {shown(limit)!r}", param="limit")
    items = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in items]
    first = ids.index(after) + 1 if after in ids else 0
    page = items[first : first + int(limit)]
    ends = [item["id"] for item in page] or [None]
    has_more = first + len(page) < len(items)
    return {"object": "list", "data": page, "first_id": ends[0], "last_id": ends[-1], "has_more": has_more}


_OF_SCHEDULER = "max_running_requests max_prefill_length max_seq_len page_size cache_type schedule_policy overlap"


def _settings(config: ServerConfig) -> dict[str, Any]:
    engine, scheduler = config.engine, config.scheduler
    return {
        "version": minisgl.__version__,
        "served_model_name": config.served_model_name,
        "architecture": engine.model.architecture,
        "tensor_parallel_size": engine.tp_size,
        **{name: getattr(engine, name) for name in ("model_path", "dtype", "device")},
        **{name: getattr(scheduler, name) for name in _OF_SCHEDULER.split()},
        "attention_backend": f"{engine.prefill_backend},{engine.decode_backend}",
        "num_tokenizer": config.num_tokenizer,
        "default_sampling": config.default_sampling,
    }
