"""The parsers by the names of `--tool-call-parser` and `--reasoning-parser`."""

from __future__ import annotations

from collections.abc import Collection

from minisgl.config.chat import REASONING_PARSERS, reasoning_after
from minisgl.parser.forced import PlainParser
from minisgl.parser.parts import Parser
from minisgl.parser.reasoning import ThinkParser
from minisgl.parser.tools import HermesParser, LlamaParser, MistralParser, PythonicParser, ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}


def make_tool_parser(name: str, functions: Collection[str]) -> Parser:
    return TOOL_PARSERS[name](functions)


def make_forced_parser(name: str | None, functions: Collection[str], function: str | None) -> Parser:
    """For output in the form of `forced.forced_call`."""
    if name is None or name == "pythonic":
        return PlainParser(functions, function)
    return make_tool_parser(name, functions)


def make_reasoning_parser(name: str, prompt_end: str) -> ThinkParser:
    """prompt_end: the text with which the prompt ends."""
    return ThinkParser(reasoning_after(prompt_end, REASONING_PARSERS[name]))
