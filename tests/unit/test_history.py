"""What a model has said comes back as clients write it, and is never refused; templates get it in a form they take."""

from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from openai.types.responses import ResponseInputItemParam

from minisgl.config.locate import DEMO_MODEL
from minisgl.core import FinishReason, SamplingParams
from minisgl.message.messages import ChatPrompt, TokenizeMsg, UserReply, tokenizer_codec
from minisgl.server.answers.openai import ChatRenderer
from minisgl.server.answers.renderer import Assembler
from minisgl.server.bodies.chat import GenerationRequest, parse_chat
from minisgl.server.bodies.fields import OBJECTS
from minisgl.server.bodies.responses import parse_responses
from minisgl.tokenizer.chat import CUT, CallForm
from minisgl.tokenizer.tokenize import HFTextCodec

HELLO = {"role": "user", "content": "hello"}
BIG = 10**30


@pytest.fixture(scope="module")
def demo() -> HFTextCodec:
    return HFTextCodec(str(DEMO_MODEL))


def messages(*given: Any) -> Any:
    """As templates get them, through the message between processes."""
    prompt = parse_chat(json.dumps({"messages": [HELLO, *given]}).encode(), {}).prompts[0]
    (message,) = tokenizer_codec.decode(tokenizer_codec.encode([TokenizeMsg(1, prompt, SamplingParams())]))
    assert isinstance(message, TokenizeMsg)
    assert message.prompt == prompt or "nan" in str(prompt)
    assert isinstance(message.prompt, ChatPrompt)
    return message.prompt.messages[1:]


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}, **more}


ARGUMENTS: list[tuple[Any, Any]] = [
    ('{"a": 1}', {"a": 1}),
    ({"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
    (None, {}),
    ("", {}),
    (" \n", {}),
    ("null", {}),
    ('"{\\"a\\": 1}"', {"a": 1}),  # JSON within JSON
    ('{"a": Infinity}', {"a": float("inf")}),
    ('{"city": "Par', '{"city": "Par'),
    ('{"a": [1, {"b": ', '{"a": [1, {"b": '),
    ("get_weather(Paris)", "get_weather(Paris)"),
    ("{'a': 1}", "{'a': 1}"),
    ("[1]", "[1]"),
    ([1], "[1]"),
    (7, "7"),
    ('"Paris"', '"Paris"'),
    (f'{{"a": {BIG}}}', f'{{"a": {BIG}}}'),
    ({"a": -BIG}, f'{{"a": -{BIG}}}'),
    ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
    ("[" * 5000, "[" * 5000),
]


@pytest.mark.parametrize(("given", "kept"), ARGUMENTS, ids=lambda value: str(value)[:30])
def test_arguments_of_calls_keep_what_can_be_kept(given: Any, kept: Any, demo: HFTextCodec) -> None:
    said = {"role": "assistant", "content": None, "tool_calls": [call(given)]}
    expected = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": kept}}
    assert messages(said) == [{"role": "assistant", "content": "", "tool_calls": [expected]}]
    item = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": given}
    responses = parse_responses(json.dumps({"input": [HELLO, item]}).encode(), {}).prompts
    assert responses == parse_chat(json.dumps({"messages": [HELLO, said]}).encode(), {}).prompts
    text = demo.render_chat(responses[0])  # type: ignore[arg-type]
    assert '"name": "f", "arguments": ' in text


@settings(deadline=None, max_examples=200)
@given(text=st.text() | st.from_regex(r'\{"a": [-0-9.eE\[\]{}"truefalsn ]{0,12}', fullmatch=True))
def test_any_arguments_are_carried_and_rendered(text: str, demo: HFTextCodec) -> None:
    demo.render_chat(ChatPrompt(messages({"role": "assistant", "tool_calls": [call(text)]})))


def shown(codec: HFTextCodec, *given: Any) -> str:
    return codec.render_chat(ChatPrompt([HELLO, *messages(*given)]))


# How the templates of model families write a call: lines of the same effect as theirs.
TEMPLATES = {
    "object": "{{ f.name }}({{ f.arguments | tojson }})",
    "either": "{{ f.name }}({{ f.arguments if f.arguments is string else f.arguments | tojson }})",
    "text": "{{ f.name + '(' + f.arguments + ')' }}",
    "python": "{{ f.name }}({{ f.arguments }})",
    "items": "{{ f.name }}({% for k, v in f.arguments | items %}{{ k }}={{ v | tojson }}{% endfor %})",
}
AROUND = (
    "{% for m in messages %}{{ m.role }}:{% if m.tool_calls and CONDITION %}{% for c in m.tool_calls %}"
    "{% set f = c.function %}CALL{% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
)


def codec_of(demo: HFTextCodec, call: str, condition: str = "true", before: str = "") -> HFTextCodec:
    """A tokenizer with this template."""
    made = HFTextCodec(str(DEMO_MODEL))
    made.tokenizer.chat_template = AROUND.replace("CALL", before + call).replace("CONDITION", condition)
    return made


@pytest.mark.parametrize(
    ("template", "whole", "cut_off", "no_json"),
    [
        ("object", 'f({"a": "ü"})', 'f({"a": "x"})', "f({})"),
        ("either", 'f({"a": "ü"})', 'f({"a": "x)', "f(nothing)"),
        ("text", 'f({"a": "ü"})', 'f({"a": "x)', "f(nothing)"),
        ("python", 'f({"a": "ü"})', 'f({"a": "x)', "f(nothing)"),
        ("items", 'f(a="ü")', 'f(a="x")', "f()"),
    ],
)
def test_templates_get_arguments_as_they_take_them(
    demo: HFTextCodec, template: str, whole: str, cut_off: str, no_json: str
) -> None:
    codec = codec_of(demo, TEMPLATES[template])
    for arguments, expected in (('{"a": "ü"}', whole), ('{"a": "x', cut_off), ("nothing", no_json)):
        text = shown(codec, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]})
        assert text == f"user:hello;assistant:{expected};"


