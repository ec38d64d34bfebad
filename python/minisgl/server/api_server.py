"""The HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.env import env_number
from minisgl.errors import MiniSGLError, RequestError
from minisgl.message.frontend import UserReply
from minisgl.message.tokenizer import ChatPrompt
from minisgl.server.assemble import new_assembler, with_grammar
from minisgl.server.bodies import MAX_BODY_BYTES, check_model, json_response, read_json, reading_of
from minisgl.server.exposition import Exposition
from minisgl.server.frontend import Frontend, Stream
from minisgl.server.openapi import (
    EVENTS,
    MESSAGE_EVENTS,
    RESPONSE_EVENTS,
    ChatCompletion,
    Generated,
    MessageAnswer,
    ModelCard,
    ModelList,
    ModelResponse,
    TextCompletion,
    describe,
    documented,
    fields,
)
from minisgl.server.operations import BODIES as MORE_BODIES
from minisgl.server.operations import Limits, add_admin_routes, add_metrics_route, add_text_routes
from minisgl.server.protocol import (
    BODIES,
    ChatBody,
    CompletionBody,
    GenerateBody,
    GenerationRequest,
    choice_seeds,
    parse_chat,
    parse_completion,
    parse_generate,
)
from minisgl.server.protocol_messages import MESSAGES, MessagesBody, parse_messages
from minisgl.server.protocol_responses import RESPONSES, ResponsesBody, ResponsesRequest, parse_responses
from minisgl.server.protocol_sampling import check_policy
from minisgl.server.render import (
    ChatRenderer,
    CompletionRenderer,
    GenerateRenderer,
    Renderer,
    Totals,
    error_body,
    error_payload,
    error_status,
    event,
)
from minisgl.server.render_logprobs import mean_logprob
from minisgl.server.render_messages import MessagesRenderer, as_asked
from minisgl.server.render_responses import ResponsesRenderer
from minisgl.server.strict import Fields, Reading

logger = logging.getLogger(__name__)

DEFAULT_HEALTH_SECONDS = 10.0
DEFAULT_KEEPALIVE_SECONDS = 10.0
ACCEPT_SECONDS = 5.0  # that a stream's header waits for what may refuse the request: encoding, and compiling a grammar

# What requests may have.
ALL_BODIES: dict[type[BaseModel], Fields] = {**BODIES, ResponsesBody: RESPONSES, MessagesBody: MESSAGES, **MORE_BODIES}

T = TypeVar("T")
R = TypeVar("R", bound=GenerationRequest)
Parser = Callable[[bytes, Mapping[str, float | int], Reading], R]
Make = Callable[[R], Renderer]


def create_app(frontend: Frontend, config: ServerConfig, exposition: Exposition) -> FastAPI:
    """The application. It has no state of its own: requests live in `frontend`, counts in `exposition`."""
    app = FastAPI(title="minisgl", version=minisgl.__version__, docs_url=None, redoc_url=None)
    name, created = config.served_model_name, int(time.time())
    health_seconds = env_number("MINISGL_HEALTH_TIMEOUT", DEFAULT_HEALTH_SECONDS, low=0.1, high=3600)
    keepalive = env_number("MINISGL_SSE_KEEPALIVE", DEFAULT_KEEPALIVE_SECONDS, low=0, high=86400)
    max_body = int(env_number("MINISGL_MAX_BODY_BYTES", MAX_BODY_BYTES, low=1024, high=2**40))
    limits = Limits(max_body, health_seconds)
    _add_error_handlers(app)
    describe(app, ALL_BODIES, keys=bool(config.access.api_keys))

    async def generate(request: Request, parse: Parser[R], make: Make[R]) -> Response:
        data = await read_json(request, max_body)
        parsed = with_grammar(parse(data, config.default_sampling, reading_of(request, config)), config)
        check_model(parsed.model, config)
        check_policy(parsed.params, config.scheduler.schedule_policy)
        return await _answer(frontend, request, parsed, make(parsed), keepalive)

    def add(
        path: str, about: str, answer: Any, parse: Parser[R], body: Any, make: Make[R], events: str = EVENTS
    ) -> None:
        async def route(request: Request) -> Response:
            return await generate(request, parse, make)

        app.post(path, description=about, **documented(answer, body, errors=(404, 503), events=events))(route)

    def chat(r: GenerationRequest) -> Renderer:
        options = {"include_usage": r.include_usage, "logprobs": r.logprobs}
        return ChatRenderer(name, **options, new_assembler=lambda: new_assembler(r, config))

    def completion(r: GenerationRequest) -> Renderer:
        return CompletionRenderer(name, include_usage=r.include_usage, logprobs=r.logprobs)

    def response(r: ResponsesRequest) -> Renderer:
        return ResponsesRenderer(name, r, new_assembler(r, config))

    def message(r: GenerationRequest) -> Renderer:
        return MessagesRenderer(name, new_assembler(r, config))

    add("/v1/chat/completions", "Answer a chat.", ChatCompletion, parse_chat, ChatBody, chat)
    about = "Continue a text, or several."
    add("/v1/completions", about, TextCompletion, parse_completion, CompletionBody, completion)
    about = "Answer a conversation, in the words of OpenAI's newer API."
    add("/v1/responses", about, ModelResponse, parse_responses, ResponsesBody, response, RESPONSE_EVENTS)
    about = "Answer a conversation, in Anthropic's words."
    add("/v1/messages", about, MessageAnswer, parse_messages, MessagesBody, message, MESSAGE_EVENTS)
    about = "Continue a text or token ids; the answer has token ids too."
    add("/generate", about, Generated, parse_generate, GenerateBody, lambda _: GenerateRenderer())

    @app.post(
        "/v1/messages/count_tokens", **documented(fields(input_tokens="integer"), MessagesBody, errors=(404, 503))
    )
    async def count_tokens(request: Request) -> Response:
        """So many tokens a conversation has."""
        data = await read_json(request, max_body)
        parsed = with_grammar(parse_messages(data, {}, reading_of(request, config)), config)
        check_model(parsed.model, config)
        prompt = parsed.prompts[0]
        assert isinstance(prompt, ChatPrompt)
        return json_response({"input_tokens": len(await frontend.encode(prompt, special=False))})

    @app.get("/v1/models", **documented(ModelList))
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [_model_card(config, created)]})

    @app.get("/v1/models/{model:path}", **documented(ModelCard, errors=(404,)))
    async def model(model: str) -> Response:
        """The model, if it is the one that is served."""
        check_model(model, config)
        return json_response(_model_card(config, created))

    @app.get("/health", **documented(fields(status="string"), errors=(503,)))
    async def health() -> Response:
        """Whether a message makes the round trip through all processes: 200, or 503."""
        await frontend.ping(health_seconds)
        return json_response({"status": "ok"})

    @app.get("/v1", **documented(fields(status="string", server="string", version="string")))
    async def root() -> Response:
        """That this is a server of this API."""
        return json_response({"status": "ok", "server": "minisgl", "version": minisgl.__version__})

    add_text_routes(app, frontend, config, limits)
    add_admin_routes(app, frontend, config, limits)
    add_metrics_route(app, frontend, exposition)
    return app


async def _answer(
    frontend: Frontend, request: Request, parsed: GenerationRequest, renderer: Renderer, keepalive: float
) -> Response:
    """Run the request and show its replies. A client that goes away takes its request with it."""
    streams = _submit(frontend, parsed, (request.state.request_id, renderer.id))
    totals = request.state.totals = Totals(len(streams), parsed.num_choices)
    try:
        if not parsed.stream:
            choices = await unless_disconnected(request.receive, _collect(streams, totals))
            return json_response(renderer.body(_best(choices, parsed), totals))
        # What is refused gets an HTTP status; once the request is on its way, an error is an event.
        await unless_disconnected(request.receive, _accepted(streams))
        return EventStream(_events(streams, renderer, totals), streams, renderer.keep_alive, keepalive)
    except ClientDisconnect:
        _abort(streams)
        logger.debug("a client went away; its request is aborted")
        return Response(status_code=499)
    except RequestError as error:
        _abort(streams)
        raise renderer.refusal(error) from None
    except BaseException:
        _abort(streams)
        raise


def _submit(frontend: Frontend, parsed: GenerationRequest, request_ids: Sequence[str]) -> list[Stream]:
    """One stream per choice, for each prompt in order."""
    streams: list[Stream] = []
    try:
        for prompt in parsed.prompts:
            for seed in choice_seeds(parsed.params, parsed.num_choices):
                streams.append(
                    frontend.submit(prompt, replace(parsed.params, seed=seed), request_ids, notify=parsed.stream)
                )
    except BaseException:
        _abort(streams)
        raise
    return streams


def _best(choices: Sequence[Sequence[UserReply]], parsed: GenerationRequest) -> Sequence[Sequence[UserReply]]:
    """Of each prompt's choices the `n` most probable ones per token, best first; all where there are no more."""
    if parsed.num_choices == parsed.n:
        return choices
    groups = (choices[first : first + parsed.num_choices] for first in range(0, len(choices), parsed.num_choices))
    return [choice for group in groups for choice in sorted(group, key=mean_logprob, reverse=True)[: parsed.n]]


