"""What an assistant says: content, reasoning and tool calls; what holds a model to them, and what reads them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from minisgl.config.chat import CLOSING, OPENING, REASONING_PARSERS
from minisgl.config.runtime import ServerConfig
from minisgl.core import FinishReason
from minisgl.errors import RequestError
from minisgl.message.frontend import UserReply
from minisgl.message.tokenizer import ChatPrompt
from minisgl.parser.parts import CallPart, Chain, Parser, Part, ReasoningPart, TextPart, ThinkParser
from minisgl.parser.tools import make_tool_parser
from minisgl.server.bodies.grammar import form_grammar
from minisgl.server.bodies.request import GenerationRequest

R = TypeVar("R", bound=GenerationRequest)


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
    _num_calls: int = field(default=0, init=False)
    _parser: tuple[ThinkParser, Parser] | None = field(default=None, init=False)  # what thinks, and all

    def deltas(self, reply: UserReply) -> list[dict[str, Any]]:
        """The increments of a streamed message."""
        deltas: list[dict[str, Any]] = []
        for part in self.parts(reply):
            if isinstance(part, TextPart):
                deltas.append({"content": part.text})
            elif isinstance(part, ReasoningPart):
                deltas.append({"reasoning_content": part.text})
            else:
                if part.name is not None:
                    deltas.append({"tool_calls": [{"index": part.index, **self._call(part.name)}]})
                if part.arguments:
                    more = {"index": part.index, "function": {"arguments": part.arguments}}
                    deltas.append({"tool_calls": [more]})
        return deltas

    def message(self, replies: Sequence[UserReply]) -> dict[str, Any]:
        """The whole message."""
        content, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        for part in (part for reply in replies for part in self.parts(reply)):
            if isinstance(part, TextPart):
                content += part.text
            elif isinstance(part, ReasoningPart):
                reasoning += part.text
            else:
                calls += [self._call(part.name)] if part.name is not None else []
                calls[part.index]["function"]["arguments"] += part.arguments
        nothing = None if calls or reasoning else ""
        message: dict[str, Any] = {"role": "assistant", "content": content or nothing, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def finish_reason(self, reply: UserReply) -> FinishReason | None:
        """Why the choice ended, if this reply is its last."""
        is_done = reply.finish_reason is FinishReason.STOP and self._num_calls
        return FinishReason.TOOL_CALLS if is_done else reply.finish_reason

    def parts(self, reply: UserReply) -> list[Part]:
        """What a reply adds to the message."""
        if self._parser is None:
            thinker = ThinkParser(self.reasoning, reply.prompt_end)
            self._parser = thinker, Chain(thinker, self.answer)
        thinker, parser = self._parser
        was_thinking = thinker.is_thinking
        parts = parser.push(reply.text) + (parser.finish() if reply.finish_reason is not None else [])
        if was_thinking or any(isinstance(part, ReasoningPart) for part in parts):
            self.num_reasoning = reply.num_output_tokens
        self._num_calls += sum(isinstance(part, CallPart) and part.name is not None for part in parts)
        return [part for part in parts if self.parallel or not isinstance(part, CallPart) or part.index == 0]

    def new_call_id(self) -> str:
        return uuid.uuid4().hex[:9] if self.short_ids else f"call_{uuid.uuid4().hex[:24]}"

    def _call(self, name: str) -> dict[str, Any]:
        """The beginning of a call."""
        return {"id": self.new_call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
