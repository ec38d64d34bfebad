"""The HTTP application: routes whose answers a model writes, one for each dialect, beside those of `operations`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request, Response

import minisgl
from minisgl.config.runtime import ServerConfig
from minisgl.env import env_number
from minisgl.errors import RequestError
from minisgl.message.messages import ChatPrompt, EncodedReply, EncodeMsg, TraceMsg, TraceReply, unpack_ids
from minisgl.page.routes import add_page
from minisgl.server.admission import BYTES_PER_TOKEN, Admission
from minisgl.server.answers.delivery import answer_request
from minisgl.server.answers.messages import MessagesRenderer
from minisgl.server.answers.openai import ChatRenderer, CompletionRenderer, GenerateRenderer
from minisgl.server.answers.renderer import Assembler, Renderer, new_assembler, with_grammar
from minisgl.server.answers.responses import ResponsesRenderer
from minisgl.server.bodies.chat import GenerationRequest, check_size, parse_chat, parse_completion
from minisgl.server.bodies.fields import Reading
from minisgl.server.bodies.intake import MAX_BODY_BYTES, Bodies, check_model
from minisgl.server.bodies.messages import parse_messages
from minisgl.server.bodies.native import parse_generate
from minisgl.server.bodies.responses import ResponseStore, parse_responses
from minisgl.server.bodies.sampling import Defaults
from minisgl.server.errors import add_error_handlers, json_response
from minisgl.server.frontend import Frontend
from minisgl.server.metrics import Exposition
from minisgl.server.routes.operations import Operations, add_stored
from minisgl.server.routes.vectors import VECTOR_PATHS, vector_dialects
from minisgl.trace.routes import Trace

R = TypeVar("R", bound=GenerationRequest)
Parse = Callable[[bytes, Defaults, Reading], R]
Make = Callable[[str, R, Callable[[], Assembler]], Renderer]  # of the model's name, the request, and what reads answers
DIALECTS: dict[str, tuple[str, Parse[GenerationRequest], Make[GenerationRequest]]] = {
    "/v1/chat/completions": ("Answer a chat.", parse_chat, ChatRenderer),
    "/v1/completions": ("Continue a text, or several.", parse_completion, CompletionRenderer),
    "/v1/messages": ("Answer a conversation, in Anthropic's words.", parse_messages, MessagesRenderer),
    "/generate": ("Continue a text or token ids; the answer has token ids too.", parse_generate, GenerateRenderer),
}


class Generation:
    """Reads a request's body, has it answered, and shows the answer, each as its dialect has it."""

    def __init__(self, frontend: Frontend, config: ServerConfig, bodies: Bodies, store: ResponseStore) -> None:
        self._frontend, self._config, self._bodies, self._store = frontend, config, bodies, store
        self._keepalive = env_number("MINISGL_SSE_KEEPALIVE", 10, low=0, high=86400)

    def add_to(self, app: FastAPI) -> None:
        for path, (about, parse, make) in {**DIALECTS, **vector_dialects(self._config)}.items():
            app.post(path, name="route", description=about)(self._route(parse, make))
        app.post("/v1/responses")(self.responses)
        app.post("/v1/messages/count_tokens")(self.count_tokens)

    async def responses(self, request: Request) -> Response:
        """Answer a conversation, in the words of OpenAI's newer API."""
        owner = request.state.owner
        parse = partial(parse_responses, store=self._store, owner=owner)
        return await self._generate(request, parse, partial(ResponsesRenderer, keep=partial(self._store.put, owner)))

    async def count_tokens(self, request: Request) -> Response:
        """So many tokens a conversation has."""
        prompt = (await self._read(request, parse_messages, {})).prompts[0]
        assert isinstance(prompt, ChatPrompt)
        reply = await self._frontend.ask(EncodeMsg, EncodedReply, prompt=prompt, special=False)
        return json_response({"input_tokens": len(unpack_ids(reply.token_ids))})

    def _route(self, parse: Parse[R], make: Make[R]) -> Callable[..., object]:
        async def route(request: Request) -> Response:
            return await self._generate(request, parse, make)

        return route

    async def _generate(self, request: Request, parse: Parse[R], make: Make[R]) -> Response:
        config = self._config
        parsed = await self._read(request, parse, config.default_sampling)
        if parsed.params.priority and config.scheduler.schedule_policy != "priority":
            raise RequestError("priority needs a server started with --schedule-policy priority", param="priority")
        parsed = replace(parsed, timeout=parsed.timeout or config.request_timeout)
        renderer = make(config.served_model_name, parsed, partial(new_assembler, parsed, config))
        return await answer_request(self._frontend, request, parsed, renderer, self._keepalive)

    async def _read(self, request: Request, parse: Parse[R], defaults: Defaults) -> R:
        def parsed(data: bytes, reading: Reading) -> R:
            made = with_grammar(parse(data, defaults, reading), self._config)
            check_size(made.prompts, self._config.scheduler.max_seq_len, made.names, int(not made.params.pooling))
            return made

        made = await self._bodies.read(request, parsed)
        check_model(made.model, self._config)
        return made


def create_app(
    frontend: Frontend, config: ServerConfig, exposition: Exposition, silent: Callable[[], str] = str
) -> FastAPI:
    """The application. It has no state of its own: requests live in `frontend`, counts in `exposition`. silent: the
    workers that are."""
    app = FastAPI(title="minisgl", version=minisgl.__version__, openapi_url=None)
    add_error_handlers(app)
    outputs = config.scheduler.max_running_requests + config.max_queued_requests
    app.add_middleware(Admission, outputs, config.max_queued_tokens * BYTES_PER_TOKEN, fair=config.fairness)
    max_body = int(env_number("MINISGL_MAX_BODY_BYTES", MAX_BODY_BYTES, low=1024, high=2**40))
    bodies, store = Bodies(config, max_body), ResponseStore()
    Generation(frontend, config, bodies, store).add_to(app)
    Operations(frontend, config, bodies, exposition, silent).add_to(app)
    add_stored(app, store)
    add_page(app)
    traced = (*DIALECTS, *VECTOR_PATHS, "/v1/responses")
    Trace(partial(frontend.ask, TraceMsg, TraceReply), frontend.journal, frontend.metrics, config).add_to(app, traced)
    return app
