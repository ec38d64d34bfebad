"""The parsers by the names of `--tool-call-parser` and `--reasoning-parser`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisgl.config.chat import REASONING_PARSERS, reasoning_after
from minisgl.parser.forced import UNKNOWN
from minisgl.parser.parts import Parser
from minisgl.parser.reasoning import ThinkParser
from minisgl.parser.tools import HermesParser, LlamaParser, MistralParser, PythonicParser, QwenCoderParser, ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "qwen3_coder": QwenCoderParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
}


def make_tool_parser(name: str | None, functions: Mapping[str, Any]) -> Parser:
    """name: None when the format is not known. functions: the JSON schemas of their arguments, by name."""
    return TOOL_PARSERS[name or UNKNOWN](functions)


def make_reasoning_parser(name: str | None, prompt_end: str) -> ThinkParser:
    """name: None when the model does not reason. prompt_end: the text with which the prompt ends."""
    return ThinkParser(reasoning_after(prompt_end, REASONING_PARSERS[name]) if name else "")