def test_ids_are_as_short_as_the_template_wants_them(demo: HFTextCodec) -> None:
    """As those of Mistral do."""
    check = "{% if c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}[{{ c.id }}]"
    results = "{% if m.role == 'tool' %}[{{ m.tool_call_id }}]{% endif %}"
    codec = codec_of(demo, TEMPLATES["object"], before=check)
    codec.tokenizer.chat_template = codec.tokenizer.chat_template.replace("{{ m.content }}", results)
    result = {"role": "tool", "tool_call_id": "call_of_another_server", "content": "x"}
    said = {"role": "assistant", "tool_calls": [call("{}", id="call_of_another_server")]}
    first, second = shown(codec, said, result).split("[")[1:]
    assert first[:9] == second[:9]
    assert "[abcdefghi]" in shown(codec, {**said, "tool_calls": [call("{}", id="abcdefghi")]})


def test_several_calls_are_one_by_one_where_the_template_takes_but_one(demo: HFTextCodec) -> None:
    """As those of Llama 3 do."""
    check = "{% if m.tool_calls | length != 1 %}{{ raise_exception('single calls only') }}{% endif %}"
    codec = codec_of(demo, TEMPLATES["object"], before=check)
    said = {"role": "assistant", "content": "both", "tool_calls": [call({"a": 1}, id="x"), call({"a": 2}, id="y")]}
    results = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in ("x", "y")]
    for answers in (results, results[::-1]):
        both = 'assistant:f({"a": 1});tool:of x;assistant:f({"a": 2});tool:of y;'
        assert shown(codec, said, *answers, HELLO) == f"user:hello;{both}user:hello;"
    assert CallForm().fit(messages(said, *results)) == messages(said, *results)


