"""What answers have in common: what reads a model's words as blocks of a message, what shows them, and counts."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from pydantic_core import from_json

from minisgl.config.chat import HARMONY, REASONING_PARSERS
from minisgl.config.runtime import ServerConfig
from minisgl.core import FinishReason
from minisgl.errors import MiniSGLError, RequestError
from minisgl.message.messages import ChatPrompt, UserReply
from minisgl.parser.harmony import HarmonyParser
from minisgl.parser.parts import BracketReader, Parser, Part, ThinkParser
from minisgl.parser.tools import TOOL_PARSERS, ToolParser
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.server.bodies.sampling import form_grammar
from minisgl.server.errors import dump_json, error_payload

R = TypeVar("R", bound=GenerationRequest)
Events = list[dict[str, Any]]


def with_grammar(parsed: R, config: ServerConfig) -> R:
    """If it is a chat, with the grammar of calls that the client demands, or that may come instead of an answer
    that has a grammar; and of reasoning before any grammar.

    Raises: RequestError when the request has tools and the format of this model's calls is not known.
    """
    prompt, tools, grammar, calls = parsed.prompts[0], parsed.tools, parsed.params.grammar, config.tool_call_parser
    if not isinstance(prompt, ChatPrompt):
        return parsed
    if tools is not None and not tools.required and calls is None:
        message = "tools: the format of this model's tool calls is not known; start the server with --tool-call-parser"
        raise RequestError(message, param="tools")
    if tools is not None and tools.required:  # calls are the answer, so that nothing else has a form
        grammar = form_grammar(tools.form(calls), "tools")
    elif grammar is not None and calls is not None and (tools is not None or calls == HARMONY):
        before = [] if prompt.continue_final else TOOL_PARSERS[calls].answer
        choices = [*([tools.form(calls)] if tools else []), [*before, asdict(grammar)]]
        grammar = form_grammar({"any": choices}, grammar.param)
    if grammar is not None:
        grammar = replace(grammar, reasoning=_reasoning(parsed, config))
    return replace(parsed, params=replace(parsed.params, grammar=grammar))


def _reasoning(parsed: GenerationRequest, config: ServerConfig) -> str:
    """Whether the output begins with reasoning, and the tags, as in `core.Grammar`. The rest of a message does so only
    if the message breaks off in the middle of it."""
    usual, prompt = REASONING_PARSERS.get(config.reasoning_parser or "", ""), parsed.prompts[0]
    if not (usual and isinstance(prompt, ChatPrompt) and prompt.continue_final):
        return usual
    (_, opening, closing), text = usual.split(), prompt.messages[-1]["content"]
    return f"always {opening} {closing}" if text.rfind(opening) > text.rfind(closing) else ""


def new_assembler(parsed: GenerationRequest, config: ServerConfig) -> "Assembler":
    """What reads one of the answers to this request."""
    tools, format_name, prompt = parsed.tools, config.tool_call_parser, parsed.prompts[0]
    functions, parallel = ({}, True) if tools is None else (tools.functions, tools.parallel)
    answer: Parser = ToolParser(format_name, functions) if tools else Parser()
    reasoning = _reasoning(parsed, config)
    if format_name == HARMONY and isinstance(prompt, ChatPrompt):
        answer, reasoning = HarmonyParser(functions, in_answer=prompt.continue_final), ""
    short_ids, demanded = format_name == "mistral", tools is not None and tools.required
    return Assembler(reasoning, answer, parallel=parallel, short_ids=short_ids, demanded=demanded)


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a message: text, reasoning or one call, as far as it has come. index: among all blocks."""

    part: Part  # that has begun it
    index: int
    call_id: str
    _pieces: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.part.kind

    @property
    def text(self) -> str:
        """Or the arguments of a call."""
        return "".join(self._pieces)

    def add(self, text: str) -> None:
        self._pieces.append(text)
        if len(self._pieces) > 64:  # which take many times the bytes of their text
            self._pieces = [self.text]


