"""Tools and reasoning in requests and answers: checked fields, what templates make of them, assembled messages."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from minisgl.config.locate import DEMO_MODEL
from minisgl.core import FinishReason, Grammar, SamplingParams
from minisgl.errors import RequestError
from minisgl.message.messages import ChatPrompt, TokenizeMsg, UserReply, tokenizer_codec
from minisgl.server.answers.openai import ChatRenderer
from minisgl.server.answers.renderer import Assembler, new_assembler, with_grammar
from minisgl.server.bodies.chat import GenerationRequest, parse_chat
from minisgl.server.bodies.content import ToolUse
from minisgl.tokenizer.tokenize import HFTextCodec

HELLO = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "default": None}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
ANSWERED = [
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


def parse(**body: Any) -> GenerationRequest:
    return parse_chat(json.dumps({"messages": HELLO, **body}).encode(), {})


def prompt_of(**body: Any) -> Any:
    return parse(**body).prompts[0]


def test_tools_reach_the_template_as_they_are() -> None:
    parsed = parse(tools=[WEATHER, TIME])
    assert parsed.prompts[0].tools == [WEATHER, TIME]  # type: ignore[union-attr]
    assert parsed.tools == ToolUse((WEATHER, TIME))
    assert parsed.tools.functions == {"get_weather": PARAMETERS, "get_time": None}
    assert parse(tools=[TIME], tool_choice="auto", parallel_tool_calls=False).tools == ToolUse((TIME,), parallel=False)
    for body in ({"tools": [TIME], "tool_choice": "none"}, {"tools": []}, {"tools": None}, {"tool_choice": "auto"}):
        assert parse(**body).tools is None
        assert prompt_of(**body).tools is None


def test_calls_and_results_reach_the_template_with_arguments_as_objects() -> None:
    messages = prompt_of(messages=ANSWERED).messages
    arguments = messages[1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"city": "Paris"}
    assert messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    empty = {**CALL, "function": {"name": "get_time", "arguments": ""}}
    messages = prompt_of(messages=[{"role": "assistant", "tool_calls": [empty], "reasoning_content": "Hm."}]).messages
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == {}
    assert messages[0]["reasoning_content"] == "Hm."


def test_a_conversation_with_tools_through_a_real_template() -> None:
    text = HFTextCodec(str(DEMO_MODEL)).render_chat(prompt_of(messages=ANSWERED, tools=[WEATHER]))
    assert json.dumps(WEATHER) in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text


def test_template_kwargs_reach_the_template() -> None:
    assert prompt_of(chat_template_kwargs={"enable_thinking": False}).template_kwargs == {"enable_thinking": False}


KINDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "1"}, "temperature: input should be a valid number, not a string"),
    ({"n": True}, "n: input should be a valid integer, not true"),
    ({"seed": 1.5}, "seed: input should be a valid integer, not 1.5"),
    ({"stop": 5}, "stop: input should be a valid string, not 5"),
    ({"tools": {}}, "tools: input should be a valid list, not an object"),
    ({"stream_options": []}, "stream_options: input should be a valid object, not a list"),
    ({"stop_token_ids": [None]}, "stop_token_ids[0]: input should be a valid integer, not null"),
]


@pytest.mark.parametrize(("body", "message"), KINDS, ids=lambda value: str(value)[:40])
def test_a_refusal_says_what_kind_of_value_came(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse(**body)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "choice", [{"type": "custom", "custom": {"name": "get_time"}}, {"type": "custom", "name": "get_time"}]
)
def test_a_custom_tool_is_chosen_as_functions_are(choice: Any) -> None:
    used = parse(tools=[TIME], tool_choice=choice).tools
    assert used is not None and used.required


CASES: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"maximum": 10**30}}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [TIME, TIME]}, "tools"),
    ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "tools": [{"name": "g"}]}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "tools": [TIME], "mode": "none"}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": ["function"]}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": [10**30]}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "content": "a", "partial": True}]}, "messages[0].partial"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function.name"),
]


@pytest.mark.parametrize(("body", "param"), CASES, ids=lambda value: str(value)[:60])
def test_bad_fields_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse(**body)
    assert refusal.value.status == 400
    assert refusal.value.param == param
    assert param.split(".")[-1].split("[")[0] in str(refusal.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["function", "f"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "arguments", "parameters", "id"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.sampled_from(["assistant", "tool", "user"]), JSON, JSON, JSON, JSON)
def test_whatever_is_taken_can_be_sent_on(role: str, calls: Any, tools: Any, choice: Any, kwargs: Any) -> None:
    message = {"role": role, "content": "", "tool_calls": calls, "tool_call_id": calls, "reasoning_content": calls}
    message = {name: value for name, value in message.items() if value is not None}
    for body in (
        {"messages": [message]},
        {"tools": tools, "tool_choice": choice, "parallel_tool_calls": choice},
        {"tools": [tools, TIME], "tool_choice": choice},
        {"chat_template_kwargs": kwargs},
    ):
        with contextlib.suppress(RequestError):
            parsed = parse(**body)
            tokenizer_codec.encode([TokenizeMsg(1, parsed.prompts[0], parsed.params)])


HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
STOP = FinishReason.STOP


def replies(*texts: str, finish: FinishReason = STOP, prompt_end: str = "") -> list[UserReply]:
    made = [UserReply(1, text, b"", 5, index + 1, 0) for index, text in enumerate(texts)]
    made[0] = UserReply(1, texts[0], b"", 5, 1, 0, prompt_end=prompt_end)
    return [*made, UserReply(1, "", b"", 5, len(texts), 0, finish_reason=finish)]


def answer(
    given: list[UserReply], tools: ToolUse | None, reasoning: str | None = None, tool_parser: str = "hermes"
) -> Any:
    """The choice, from a whole answer; and the same from a stream. Both in the shapes that the openai package knows."""

    config: Any = SimpleNamespace(tool_call_parser=tool_parser, reasoning_parser=reasoning)
    parsed = with_grammar(GenerationRequest((ChatPrompt([]),), SamplingParams(), tools=tools), config)

    def renderer() -> ChatRenderer:
        return ChatRenderer("m", parsed, lambda: new_assembler(parsed, config))

    whole_renderer = renderer()
    whole_renderer.last[0] = given[-1]
    whole = ChatCompletion.model_validate(whole_renderer.body([given]), strict=True).choices[0]
    streaming = renderer()
    chunks = [
        ChatCompletionChunk.model_validate(chunk, strict=True).choices[0]
        for reply in given
        for chunk in streaming.chunk(0, reply)
    ]
    content, reasoned, calls = "", "", []
    for chunk in chunks:
        content += chunk.delta.content or ""
        reasoned += (chunk.delta.model_extra or {}).get("reasoning_content", "")
        for call in chunk.delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(calls) and call.type == "function"
                calls.append([call.function.name, ""])  # type: ignore[union-attr]
            calls[call.index][1] += call.function.arguments or ""  # type: ignore[union-attr]
    assert chunks[-1].finish_reason == whole.finish_reason
    assert content == (whole.message.content or "")
    assert reasoned == (whole.message.model_extra or {}).get("reasoning_content", "")
    assert calls == [[c.function.name, c.function.arguments] for c in whole.message.tool_calls or []]  # type: ignore[union-attr]
    return whole


TOOLS = ToolUse((WEATHER, TIME))


def test_choices_begin_in_order_whichever_is_first() -> None:
    """The openai package's sum of a stream numbers them so."""
    parsed = GenerationRequest((ChatPrompt([]),), SamplingParams())
    streaming, state = ChatRenderer("m", parsed, Assembler), ChatCompletionStreamState()
    texts = ["zero", "one", "two"]
    for index in (2, 0, 1):
        for reply in replies(texts[index]):
            for chunk in streaming.chunk(index, reply):
                state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    assert [choice.message.content for choice in state.get_final_completion().choices] == texts


