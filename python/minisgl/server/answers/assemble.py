"""What an assistant says: content, reasoning and tool calls; what holds a model to them, and what reads them."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from minisgl.config.chat import CLOSING, OPENING, REASONING_PARSERS
from minisgl.config.runtime import ServerConfig
from minisgl.core import FinishReason
from minisgl.errors import RequestError
from minisgl.message.frontend import UserReply
from minisgl.message.tokenizer import ChatPrompt
from minisgl.parser.parts import Parser, Part, ThinkParser
from minisgl.parser.tools import make_tool_parser
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.server.bodies.sampling import form_grammar

R = TypeVar("R", bound=GenerationRequest)
Events = list[dict[str, Any]]


def with_grammar(parsed: R, config: ServerConfig) -> R:
    """If it is a chat, with the grammar of calls that the client demands, or that may come instead of an answer
    that has a grammar; and of reasoning before any grammar.

    Raises: RequestError when the request has tools and the format of this model's calls is not known.
    """
    if not isinstance(parsed.prompts[0], ChatPrompt):
        return parsed
    tools, grammar = parsed.tools, parsed.params.grammar
    if tools is not None and not tools.required and config.tool_call_parser is None:
        message = "tools: the format of this model's tool calls is not known; start the server with --tool-call-parser"
        raise RequestError(message, param="tools")
    if tools is not None and tools.required:  # calls are the answer, so that nothing else has a form
        grammar = form_grammar(tools.form(config.tool_call_parser), "tools")
    elif tools is not None and grammar is not None:
        grammar = form_grammar({"any": [tools.form(config.tool_call_parser), asdict(grammar)]}, grammar.param)
    reasoning = _reasoning_parser(parsed, config)
    if grammar is not None and reasoning is not None:
        grammar = replace(grammar, reasoning=REASONING_PARSERS[reasoning])
    return replace(parsed, params=replace(parsed.params, grammar=grammar))


def _reasoning_parser(parsed: GenerationRequest, config: ServerConfig) -> str | None:
    """Its name. The rest of a message begins with reasoning only if the message breaks off in the middle of it."""
    prompt = parsed.prompts[0]
    if config.reasoning_parser is None or not (isinstance(prompt, ChatPrompt) and prompt.continue_final):
        return config.reasoning_parser
    text = prompt.messages[-1]["content"]
    return "deepseek_r1" if text.rfind(OPENING) > text.rfind(CLOSING) else None


def new_assembler(parsed: GenerationRequest, config: ServerConfig) -> Assembler:
    """What reads one of the answers to this request."""
    tools, format_name = parsed.tools, config.tool_call_parser
    answer = Parser() if tools is None else make_tool_parser(format_name, tools.functions)
    parallel, short_ids = tools is None or tools.parallel, format_name == "mistral"
    return Assembler(_reasoning_parser(parsed, config), answer, parallel=parallel, short_ids=short_ids)


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


class Dialect:
    """What a stream tells of a block of its message: by itself nothing."""

    def begin(self, block: Block) -> Events:  # noqa: ARG002
        """When it begins."""
        return []

    def more(self, block: Block, text: str) -> Events:  # noqa: ARG002
        """When this text is added."""
        return []

    def end(self, block: Block, reason: FinishReason | None) -> Events:  # noqa: ARG002
        """When it is whole. reason: with the last block, why the output ends."""
        return []


@dataclass(slots=True)
class Assembler:
    """Reads one choice's replies, from the first to the last.

    reasoning: the name of its parser, if the model may reason. answer: the parser of what comes after that.
    parallel: without it, calls after the first are dropped.
    short_ids: nine letters and digits, which Mistral's templates insist on.
    """

    reasoning: str | None = None
    answer: Parser = field(default_factory=Parser)
    parallel: bool = True
    short_ids: bool = False
    # Tokens; of those that came together with the end of the reasoning, all.
    num_reasoning: int = field(default=0, init=False)
    blocks: list[Block] = field(default_factory=list, init=False)
    _parser: ThinkParser | None = field(default=None, init=False)

    def read(self, reply: UserReply, dialect: Dialect) -> Events:
        """What the dialect tells of a reply. There is a block at the end, if need be an empty one."""
        parser = self._parser = self._parser or ThinkParser(self.reasoning, reply.prompt_end, self.answer)
        is_reasoning = parser.is_thinking
        events: Events = []
        for part in parser.push(reply.text) + (parser.finish() if reply.finish_reason is not None else []):
            is_reasoning = is_reasoning or part.kind == "reasoning"
            if part.call_index and not self.parallel:
                continue
            if not self.blocks or part.name is not None or part.kind != self.blocks[-1].kind:
                events += self._open(part, dialect)
            if part.text:
                self.blocks[-1].add(part.text)
                events += dialect.more(self.blocks[-1], part.text)
        if is_reasoning:
            self.num_reasoning = reply.num_output_tokens
        if reply.finish_reason is not None:
            events += [] if self.blocks else self._open(Part("text", ""), dialect)
            events += dialect.end(self.blocks[-1], reply.finish_reason)
        return events

    def finish_reason(self, reply: UserReply) -> FinishReason | None:
        """Why the choice ended, if this reply is its last."""
        is_done = reply.finish_reason is FinishReason.STOP and any(block.kind == "call" for block in self.blocks)
        return FinishReason.TOOL_CALLS if is_done else reply.finish_reason

    def _open(self, part: Part, dialect: Dialect) -> Events:
        events = dialect.end(self.blocks[-1], None) if self.blocks else []
        call_id = uuid.uuid4().hex[:9] if self.short_ids else f"call_{uuid.uuid4().hex[:24]}"
        self.blocks.append(Block(part, len(self.blocks), call_id))
        return events + dialect.begin(self.blocks[-1])