# As gpt-oss has it: only the first call is written, results are the last call's, and thoughts have a name of their own.
CHANNELS = (
    "{% set last = namespace(name=none) %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.content and m.thinking %}{{ raise_exception('not both') }}{% endif %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json"
    "<|message|>{{ f.arguments | tojson }}<|call|>{% set last.name = f.name %}{% elif m.role == 'tool' %}"
    "<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


def test_a_conversation_of_gpt_oss(demo: HFTextCodec) -> None:
    codec = HFTextCodec(str(DEMO_MODEL), (), CHANNELS)
    calls = [call({"a": n}, id=i, function={"name": i, "arguments": {"a": n}}) for n, i in enumerate(("x", "y"))]
    said = {"role": "assistant", "reasoning_content": "Hm.", "content": "I look.", "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in ("y", "x")]
    done = {"role": "assistant", "reasoning_content": "Ah.", "content": "There.<|end|>"}
    text = shown(codec, said, *results, done)
    assert text.replace(CUT, "|") == (
        "<|start|>user<|message|>hello<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.\n\nI look.<|end|>"
        '<|start|>assistant to=functions.x<|channel|>commentary json<|message|>{"a": 0}<|call|>'
        '<|start|>functions.x to=assistant<|channel|>commentary<|message|>"of x"<|end|>'
        '<|start|>assistant to=functions.y<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        '<|start|>functions.y to=assistant<|channel|>commentary<|message|>"of y"<|end|>'
        "<|start|>assistant<|message|>There.<|end|><|end|>"
    )


def test_a_template_without_calls_is_left_alone(demo: HFTextCodec) -> None:
    codec = codec_of(demo, "", "false")
    text = shown(codec, {"role": "assistant", "content": "a", "tool_calls": [call("{")]})
    assert text == "user:hello;assistant:a;"


SAID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"content": ""}),
    ({"content": None}, {"content": ""}),
    ({"content": []}, {"content": ""}),
    ({"content": "a", "tool_calls": []}, {"content": "a"}),
    ({"content": None, "refusal": "No."}, {"content": "No."}),
    ({"content": "a", "refusal": "No."}, {"content": "a"}),
    ({"content": ["a", {"text": "b"}, {"type": "output_text", "text": "c"}]}, {"content": "abc"}),
    ({"content": [{"type": "refusal", "refusal": "No."}]}, {"content": "No."}),
    ({"content": {"a": ["ü"]}}, {"content": '{"a": ["ü"]}'}),
    ({"content": 7}, {"content": "7"}),
    ({"content": [{"type": "text", "text": None}, {"type": "text", "text": "a"}]}, {"content": "a"}),
    ({"content": [{"type": "image_url", "image_url": {"url": "x"}}, "a"]}, {"content": "a"}),
    ({"content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}, "a"]}, {"content": "a"}),
    (
        {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "a"}]},
        {"content": "a", "reasoning_content": "Hm."},
    ),
    (
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, "a"]},
        {"content": "a", "reasoning_content": "Hm."},
    ),
    ({"content": [{"type": "redacted_thinking", "data": "x"}, "a"]}, {"content": "a"}),
    ({"content": "a", "reasoning_content": "Hm."}, {"content": "a", "reasoning_content": "Hm."}),
    ({"content": "a", "reasoning_content": ""}, {"content": "a", "reasoning_content": ""}),
    ({"content": "a", "reasoning": "Hm."}, {"content": "a", "reasoning_content": "Hm."}),
    ({"content": "a", "thinking": "Hm."}, {"content": "a", "reasoning_content": "Hm."}),
    ({"content": "a", "reasoning_details": []}, {"content": "a"}),
    (
        {"content": "a", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}, {"type": "x", "data": "y"}]},
        {"content": "a", "reasoning_content": "Hm."},
    ),
    (
        {"content": "a", "thinking_blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]},
        {"content": "a", "reasoning_content": "Hm."},
    ),
    ({"content": "a", "reasoning_content": {"odd": 1}}, {"content": "a"}),
    ({"content": "a", "audio": {"id": "x"}, "annotations": [{"type": "url_citation"}], "id": "m"}, {"content": "a"}),
    ({"content": "a", "name": "bot", "parsed": {"x": 1}, "weight": 1}, {"content": "a", "name": "bot"}),
]