def test_a_message_with_calls() -> None:
    for texts in ([HERMES], list(HERMES)):
        choice = answer(replies(*texts), TOOLS)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.id.startswith("call_")
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})


def test_ids_differ_and_are_short_for_mistral() -> None:
    text = '[TOOL_CALLS][{"name": "get_time"}, {"name": "get_time"}]'
    first, second = answer(replies(text), TOOLS, tool_parser="mistral").message.tool_calls
    assert first.id != second.id
    assert all(len(call.id) == 9 and call.id.isalnum() for call in (first, second))


def test_without_parallel_calls_the_first_is_the_only_one() -> None:
    choice = answer(replies(HERMES, HERMES), ToolUse((WEATHER,), parallel=False))
    assert len(choice.message.tool_calls) == 1
    assert choice.finish_reason == "tool_calls"


def test_a_message_that_is_cut_off_ends_with_length() -> None:
    """Its last call has the arguments so far, if it had begun, as in OpenAI's API."""
    for rest, num_calls, content in ((HERMES[:-20], 2, None), (HERMES[:20], 1, HERMES[:20])):
        choice = answer(replies(HERMES, rest, finish=FinishReason.LENGTH), TOOLS)
        assert (choice.finish_reason, choice.message.content) == ("length", content)
        assert len(choice.message.tool_calls) == num_calls
    assert answer(replies(HERMES[:-20]), TOOLS).message.tool_calls[0].function.arguments == '{"city": "P'


def test_a_call_that_a_stop_string_cuts_off_is_not_to_be_answered() -> None:
    """One that it only follows is."""
    for said, stop, reason in (
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "', "Paris", "stop"),
        (HERMES + '<tool_call>{"name": "get_time", "arguments": {"', "zone", "stop"),
        (HERMES.removesuffix("</tool_call>"), "</tool_call>", "tool_calls"),
        (HERMES + "Well, ", "then", "tool_calls"),
        ("Well, ", "then", "stop"),
    ):
        ended = [msgspec.structs.replace(reply, stop=stop) for reply in replies(said)]
        assert answer(ended, TOOLS).finish_reason == reason


