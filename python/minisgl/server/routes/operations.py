"""Routes for whoever runs the server, for clients that count tokens, and of what /v1/responses has kept: no text is
generated here."""

import time
from collections.abc import Callable
from functools import partial

from fastapi import FastAPI, Request, Response

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.env import env_number
from minisgl.errors import RequestError, WorkerDied, too_long
from minisgl.message import messages as wire
from minisgl.server.access import require_operator
from minisgl.server.bodies.fields import load
from minisgl.server.bodies.intake import Bodies, check_model
from minisgl.server.bodies.native import AbortBody, DetokenizeBody, parse_tokenize
from minisgl.server.bodies.responses import ResponseStore
from minisgl.server.errors import json_response, refuse_unless, shown
from minisgl.server.frontend import Frontend
from minisgl.server.metrics import Exposition

SCRAPE_SECONDS = 2.0  # how long /metrics waits for the scheduler
# Settings of the scheduler that are shown.
_OF_SCHEDULER = "max_running_requests max_prefill_length max_seq_len page_size cache_type schedule_policy overlap"


class Operations:
    """What the operator asks and does, and what clients ask about the model. silent: names workers that are."""

    def __init__(
        self,
        frontend: Frontend,
        config: ServerConfig,
        bodies: Bodies,
        exposition: Exposition,
        silent: Callable[[], str],
    ) -> None:
        self._frontend, self._config, self._bodies = frontend, config, bodies
        self._exposition, self._silent = exposition, silent
        self._max_len = config.scheduler.max_seq_len
        self._seconds = env_number("MINISGL_HEALTH_TIMEOUT", 10, low=0.1, high=3600)  # for the scheduler to answer
        self._card = {"id": config.served_model_name, "object": "model", "created": int(time.time())}
        self._card |= {"owned_by": "minisgl", "root": config.engine.model_path, "max_model_len": self._max_len}

    def add_to(self, app: FastAPI) -> None:
        version, ok = {"version": minisgl.__version__}, {"status": "ok"}
        for name, path, about, answer in (  # of these, the answer is known
            ("models", "/v1/models", "The model that is served.", {"object": "list", "data": [self._card]}),
            ("live", "/health/live", "That the server answers. Where it cannot serve, it mends itself or ends.", ok),
            ("root", "/v1", "That this is a server of this API.", {**ok, "server": "minisgl", **version}),
            ("version", "/version", "The version of minisgl.", version),
        ):
            app.get(path, name=name, description=about)(partial(_answer, answer))
        app.get("/v1/models/{model:path}")(self.model)
        for get in (self.health, self.server_info, self.metrics):
            app.get(f"/{get.__name__}")(get)
        for post in (self.tokenize, self.detokenize, self.flush_cache, self.abort_request):
            app.post(f"/{post.__name__}")(post)

    async def model(self, model: str) -> Response:
        """The model, if it is the one that is served."""
        check_model(model, self._config)
        return json_response(self._card)

    async def health(self) -> Response:
        """Whether a message makes the round trip through all processes: 200, or 503."""
        if names := self._silent():
            raise WorkerDied(f"{names}: silent")
        await self._frontend.ping(self._seconds)
        return json_response({"status": "ok"})

    async def server_info(self) -> Response:
        """What was decided at start, and what is going on."""
        stats = await self._frontend.ask(wire.StatsMsg, wire.StatsReply, self._seconds)
        load = {"num_running_requests": stats.num_running, "num_waiting_requests": stats.num_waiting}
        load |= {"num_requests_in_flight": self._frontend.num_in_flight, "num_pages_in_use": stats.num_used_pages}
        config, engine, scheduler = self._config, self._config.engine, self._config.scheduler
        settings = {
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
        return json_response({**settings, "num_pages": stats.num_pages, "load": load})

    async def metrics(self, request: Request) -> Response:
        """Counts and timings, in Prometheus' text format."""
        try:
            stats = await self._frontend.ask(wire.StatsMsg, wire.StatsReply, SCRAPE_SECONDS)
        except WorkerDied:
            stats = None  # what is known here may tell why
        data, media_type = self._exposition.render(stats, request.headers.get("accept", ""))
        return Response(data, headers={"content-type": media_type})

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text or a chat, as a request would have them."""
        body, prompt = await self._bodies.read(request, partial(parse_tokenize, self._max_len))
        check_model(body.model, self._config)
        special = isinstance(prompt, wire.TextPrompt) and body.add_special_tokens is not False
        reply = await self._frontend.ask(wire.EncodeMsg, wire.EncodedReply, prompt=prompt, special=special)
        tokens = wire.unpack_ids(reply.token_ids)
        return json_response({"count": len(tokens), "max_model_len": self._max_len, "tokens": tokens})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await self._bodies.read(request, partial(load, DetokenizeBody))
        check_model(body.model, self._config)
        if len(body.tokens) > self._max_len:
            raise too_long("tokens", str(len(body.tokens)), self._max_len)
        ids, skips = wire.pack_ids(body.tokens), body.skip_special_tokens is not False
        reply = await self._frontend.ask(wire.DecodeMsg, wire.DecodedReply, token_ids=ids, skip_special=skips)
        return json_response({"prompt": reply.text, "text": reply.text})  # vLLM's name for it, and SGLang's

    async def flush_cache(self) -> Response:
        """Forget all cached prefixes that no running request uses."""
        reply = await self._frontend.ask(wire.FlushMsg, wire.FlushReply, self._seconds)
        return json_response({"status": "ok", "num_pages": reply.num_pages})

    async def abort_request(self, request: Request) -> Response:
        """End requests: their answers end with `abort`. Ids that are not there, or another key's, are no error."""
        body = await self._bodies.read(request, partial(load, AbortBody))
        refuse_unless((body.rid is None) == bool(body.abort_all), "give either rid or abort_all: true", "rid")
        require_operator(request.scope["state"], "abort_all", body.abort_all)
        rids = None if body.rid is None else {body.rid} if isinstance(body.rid, str) else {*body.rid}
        streams = self._frontend.find(rids, None if request.state.operator else request.state.owner)
        return json_response({"num_aborted": self._frontend.abort(streams)})


async def _answer(payload: object) -> Response:
    return json_response(payload)


MAX_PAGE = 100  # items


def add_stored(app: FastAPI, store: ResponseStore) -> None:
    """Of the responses in the store: whoever asks finds their own."""
    path = "/v1/responses/{response_id}"

    @app.get(path)
    async def retrieve(request: Request, response_id: str) -> Response:
        """A response that was stored."""
        is_whole = request.query_params.get("stream", "false").lower() != "true"
        refuse_unless(is_whole, "stream: what is stored is not streamed again", "stream")
        return json_response(store.get(request.state.owner, response_id)[0])

    @app.delete(path)
    async def delete(request: Request, response_id: str) -> Response:
        """Forget a response."""
        store.delete(request.state.owner, response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @app.get(f"{path}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        """The items that it answers, the last one first."""
        query, items = request.query_params, store.get(request.state.owner, response_id)[1]
        order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
        refuse_unless(order in ("asc", "desc"), f"order must be asc or desc, not {shown(order)!r}", "order")
        is_known = limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE
        refuse_unless(is_known, f"limit must be a whole number from 1 to {MAX_PAGE}, not {shown(limit)!r}", "limit")
        items = items if order == "asc" else items[::-1]
        ids = [item["id"] for item in items]
        first = ids.index(after) + 1 if after in ids else 0
        page = items[first : first + int(limit)]
        ends = [item["id"] for item in page] or [None]
        told = {"first_id": ends[0], "last_id": ends[-1], "has_more": first + len(page) < len(items)}
        return json_response({"object": "list", "data": page, **told})

    @app.post(f"{path}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        """Refused: none is made in the background. `/abort_request` ends one that is under way."""
        store.get(request.state.owner, response_id)
        raise RequestError("only a response that is made in the background can be cancelled", param="response_id")
