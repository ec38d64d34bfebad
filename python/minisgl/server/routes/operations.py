"""Routes for whoever runs the server, and for clients that count tokens: no text is generated here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.errors import RequestError, WorkerDied, too_long
from minisgl.message.tokenizer import ChatPrompt, IdsPrompt, TextPrompt
from minisgl.server.access import require_operator
from minisgl.server.bodies import Bodies, check_model, json_response, owner_of
from minisgl.server.fields import load
from minisgl.server.frontend import Frontend
from minisgl.server.messages import Message
from minisgl.server.metrics import Exposition
from minisgl.server.protocol import chat_request, check_size
from minisgl.server.protocol_responses import ResponseStore
from minisgl.server.protocol_sampling import check_ids
from minisgl.server.protocol_tools import Tool
from minisgl.server.strict import Body, Ids, Items, Reading, optional, shown

SCRAPE_SECONDS = 2.0  # how long /metrics waits for the scheduler
MAX_PAGE = 100  # items
_CHAT_FIELDS = {"messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}


class TokenizeBody(Body):
    """POST /tokenize: `prompt`, or `messages` and what goes with them as in /v1/chat/completions."""

    model: str | None = optional("The id that /v1/models shows.")
    prompt: str | None = optional("A text.")
    add_special_tokens: bool | None = optional("Those that the tokenizer puts around a `prompt`; true unless given.")
    messages: Items[Message] | None = optional("A chat.", minItems=1)
    tools: Items[Tool] | None = optional("Functions that the model may call.")
    chat_template_kwargs: dict[str, Any] | None = optional("For the chat template.")
    add_generation_prompt: bool | None = optional("As in a chat.")
    continue_final_message: bool | None = optional("As in a chat.")


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = optional("The id that /v1/models shows.")
    tokens: Ids
    skip_special_tokens: bool | None = optional("false: special tokens are text.")


class AbortBody(Body):
    """POST /abort_request: ids (`x-request-id`, or the `id` of an answer), or `abort_all`."""

    rid: str | Items[str] | None = optional("Of the requests to end.")
    abort_all: bool | None = optional("All of them.")


def add_text_routes(app: FastAPI, frontend: Frontend, config: ServerConfig, bodies: Bodies) -> None:
    """/tokenize and /detokenize."""
    max_len = config.scheduler.max_seq_len

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or a chat, as a request would have them."""
        body, prompt = await bodies.read(request, partial(_tokenize_request, max_len))
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
        check_ids("tokens", body.tokens)
        skip = body.skip_special_tokens is not False
        text = await frontend.decode(body.tokens, skip_special=skip)
        return json_response({"prompt": text, "text": text})  # vLLM's name for it, and SGLang's


def _tokenize_request(max_len: int, data: bytes, reading: Reading) -> tuple[TokenizeBody, ChatPrompt | TextPrompt]:
    body = load(TokenizeBody, data, reading)
    given = body.model_dump(include=_CHAT_FIELDS, exclude_none=True)
    if body.prompt is not None and given:
        raise RequestError(f"give either prompt or {next(iter(given))}", param="prompt")
    if body.prompt is None and body.messages is None:
        raise RequestError("give prompt or messages", param="prompt")
    if body.prompt is None and body.add_special_tokens:
        raise RequestError("add_special_tokens is for prompt: a chat template has its own", param="add_special_tokens")
    prompt = chat_request(given, {}).prompts[0] if body.prompt is None else TextPrompt(text=body.prompt)
    assert not isinstance(prompt, IdsPrompt)
    check_size([prompt], max_len)
    return body, prompt


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