def test_a_demanded_call_that_is_cut_off_is_no_text() -> None:
    """Wherever it is, and also if there was one before; without a demand it may have been meant as text."""
    demanded = ToolUse((WEATHER, TIME), required=True)
    for size in range(len(HERMES)):
        for before in ("", HERMES):
            choice = answer(replies(before, HERMES[:size], finish=FinishReason.LENGTH), demanded)
            assert (choice.finish_reason, choice.message.content or "") == ("length", "")
            assert len(choice.message.tool_calls or ()) >= bool(before)


def test_text_alone() -> None:
    for tools in (None, TOOLS):
        choice = answer(replies("Hello", " there. "), tools)
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (
            "Hello there. ", None, "stop",
        )  # fmt: skip
        assert "reasoning_content" not in choice.message.model_extra


def test_reasoning_is_apart() -> None:
    choice = answer(replies("<think>\nHm", ".\n</think>", "\n\nYes."), None, "qwen3")
    assert (choice.message.model_extra, choice.message.content) == ({"reasoning_content": "Hm."}, "Yes.")
    choice = answer(replies("Hm.", "</think>", HERMES, prompt_end="assistant\n<think>\n"), TOOLS, "qwen3")
    assert choice.message.model_extra == {"reasoning_content": "Hm."}
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"


def test_demanded_calls_are_read_in_the_format_of_their_grammar() -> None:
    named = ToolUse((WEATHER, TIME), required=True, allowed=frozenset({"get_weather"}), parallel=False)
    for parser, call in (("pythonic", '[get_weather(city="Paris")]'), ("hermes", HERMES)):
        choice = answer(replies("Hm", "</think>", *call), named, "deepseek_r1", parser)
        assert choice.message.model_extra == {"reasoning_content": "Hm"}
        (made,) = choice.message.tool_calls
        assert (choice.finish_reason, made.function.name) == ("tool_calls", "get_weather")
        assert json.loads(made.function.arguments) == {"city": "Paris"}


def grammar_of(tools: ToolUse | None, grammar: Grammar | None, **options: Any) -> Any:
    config: Any = SimpleNamespace(tool_call_parser="hermes", reasoning_parser=None)
    parsed = GenerationRequest((ChatPrompt([]),), SamplingParams(grammar=grammar), tools=tools)
    return with_grammar(parsed, config).params.grammar


def test_which_grammar_an_answer_has() -> None:
    answer = Grammar("json", "{}")
    assert grammar_of(None, answer) == answer
    assert grammar_of(TOOLS, None) is None
    both = json.loads(grammar_of(TOOLS, answer).text)["any"]
    assert both == [TOOLS.form("hermes"), [asdict(answer)]]
    forced = replace(TOOLS, required=True)
    assert json.loads(grammar_of(forced, answer).text) == json.loads(grammar_of(forced, None).text)
    assert json.loads(grammar_of(forced, None).text) == forced.form("hermes")


BOTH = [WEATHER, TIME]
CHOICES: list[tuple[Any, bool, set[str] | None, bool]] = [
    ("auto", False, None, True),
    ({"type": "auto"}, False, None, True),
    ("required", True, None, True),
    ("any", True, None, True),
    ({"type": "any"}, True, None, True),
    ({"type": "required"}, True, None, True),
    ({"type": "any", "disable_parallel_tool_use": True}, True, None, False),
    *(
        (form, True, {"get_time"}, False)
        for form in (
            "get_time",
            {"type": "function", "function": {"name": "get_time"}},
            {"type": "function", "name": "get_time"},
            {"type": "tool", "name": "get_time"},
            {"function": {"name": "get_time"}},
            {"name": "get_time"},
            {"type": "function", "function": "get_time"},
            {"type": "function", "function": {"name": "get_time"}, "name": None, "cache_control": None},
        )
    ),
    *(
        (form, mode == "required", {"get_time"}, True)
        for mode in ("auto", "required")
        for form in (
            {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "get_time"}]},
            {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [TIME]}},
        )
    ),
]


@pytest.mark.parametrize(("choice", "required", "names", "parallel"), CHOICES, ids=str)
def test_every_form_of_tool_choice(choice: Any, required: bool, names: set[str] | None, parallel: bool) -> None:
    parsed = parse(tools=BOTH, tool_choice=choice)
    tools = parsed.tools
    assert tools is not None
    assert (tools.required, tools.parallel) == (required, parallel)
    assert set(tools.functions) == (names or {"get_weather", "get_time"})
    shown = [tool["function"]["name"] for tool in parsed.prompts[0].tools]  # type: ignore[union-attr]
    assert shown == (["get_time"] if names and not required else ["get_weather", "get_time"])


@pytest.mark.parametrize("choice", ["none", {"type": "none"}])
def test_no_tools_by_choice(choice: Any) -> None:
    assert parse(tools=BOTH, tool_choice=choice).tools is None
