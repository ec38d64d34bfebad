"""Reasoning and answer: with and without tags, opened by the prompt, cut anywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.config.chat import REASONING_PARSERS
from minisgl.parser.parts import Parser, Part, ThinkParser
from minisgl.parser.tools import ToolParser


def parse(parser: Parser, *texts: str) -> tuple[str, str]:
    parts: list[Part] = []
    for text in texts:
        parts += parser.push(text)
    parts += parser.finish()
    reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
    return reasoning, "".join(part.text for part in parts if part.kind == "text")


CASES = [
    # (parser, end of the prompt, output, reasoning, answer)
    ("qwen3", "assistant\n", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("qwen3", "assistant\n", "<think>\n\n</think>\n\nYes.", "", "Yes."),
    ("qwen3", "assistant\n", "\n<think>Hm</think>Yes", "Hm", "Yes"),
    ("qwen3", "assistant\n", "Yes.", "", "Yes."),
    ("qwen3", "assistant\n", " Yes <think>x</think>", "", " Yes <think>x</think>"),
    ("qwen3", "assistant\n", "<thin", "", "<thin"),
    ("qwen3", "assistant\n", "  ", "", "  "),
    ("qwen3", "assistant\n", "<think>Hm. ", "Hm.", ""),
    ("qwen3", "assistant\n", "<think>a </thin b", "a </thin b", ""),
    ("qwen3", "assistant\n<think>\n", "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("qwen3", "assistant\n<think>\n", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
    ("qwen3", "<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
    ("qwen3", "<think>\n\n</think>\n\n", "<think>Yes.", "", "<think>Yes."),
    ("qwen3", "assistant\n", "<think>a</think>b</think>c", "a", "b</think>c"),
    ("deepseek_r1", "<｜Assistant｜>", "Hm.</think>Yes.", "Hm.", "Yes."),
    ("deepseek_r1", "<｜Assistant｜><think>\n", "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("deepseek_r1", "<｜Assistant｜>", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
    ("deepseek_r1", "<｜Assistant｜>", "Hm", "Hm", ""),
    ("deepseek_r1", "<｜Assistant｜></think>", "Yes.", "", "Yes."),
    ("seed_oss", "<seed:bos>assistant\n", "<seed:think>Hm <think>.</seed:think>Yes.", "Hm <think>.", "Yes."),
    ("gemma4", "<|turn>model\n", "<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
    ("gemma4", "<|turn>model\n", "Yes.", "", "Yes."),
    ("gemma4", "<|turn>model\n<|channel>thought\n<channel|>", "Yes.", "", "Yes."),
    ("seed_oss", "assistant\n<seed:think>", "Hm.</seed:think>Yes.", "Hm.", "Yes."),
    ("seed_oss", "assistant\n<seed:think>\n</seed:think>", "Yes.", "", "Yes."),
    ("magistral", "[/INST]", "[THINK]Hm.[/THINK]Yes [THINK].", "Hm.", "Yes [THINK]."),
    ("magistral", "[/INST]", "[Yes]", "", "[Yes]"),
]


@pytest.mark.parametrize(("name", "prompt_end", "text", "reasoning", "answer"), CASES)
def test_formats(name: str, prompt_end: str, text: str, reasoning: str, answer: str) -> None:
    assert parse(ThinkParser(REASONING_PARSERS[name], prompt_end), text) == (reasoning, answer)
    assert parse(ThinkParser(REASONING_PARSERS[name], prompt_end), *text) == (reasoning, answer)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(REASONING_PARSERS)),
    prompt_end=st.sampled_from(["", "<think>\n", "</think>\n\n"]),
    fragments=st.lists(st.sampled_from(["<think>", "</think>", "<th", "</", " ", "\n", "word", ">"]), max_size=8),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_the_result_does_not_depend_on_the_cuts(
    name: str, prompt_end: str, fragments: list[str], cuts: list[int]
) -> None:
    text = "".join(fragments)
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    whole = parse(ThinkParser(REASONING_PARSERS[name], prompt_end), text)
    assert parse(ThinkParser(REASONING_PARSERS[name], prompt_end), *pieces) == whole
    assert parse(ThinkParser(REASONING_PARSERS[name], prompt_end), *text) == whole
    words = "".join(whole).replace(" ", "").replace("\n", "")
    lost = len(text.replace(" ", "").replace("\n", "")) - len(words)
    assert lost in (0, len("<think>"), len("</think>"), len("<think></think>"))  # one tag of each at most


def test_reasoning_comes_as_it_is_thought() -> None:
    parser = ThinkParser(REASONING_PARSERS["qwen3"], "")
    assert parser.push("<think>\n") == []
    assert parser.push("one ") == [Part("reasoning", "one")]
    assert parser.push("two") == [Part("reasoning", " two")]
    assert parser.push("</think>\n") == []
    assert parser.push("three ") == [Part("text", "three ")]


def test_calls_after_reasoning() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>\nI could {call}\n</think>\n\nLet me.\n{call}"
    expected = {"reasoning": f"I could {call}", "text": "Let me.", "names": ["f"], "arguments": "{}"}
    for pieces in ([text], list(text)):
        parser = ThinkParser(REASONING_PARSERS["qwen3"], "", ToolParser("hermes", {"f": None}))
        parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
        assert expected == {
            "reasoning": "".join(part.text for part in parts if part.kind == "reasoning"),
            "text": "".join(part.text for part in parts if part.kind == "text"),
            "names": [part.name for part in parts if part.kind == "call" and part.name],
            "arguments": "".join(part.text for part in parts if part.kind == "call"),
        }