@pytest.mark.parametrize(("given", "kept"), SAID, ids=lambda value: str(value)[:50])
def test_what_an_assistant_said(given: dict[str, Any], kept: dict[str, Any]) -> None:
    assert messages({"role": "assistant", **given}) == [{"role": "assistant", **kept}]


CALLS: list[Any] = [
    [{"function": {"name": "f", "arguments": "{}"}}],
    [{"id": None, "type": None, "function": {"name": "f", "arguments": None}, "index": 0}],
    [{"id": "", "function": {"name": "f"}}],
    [{"type": "custom", "custom": {"name": "f", "input": ""}}],
    [{"name": "f", "args": {}, "type": "tool_call"}],
    [{"name": "f", "arguments": {}}],
]


@pytest.mark.parametrize("calls", CALLS, ids=lambda value: str(value)[:40])
def test_calls_without_ids_find_their_results(calls: Any) -> None:
    made = messages(
        {"role": "assistant", "tool_calls": calls * 2},
        {"role": "tool", "content": None},
        {"role": "tool", "content": [{"type": "text", "text": "x"}]},
        {"role": "tool", "content": [], "tool_call_id": "unasked"},
        {"role": "tool", "content": {"sky": "clear"}, "tool_call_id": 5},
    )
    ids = [one["id"] for one in made[0]["tool_calls"]]
    assert len({*ids, ""}) == 3
    assert [one["function"] for one in made[0]["tool_calls"]] == [{"name": "f", "arguments": {}}] * 2
    assert [(m["content"], m["tool_call_id"]) for m in made[1:]] == [
        ("", ids[0]),
        ("x", ids[1]),
        ("", "unasked"),
        ('{"sky": "clear"}', "5"),
    ]


RESULTS: list[tuple[Any, str]] = [
    ([{"id": 1, "text": "a", "more": None}, 2], '[{"id": 1, "text": "a", "more": null}, 2]'),
    ([{"type": "file", "name": "a.txt"}], '[{"type": "file", "name": "a.txt"}]'),
    ([{"type": {"a": "b"}}, [None]], '[{"type": {"a": "b"}}, [null]]'),
    ([None], "[null]"),
    ([{"text": "a"}, {"type": "text", "text": "b", "cache_control": {}}, "c"], "abc"),
]


@pytest.mark.parametrize(("given", "kept"), RESULTS, ids=lambda value: str(value)[:30])
def test_results_that_are_lists_of_their_own(given: Any, kept: str) -> None:
    """No parts: what a function gave is told as it is."""
    assert messages({"role": "tool", "tool_call_id": "c", "content": given})[0]["content"] == kept
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [call, {"type": "function_call_output", "call_id": "c", "output": given}]
    prompt = parse_responses(json.dumps({"input": items}).encode(), {}).prompts[0]
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[1]["content"] == kept


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"a\ud83d", "a\ufffd"),
        (r"a\\ud83d\ud83d", "a\\ud83d\ufffd"),
        (r"\uD83D\ude00\ud83d", "\U0001f600\ufffd"),
        (r"\ude00\ud83d\u0041", "\ufffd\ufffdA"),
    ],
)
def test_text_that_was_cut_within_a_character(written: str, read: str) -> None:
    """As JavaScript and Python write the half that is left."""
    body = b'{"messages": [{"role": "assistant", "content": "%s"}]}' % written.encode()
    prompt = parse_chat(body, {}).prompts[0]
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[0]["content"] == read


def test_the_older_function_calls() -> None:
    legacy = messages(
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "sunny"},
    )
    (one,) = legacy[0]["tool_calls"]
    assert one["function"] == {"name": "f", "arguments": {"a": 1}}
    assert legacy[1] == {"role": "tool", "name": "f", "content": "sunny", "tool_call_id": one["id"]}


def replies(*texts: str) -> list[UserReply]:
    last = len(texts) - 1
    return [UserReply(1, text, b"", 3, 1, 0, FinishReason.STOP if i == last else None) for i, text in enumerate(texts)]


