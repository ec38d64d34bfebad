"""Fields of requests that are not supported, or that nobody knows: refused by name, or ignored and told."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from minisgl.config.runtime import AccessConfig
from minisgl.errors import RequestError
from minisgl.server.access import IGNORED, MAX_TOLD, guarded
from minisgl.server.bodies.chat import ChatBody, parse_chat, parse_completion
from minisgl.server.bodies.fields import MAX_IGNORED, UNSUPPORTED, Reading, load_object
from minisgl.server.bodies.native import TokenizeBody, parse_generate
from minisgl.server.bodies.responses import parse_responses
from tools.request_fields import ALL_BODIES

HELLO = {"role": "user", "content": "hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
LEAST: dict[Callable[..., Any], dict[str, Any]] = {
    parse_chat: {"messages": [HELLO]},
    parse_completion: {"prompt": "a"},
    parse_generate: {"text": "a"},
    parse_responses: {"input": "hello"},
}
PARSERS = list(LEAST)


def read(parse: Callable[..., Any], body: dict[str, Any], *, strict: bool = False) -> tuple[Any, list[str]]:
    """What it becomes, and what of it was ignored."""
    reading = Reading(strict)
    parsed = parse(json.dumps({**LEAST[parse], **body}).encode(), {}, reading)
    return parsed, list(reading.ignored)


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    "body",
    [
        {"cache_prompt": True, "id_slot": 0, "slot_id": -1},
        {"rid": "r1", "request_id": "r", "kv_transfer_params": {"a": [1]}},
        {"provider": {"order": ["x"]}, "models": ["a", "b"], "transforms": ["middle-out"], "route": "fallback"},
        {"keep_alive": "5m", "anthropic_version": "2023-06-01", "cache_control": {"type": "ephemeral"}},
        {"metadata": {"a": "b"}, "store": True, "service_tier": "flex"},
        {"temprature": 0.3, "top-p": 0.9, "max_token": 4},
        {"": 1, "a b": 1, "über": 1, "\n\x1b[31m": 1, "x" * 10_000: 1, "\u2028": 1},
    ],
    ids=lambda body: next(iter(body)) or "odd",
)
def test_what_nobody_knows_is_ignored_and_told(parse: Callable[..., Any], body: dict[str, Any]) -> None:
    parsed, ignored = read(parse, body)
    plain, none = read(parse, {})
    assert getattr(parsed, "prompts", None) == plain.prompts
    assert parsed.params == plain.params
    assert none == []
    assert len(ignored) >= len(body) - len({"metadata", "store"} & {*body})  # which responses know
    assert all(name.isprintable() and len(name) < 100 for name in ignored)


@pytest.mark.parametrize("parse", PARSERS)
def test_each_unsupported_field_is_refused_by_name_unless_it_asks_for_nothing(parse: Callable[..., Any]) -> None:
    fields = next(
        fields for model, fields in ALL_BODIES.items() if f"parse_{model.__name__[:-4].lower()}" in str(parse)
    )
    assert {"use_beam_search", "lora_path", "mirostat", "typical_p", "prompt_logprobs", "top_a"} <= set(fields.refused)
    for name, neutral in fields.refused.items():
        for value in neutral:
            assert name in read(parse, {name: value})[1]
            assert read(parse, {name: value}, strict=True)[1]
        assert read(parse, {name: None})[1] == []
        with pytest.raises(RequestError, match="is not supported") as refusal:
            read(parse, {name: {"some": "thing"}})
        assert (refusal.value.param, refusal.value.status, refusal.value.code) == (name, 400, "unsupported_parameter")


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("use_beam_search", False, True),
        ("length_penalty", 1, 1.2),
        ("length_penalty", 1.0, 0),
        ("typical_p", 1.0, 0.9),
        ("mirostat", 0, 2),
        ("dry_multiplier", 0.0, 0.8),
        ("xtc_probability", 0, 0.5),
        ("n_probs", 0, 5),
        ("prompt_logprobs", False, 0),
        ("do_sample", True, False),
        ("best_of", 1, 2),
        ("echo", False, True),
        ("add_special_tokens", False, True),
        ("functions", [], [{"name": "f"}]),
        ("documents", [], [{"text": "a"}]),
        ("logits_processors", [], ["x"]),
        ("n_predict", -1, 20),
        ("suffix", "", "x"),
        ("modalities", ["text"], ["text", "audio"]),
        ("system", "", "You are a pirate."),
        ("options", {"num_ctx": 4096}, {"num_ctx": 4096, "temperature": 0}),
        ("extra_body", {}, {"top_k": 3}),
    ],
)
def test_neutral_values_of_others_fields(name: str, accepted: Any, refused: Any) -> None:
    parsed, ignored = read(parse_chat, {name: accepted})
    assert parsed == read(parse_chat, {})[0]
    assert any(shown.startswith(name) for shown in ignored)
    with pytest.raises(RequestError) as refusal:
        read(parse_chat, {name: refused})
    assert str(refusal.value.param).startswith(name)


def test_null_is_the_same_as_leaving_a_field_out_also_within() -> None:
    parts = [{"type": "text", "text": "hello", "refusal": None, "cache_control": None}]
    body = {
        **dict.fromkeys(UNSUPPORTED),
        "messages": [{**HELLO, "content": parts, "name": None, "tool_calls": None, "anything": None}],
        "tools": [{**TOOL, "cache_control": None, "function": {"name": "f", "parameters": None, "strict": None}}],
        "stream": True,
        "stream_options": {"include_usage": None, "continuous_usage_stats": None},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": None, "schema": None}},
        "structured_outputs": None,
        "logit_bias": {"5": None},
        "chat_template_kwargs": {"enable_thinking": None},
        "tool_choice": {"type": "function", "name": "f", "function": None},
    }
    parsed, ignored = read(parse_chat, body, strict=True)
    assert ignored == []
    assert parsed.prompts == read(parse_chat, {"tools": [TOOL]})[0].prompts
    assert parsed.params.logit_bias == ()
    own = {"type": "object", "properties": {"a": {"enum": [1, None], "default": None}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": own}}
    assert read(parse_chat, {"tools": [tool]})[0].prompts[0].tools == [tool]  # a schema's null is a value


def test_ignored_fields_within_are_told_with_their_place() -> None:
    part = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    said = {"role": "assistant", "content": "a", "id": "m1", "reasoning_details": [], "tool_calls": [{**CALL, "x": 1}]}
    body = {
        "messages": [{**HELLO, "content": [part, part]}, {**said}, {**HELLO, "id": "m2"}],
        "tools": [{**TOOL, "cache_control": {"type": "ephemeral"}, "function": {"name": "f", "examples": []}}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True},
    }
    parsed, ignored = read(parse_chat, body)
    assert set(ignored) >= {
        "messages[].content[].cache_control",
        "messages[].id",
        "messages[].tool_calls[].x",
        "tools[].cache_control",
        "tools[].function.examples",
        "stream_options.continuous_usage_stats",
    }
    assert parsed.include_usage
    native = {"sampling_params": {"temperature": 0, "colour": 1}}
    assert read(parse_generate, native)[1] == ["sampling_params.colour"]
    item = {**HELLO, "id": "x", "x": 1, "content": [{"type": "input_text", "text": "a", "y": 1}]}
    response = {"input": [item], "text": {"z": 1}, "tools": [{"type": "function", "name": "f", "defer_loading": True}]}
    expected = {"input[].x", "input[].content[].y", "text.z", "tools[].defer_loading"}
    assert set(read(parse_responses, response)[1]) == expected


@pytest.mark.parametrize(
    ("parse", "body", "param"),
    [
        (parse_chat, {"flavour": "sweet"}, "flavour"),
        (parse_chat, {"top-p": 0.9}, "top-p"),
        (parse_chat, {"a\nb": 1}, "a\\nb"),
        (parse_chat, {"": 1}, '""'),
        (parse_chat, {"messages": [{**HELLO, "colour": 1}]}, "messages[0].colour"),
        (parse_chat, {"tools": [{**TOOL, "cache_control": {}}]}, "tools[0].cache_control"),
        (parse_chat, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (parse_generate, {"sampling_params": {"colour": 1}}, "sampling_params.colour"),
        (parse_responses, {"input": [{**HELLO, "x": 1}]}, "input[0].x"),
    ],
)
def test_strict_requests_have_no_unknown_fields(parse: Callable[..., Any], body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match="unknown field: ") as refusal:
        read(parse, body, strict=True)
    assert (refusal.value.param, refusal.value.status) == (param, 400)
    assert param in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert read(parse, body)[1]


@pytest.mark.parametrize(
    ("parse", "given", "meant"),
    [
        (parse_chat, {"max_new_tokens": 5}, {"max_tokens": 5}),
        (parse_chat, {"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        (parse_chat, {"random_seed": 5, "stop_sequences": ["a"]}, {"seed": 5, "stop": ["a"]}),
        (parse_chat, {"random_seed": 5, "seed": 6}, {"seed": 6}),
        (parse_responses, {"max_tokens": 7}, {"max_output_tokens": 7}),
        (parse_generate, {"parameters": {"max_new_tokens": 7}}, {"sampling_params": {"max_tokens": 7}}),
    ],
)
def test_other_servers_names_for_our_fields(parse: Callable[..., Any], given: Any, meant: Any) -> None:
    assert read(parse, given)[0].params == read(parse, meant)[0].params != read(parse, {})[0].params


def test_one_request_has_only_so_many_names_remembered() -> None:
    assert len(read(parse_chat, {f"x{i}": 1 for i in range(10_000)})[1]) == MAX_IGNORED


def test_the_fields_of_tokenize() -> None:
    reading = Reading()
    data = b'{"content": "a", "add_special_tokens": null, "x": 1}'
    assert load_object(data, TokenizeBody, reading) == {"prompt": "a"}
    assert list(reading.ignored) == ["x"]


def answers(requests: list[dict[str, Any]]) -> list[httpx.Response]:
    """Of an application that reads chats, behind what all routes are behind."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reading = scope["state"]["reading"] = Reading()
        load_object(await Request(scope, receive).body(), ChatBody, reading)
        await PlainTextResponse("ok")(scope, receive, send)

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(guarded(app, AccessConfig(), log=False))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [await client.post("/", json=body) for body in requests]

    return asyncio.run(run())


SPACED = {" temperature": 1, " ": 1}  # a header may neither begin nor end so


def test_the_header_and_the_log_tell_what_was_ignored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minisgl")
    plain, one, *others = answers(
        [{}, {"cache_prompt": True, "max_token": 3}, {"cache_prompt": False, "a,b\r\nü": 1}, SPACED]
    )
    assert IGNORED not in plain.headers
    assert one.headers[IGNORED] == "cache_prompt, max_token"
    other, spaced = others
    assert spaced.headers[IGNORED] == "%20temperature, %20"
    names = other.headers[IGNORED].split(", ")
    assert names[0] == "cache_prompt"
    assert len(names) == 2
    assert names[1].isascii()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("cache_prompt" in line for line in lines) == 1
    assert [line for line in lines if "did you mean max_tokens?" in line] == [lines[1]]
    assert len(lines) == 5
    assert all(line.isprintable() for line in lines)


def test_a_client_can_fill_neither_the_log_nor_the_header(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "minisgl")
    many = [{f"field {i} of request {n}" * 20: 1 for i in range(100)} for n in range(20)]
    for answer in answers(many):
        assert answer.status_code == 200
        assert len(answer.headers[IGNORED]) <= 1010
    assert len(caplog.records) == MAX_TOLD