@dataclass(slots=True)
class Assembler:
    """Reads one choice's replies, from the first to the last.

    reasoning: as in `core.Grammar`. answer: the parser of what comes after that.
    parallel: without it, calls after the first are dropped.
    short_ids: nine letters and digits, which Mistral's templates insist on.
    demanded: there is no text beside calls: it is one cut off before its name, or anywhere where calls come whole.
    """

    reasoning: str = ""
    answer: Parser = field(default_factory=Parser)
    parallel: bool = True
    short_ids: bool = False
    demanded: bool = False
    # Tokens; of those that came together with the end of the reasoning, all.
    num_reasoning: int = field(default=0, init=False)
    blocks: list[Block] = field(default_factory=list, init=False)
    _parser: ThinkParser | None = field(default=None, init=False)

    def read(self, reply: UserReply, renderer: "Renderer") -> Events:
        """What the renderer tells of a reply. There is a block at the end, if need be an empty one."""
        parser = self._parser = self._parser or ThinkParser(self.reasoning, reply.prompt_end, self.answer)
        is_reasoning, events = parser.is_thinking, list[dict[str, Any]]()
        for part in parser.push(reply.text) + (parser.finish() if reply.finish_reason is not None else []):
            is_reasoning = is_reasoning or part.kind == "reasoning"
            if (part.call_index and not self.parallel) or (part.kind == "text" and self.demanded):
                continue
            if not self.blocks or part.name is not None or part.kind != self.blocks[-1].part.kind:
                events += self._open(part, renderer)
            if part.text:
                self.blocks[-1].add(part.text)
                events += renderer.more(self.blocks[-1], part.text)
        if is_reasoning:
            self.num_reasoning = reply.num_output_tokens
        if reply.finish_reason is not None:
            events += [] if self.blocks else self._open(Part("text", ""), renderer)
            events += renderer.end(self.blocks[-1], reply.finish_reason)
        return events

    def finish_reason(self, reply: UserReply) -> FinishReason | None:
        """Why the choice ended, if this reply is its last: with calls, unless a stop string cut off the last one."""
        calls = [block.text for block in self.blocks if block.kind == "call"]
        is_done = bool(calls) and (reply.stop is None or BracketReader().read(calls[-1])[2])
        return FinishReason.TOOL_CALLS if is_done and reply.finish_reason is FinishReason.STOP else reply.finish_reason

    def _open(self, part: Part, renderer: "Renderer") -> Events:
        events = renderer.end(self.blocks[-1], None) if self.blocks else []
        call_id = uuid.uuid4().hex[:9] if self.short_ids else f"call_{uuid.uuid4().hex[:24]}"
        self.blocks.append(Block(part, len(self.blocks), call_id))
        return events + renderer.begin(self.blocks[-1])


def event(payload: Mapping[str, Any]) -> bytes:
    """One SSE event, named by its `type` if it has one. The JSON is one line, so text cannot break it."""
    name = payload.get("type")
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + dump_json(payload) + b"\n\n"


def partial_object(arguments: str) -> dict[str, Any]:
    """The arguments of a call, or what there is of them where it was cut off."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(eq=False)
class Renderer(ABC):
    """One endpoint's way to show a request's replies. new_assembler: makes what reads those to one choice."""

    prefix = ""  # of `id`: what the answer is called in itself
    done = b"data: [DONE]\n\n"  # what ends a stream that went well
    keep_alive = b": keep-alive\n\n"  # sent when there has been nothing else to send for a while

    model: str
    request: GenerationRequest
    new_assembler: Callable[[], Assembler]
    id: str = field(default="", init=False)
    created: int = field(default_factory=lambda: int(time.time()), init=False)
    last: dict[int, UserReply] = field(default_factory=dict, init=False)  # by choice; those of a prompt are in a row

    def __post_init__(self) -> None:
        self.id = self.prefix + uuid.uuid4().hex

    def chunk(self, index: int, reply: UserReply) -> Events:  # noqa: ARG002
        """The events for an increment of choice `index`."""
        return []

    def last_chunks(self) -> Events:
        """The events after the last choice: the usage, for clients that asked for it."""
        return []

    def failure(self, error: MiniSGLError) -> Events:
        """The events at the end of a stream that failed after it began."""
        return [error_payload(error)]

    @abstractmethod
    def body(self, choices: Sequence[Sequence[UserReply]]) -> dict[str, Any]:
        """The whole answer of a request that does not stream: the replies to each choice that is shown."""

    def usage(self) -> dict[str, Any]:
        """Token counts of all choices as far as they have come. A prompt counts once."""
        first_of_prompt = [reply for index, reply in self.last.items() if index % self.request.num_choices == 0]
        num_prompt = sum(reply.num_prompt_tokens for reply in first_of_prompt)
        num_output = sum(reply.num_output_tokens for reply in self.last.values())
        right, wrong = (sum(reply.drafted[i] for reply in self.last.values()) for i in (0, 1))
        drafted = {"accepted_prediction_tokens": right, "rejected_prediction_tokens": wrong}
        counts = {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}
        cached = {"cached_tokens": sum(reply.num_cached_tokens for reply in first_of_prompt)}
        more = {"completion_tokens_details": drafted} if right + wrong else {}
        return {**counts, "prompt_tokens_details": cached, **more}

    # What is told of a block: when it begins, when more text of it has come, and when it is whole.
    def begin(self, block: Block) -> Events:  # noqa: ARG002
        return []

    def more(self, block: Block, text: str) -> Events:  # noqa: ARG002
        return []

    def end(self, block: Block, reason: FinishReason | None) -> Events:  # noqa: ARG002
        """reason: with the last block, why the output ends."""
        return []


@dataclass(eq=False)
class MessageRenderer(Renderer):
    """Of an answer that is one message. A whole body is made of the same blocks as the events."""

    done = b""
    assembler: Assembler = field(init=False)
    has_begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.assembler = self.new_assembler()

    def chunk(self, index: int, reply: UserReply) -> Events:  # noqa: ARG002
        events = [] if self.has_begun else self.first_chunks(reply)
        self.has_begun = True
        return events + self.assembler.read(reply, self)

    def body(self, choices: Sequence[Sequence[UserReply]]) -> dict[str, Any]:
        for reply in choices[0]:
            self.assembler.read(reply, self)
        return self.finished()

    @abstractmethod
    def first_chunks(self, reply: UserReply) -> Events:
        """The events before the first block."""

    @abstractmethod
    def finished(self) -> dict[str, Any]:
        """The whole answer, all of which has been read."""