def our_chat() -> list[dict[str, Any]]:
    """Our own answer as clients have it: whole, joined from a stream, and dumped in each way."""
    asked = GenerationRequest((ChatPrompt([]),), SamplingParams())
    whole = ChatRenderer("m", asked, Assembler).body([replies("hel", "lo")])
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    streaming = ChatRenderer("m", asked, Assembler)
    for reply in replies("hel", "lo"):
        for chunk in streaming.chunk(0, reply):
            state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    objects = [ChatCompletion.model_validate(whole), ParsedChatCompletion[None].model_validate(whole)]
    objects.append(state.get_final_completion())
    made = [whole["choices"][0]["message"]]
    for one in objects:
        message = one.choices[0].message
        made += [message.model_dump(), message.model_dump(exclude_none=True), message.model_dump(exclude_unset=True)]
    return made


@pytest.mark.parametrize("said", our_chat(), ids=lambda value: ",".join(value))
def test_our_own_answers_come_back(said: dict[str, Any]) -> None:
    assert messages(said, HELLO)[0] == {"role": "assistant", "content": "hello"}


def item_kinds() -> set[str]:
    hints = (get_type_hints(item)["type"] for item in get_args(ResponseInputItemParam))
    return {kind for hint in hints for kind in get_args(hint) if isinstance(kind, str)}


# Of the package's items, those that ask for something: no model has said them.
ASKED = {"additional_tools", "compaction_trigger", "configuration_update"}


@pytest.mark.parametrize("kind", sorted(item_kinds() - ASKED))
def test_each_item_that_a_model_may_have_made_is_taken(kind: str) -> None:
    item: dict[str, Any] = {"type": kind, "id": "x", "call_id": "c", "status": "completed", "name": "f", "role": "user"}
    item |= {"content": [{"type": "input_text", "text": "a"}], "output": "y", "action": {"type": "z"}, "input": "{}"}
    parsed = parse_responses(json.dumps({"input": [HELLO, item, HELLO]}).encode(), {}).prompts[0]
    assert isinstance(parsed, ChatPrompt)
    assert len(parsed.messages) == 3 - OBJECTS["item"].kinds[kind].left_out


def test_items_of_responses_in_every_form() -> None:
    part = {"type": "output_text", "text": "a", "parsed": {"x": 1}, "annotations": [1]}
    said = [
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "gAAAA"},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm."}], "content": None},
        {"role": "assistant", "content": [part]},
        {"type": "function_call", "id": "fc", "name": "f", "arguments": "{", "parsed_arguments": None, "status": None},
        {"type": "function_call_output", "call_id": "fc", "output": {"a": None}},
        {"type": "custom_tool_call", "call_id": "k", "name": "g", "input": "raw text"},
        {"type": "custom_tool_call_output", "call_id": "k", "output": [{"type": "input_text", "text": "done"}]},
        {"type": "message", "role": "assistant", "content": []},
    ]
    prompt = parse_responses(json.dumps({"input": [HELLO, *said]}).encode(), {}).prompts[0]
    assert isinstance(prompt, ChatPrompt)
    first, result, second, done, last = prompt.messages[1:]
    assert (first["reasoning_content"], first["content"], first["tool_calls"][0]["id"]) == ("Hm.", "a", "fc")
    assert (result["tool_call_id"], result["content"]) == ("fc", '{"a": null}')
    assert second["tool_calls"][0]["function"] == {"name": "g", "arguments": {"input": "raw text"}}
    assert (done["content"], last["content"]) == ("done", "")


def test_what_goes_with_several_calls_is_said_once() -> None:
    called = [{"id": i, "type": "function", "function": {"name": "f", "arguments": {}}} for i in "ab"]
    said = {"role": "assistant", "content": "Two.", "reasoning_content": "Hm.", "tool_calls": called}
    first, second = CallForm(several=False).fit([said])
    assert first == {**said, "tool_calls": called[:1]}
    assert second == {"role": "assistant", "content": "", "tool_calls": called[1:]}
