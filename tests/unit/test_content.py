"""Content in parts, against the parts that OpenAI's client knows."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import pytest
from openai.types.chat import chat_completion_content_part_param as chat_parts
from openai.types.responses import ResponseInputContentParam, ResponseOutputText

from minisgl.errors import RequestError
from minisgl.message.messages import ChatPrompt
from minisgl.server.bodies.chat import parse_chat
from minisgl.server.bodies.content import text_of
from minisgl.tokenizer.tokenize import HFTextCodec


def kinds(union: Any) -> set[str]:
    return {get_args(get_type_hints(part)["type"])[0] for part in get_args(union)}


def refusal(content: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        text_of(content, "messages[0].content")
    assert caught.value.param == "messages[0].content"
    return caught.value


@pytest.mark.parametrize("kind", sorted(kinds(chat_parts.ChatCompletionContentPartParam) - {"text"}))
def test_what_is_no_text_is_told_so(kind: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
    message = str(refusal(parts))
    assert message.startswith("messages[0].content[1]: this model is text-only")
    assert kind in message


@pytest.mark.parametrize("kind", sorted(kinds(ResponseInputContentParam) - {"input_text"}))
def test_so_it_is_in_responses(kind: str) -> None:
    assert "text-only" in str(refusal([{"type": kind}]))


def test_our_own_parts_may_come_back() -> None:
    part = ResponseOutputText(type="output_text", text="hi", annotations=[], logprobs=[]).model_dump()
    assert text_of([part, {"type": "refusal", "refusal": "!"}], "x") == "hi!"
    cited = {**part, "annotations": [{"type": "file_path"}]}
    assert text_of([cited], "x") == "hi"


@pytest.mark.parametrize(
    "content",
    [
        None,
        7,
        {},
        [None],
        [{"type": "text"}],
        [{"type": ["text"], "text": "a"}],
        [{"type": "text", "text": 1}],
        [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
    ],
)
def test_other_content_is_refused(content: Any) -> None:
    refusal(content)


def test_parts_make_the_same_prompt_as_one_text(byte_level: HFTextCodec) -> None:
    """And the same as a template makes that reads the parts itself."""
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " world"}]

    def prompt(content: Any) -> ChatPrompt:
        parsed = parse_chat(json.dumps({"messages": [{"role": "user", "content": content}]}).encode(), {}).prompts[0]
        assert isinstance(parsed, ChatPrompt)
        return parsed

    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    tokenizer = byte_level.tokenizer
    by_template = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], chat_template=template, tokenize=False
    )
    assert prompt(parts) == prompt("Hello world")
    assert by_template in byte_level.render_chat(prompt(parts))