def _abort(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.abort()


async def _accepted(streams: Sequence[Stream]) -> None:
    """Wait until none of them is refused any more, or one has taken `ACCEPT_SECONDS`.

    Raises: RequestError, WorkerDied.
    """
    with contextlib.suppress(asyncio.TimeoutError):
        for stream in streams:
            await asyncio.wait_for(stream.accepted(), ACCEPT_SECONDS)


async def _collect(streams: Sequence[Stream], totals: Totals) -> list[list[UserReply]]:
    """All replies of each choice. The first error ends it."""
    choices: list[list[UserReply]] = [[] for _ in streams]
    async with contextlib.aclosing(_interleave(streams)) as replies:
        async for index, reply in replies:
            choices[index].append(reply)
            totals.add(index, reply)
    return choices


async def _interleave(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, UserReply], None]:
    """The replies of all streams as they come, each with its stream's index."""
    if len(streams) == 1:
        async for reply in streams[0]:
            yield 0, reply
        return
    tasks = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = tasks.pop(task)
                reply = task.result()
                if reply.finish_reason is None:
                    tasks[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, reply
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(streams: Sequence[Stream], renderer: Renderer, totals: Totals) -> AsyncGenerator[bytes, None]:
    """The SSE body, an error event included if it comes to that."""
    started: set[int] = set()

    def shown(index: int, reply: UserReply) -> bytes:
        totals.add(index, reply)
        chunks = renderer.chunk(index, reply, first=index not in started)
        started.add(index)
        return b"".join(map(event, chunks))

    try:
        async with contextlib.aclosing(_interleave(streams)) as replies:
            async for index, reply in replies:
                data = shown(index, reply)
                if data:
                    yield data
        for chunk in renderer.last_chunks(totals):
            yield event(chunk)
        if renderer.done:
            yield renderer.done
    except MiniSGLError as error:
        logger.debug("a stream ends with an error: %s", error)
        for chunk in renderer.failure(error):
            yield event(chunk)


class EventStream(Response):
    """Sends events as they come, until they end or the client goes away; then aborts what is left of `streams`.

    keep_alive: what is sent after so many `seconds` of nothing else (0: never), for proxies and clients that would give
    up. Events go out whole, so it stands between two of them.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], streams: Sequence[Stream], keep_alive: bytes, seconds: float
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._streams = streams
        self._keep_alive = keep_alive
        self._seconds = seconds
        self._last_sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await unless_disconnected(receive, self._send(send))
        except ClientDisconnect:
            logger.debug("a client went away; its stream is aborted")
        finally:
            await self._events.aclose()
            _abort(self._streams)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        keeper = asyncio.ensure_future(self._keep(send))
        try:
            async for data in self._events:
                self._last_sent = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            keeper.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep(self, send: Send) -> None:
        self._last_sent = time.monotonic()
        while self._seconds:
            left = self._last_sent + self._seconds - time.monotonic()
            if left <= 0:
                self._last_sent, left = time.monotonic(), self._seconds
                await send({"type": "http.response.body", "body": self._keep_alive, "more_body": True})
            await asyncio.sleep(left)


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Wait for `work`, and cancel it when the client goes away. Raises: ClientDisconnect then."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _model_card(config: ServerConfig, created: int) -> dict[str, Any]:
    return {
        "id": config.served_model_name,
        "object": "model",
        "created": created,
        "owned_by": "minisgl",
        "root": config.engine.model_path,
        "max_model_len": config.scheduler.max_seq_len,
    }


def _add_error_handlers(app: FastAPI) -> None:
    def answer(request: Request, payload: dict[str, Any], status: int) -> Response:
        return json_response(as_asked(request.scope, payload, status), status)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, MiniSGLError)
        return answer(request, error_payload(error), error_status(error))

    async def gone(_: Request, error: Exception) -> Response:
        assert isinstance(error, ClientDisconnect)
        return Response(status_code=499)  # nobody is there to see it

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = error.detail
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path}: {error.detail.lower()}"
        response = answer(request, error_body(message, error.status_code), error.status_code)
        response.headers.update(error.headers or {})
        return response

    async def failed(request: Request, error: Exception) -> Response:
        return answer(request, error_body(f"internal error: {type(error).__name__}", 500), 500)

    app.add_exception_handler(MiniSGLError, refused)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, failed)
