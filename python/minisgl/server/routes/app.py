"""The HTTP routes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from fastapi import FastAPI, Request, Response

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.env import env_number
from minisgl.errors import WorkerDied
from minisgl.message.tokenizer import ChatPrompt
from minisgl.server.access import owner_of
from minisgl.server.admission import Admission
from minisgl.server.answers.assemble import new_assembler, with_grammar
from minisgl.server.answers.delivery import answer_request
from minisgl.server.answers.messages import MessagesRenderer
from minisgl.server.answers.native import GenerateRenderer
from minisgl.server.answers.openai import ChatRenderer, CompletionRenderer
from minisgl.server.answers.renderer import Renderer
from minisgl.server.answers.responses import ResponsesRenderer
from minisgl.server.bodies.chat import (
    GenerationRequest,
    check_model,
    check_policy,
    check_size,
    parse_chat,
    parse_completion,
)
from minisgl.server.bodies.fields import Reading
from minisgl.server.bodies.intake import MAX_BODY_BYTES, Bodies
from minisgl.server.bodies.messages import parse_messages
from minisgl.server.bodies.native import parse_generate
from minisgl.server.bodies.responses import ResponseStore, parse_responses
from minisgl.server.bodies.sampling import Defaults
from minisgl.server.errors import add_error_handlers, json_response
from minisgl.server.frontend import Frontend
from minisgl.server.metrics import Exposition
from minisgl.server.routes import operations

DOCUMENT = Path(__file__).parents[1] / "openapi.json"  # made by `python -m tools.openapi`

R = TypeVar("R", bound=GenerationRequest)
Parser = Callable[[bytes, Defaults, Reading], R]
Make = Callable[[R], Renderer]


def create_app(
    frontend: Frontend, config: ServerConfig, exposition: Exposition, silent: Callable[[], str] = str
) -> FastAPI:
    """The application. It has no state of its own: requests live in `frontend`, counts in `exposition`. silent: the
    workers that are."""
    app = FastAPI(title="minisgl", version=minisgl.__version__, docs_url=None, redoc_url=None)
    store = ResponseStore()
    name = config.served_model_name
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "minisgl"}
    card |= {"root": config.engine.model_path, "max_model_len": config.scheduler.max_seq_len}
    health_seconds = env_number("MINISGL_HEALTH_TIMEOUT", 10, low=0.1, high=3600)
    keepalive = env_number("MINISGL_SSE_KEEPALIVE", 10, low=0, high=86400)
    max_body = int(env_number("MINISGL_MAX_BODY_BYTES", MAX_BODY_BYTES, low=1024, high=2**40))
    bodies = Bodies(config, max_body)
    add_error_handlers(app)
    app.add_middleware(Admission, config=config)
    app.openapi = cache(lambda: json.loads(DOCUMENT.read_bytes()))  # type: ignore[method-assign]

    async def read(request: Request, parse: Parser[R], defaults: Defaults = config.default_sampling) -> R:
        def parsed(data: bytes, reading: Reading) -> R:
            made = with_grammar(parse(data, defaults, reading), config)
            check_size(made.prompts, config.scheduler.max_seq_len, made.names)
            return made

        made = await bodies.read(request, parsed)
        check_model(made.model, config)
        return made

    async def generate(request: Request, parse: Parser[R], make: Make[R]) -> Response:
        parsed = await read(request, parse)
        check_policy(parsed.params, config.scheduler.schedule_policy)
        parsed = replace(parsed, timeout=parsed.timeout or config.request_timeout)
        return await answer_request(frontend, request, parsed, make(parsed), keepalive)

    def add(path: str, about: str, parse: Parser[R], make: Make[R]) -> None:
        async def route(request: Request) -> Response:
            return await generate(request, parse, make)

        app.post(path, description=about)(route)

    def chat(r: GenerationRequest) -> Renderer:
        options = {"include_usage": r.include_usage, "logprobs": r.logprobs}
        return ChatRenderer(name, **options, new_assembler=lambda: new_assembler(r, config))

    def completion(r: GenerationRequest) -> Renderer:
        return CompletionRenderer(name, include_usage=r.include_usage, logprobs=r.logprobs)

    add("/v1/chat/completions", "Answer a chat.", parse_chat, chat)
    add("/v1/completions", "Continue a text, or several.", parse_completion, completion)

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        """Answer a conversation, in the words of OpenAI's newer API."""
        owner = owner_of(request)
        parse, keep = partial(parse_responses, store=store, owner=owner), partial(store.put, owner)
        return await generate(request, parse, lambda r: ResponsesRenderer(name, r, new_assembler(r, config), keep))

    about = "Answer a conversation, in Anthropic's words."
    add("/v1/messages", about, parse_messages, lambda r: MessagesRenderer(name, new_assembler(r, config)))
    about = "Continue a text or token ids; the answer has token ids too."
    add("/generate", about, parse_generate, lambda _: GenerateRenderer())

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        """So many tokens a conversation has."""
        prompt = (await read(request, parse_messages, {})).prompts[0]
        assert isinstance(prompt, ChatPrompt)
        return json_response({"input_tokens": len(await frontend.encode(prompt, special=False))})

    @app.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [card]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """The model, if it is the one that is served."""
        check_model(model, config)
        return json_response(card)

    @app.get("/health")
    async def health() -> Response:
        """Whether a message makes the round trip through all processes: 200, or 503."""
        if names := silent():
            raise WorkerDied(f"{names}: silent")
        await frontend.ping(health_seconds)
        return json_response({"status": "ok"})

    @app.get("/health/live")
    async def live() -> Response:
        """That the server answers. Where it cannot serve, it mends itself or ends."""
        return json_response({"status": "ok"})

    @app.get("/v1")
    async def root() -> Response:
        """That this is a server of this API."""
        return json_response({"status": "ok", "server": "minisgl", "version": minisgl.__version__})

    operations.add_text_routes(app, frontend, config, bodies)
    operations.add_response_routes(app, store)
    operations.add_admin_routes(app, frontend, config, exposition, bodies, health_seconds)
    return app
