"""Fields of structured output: what they become. What is refused is in `tests/e2e/test_structured_output.py`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from minisgl.core import Grammar, SamplingParams
from minisgl.errors import RequestError
from minisgl.server.bodies.chat import parse_chat, parse_completion
from minisgl.server.bodies.native import parse_generate

SCHEMA = {"type": "object", "properties": {"z": {}, "a": {}}}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json", '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            Grammar("json", json.dumps(SCHEMA)),
        ),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, Grammar("regex", "a")),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json_object": True, "regex": None}}, Grammar("json", '{"type": "object"}')),
        ({"guided_json": json.dumps(SCHEMA)}, Grammar("json", json.dumps(SCHEMA))),
        ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a", "b"]')),
        ({"guided_grammar": "start: x"}, Grammar("grammar", "start: x")),
    ],
)
def test_what_fields_become(fields: dict[str, Any], expected: Grammar | None) -> None:
    for parse, prompt in ((parse_chat, {"messages": HELLO}), (parse_completion, {"prompt": "a"})):
        grammar = parse(json.dumps({**prompt, **fields}).encode(), {}).params.grammar  # type: ignore[operator]
        assert grammar == expected
        assert grammar is None or grammar.param in fields


def test_a_schema_keeps_its_order() -> None:
    """It is the order of the output."""
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    text = parse_chat(json.dumps(body).encode(), {}).params.grammar.text  # type: ignore[union-attr]
    assert text.index('"z"') < text.index('"a"')


OBJECT = Grammar("json", '{"type": "object"}')
WITH_SCHEMA = Grammar("json", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "json_object", "schema": SCHEMA}, WITH_SCHEMA),
        ({"type": "json_object", "schema": None}, OBJECT),
        ({"type": "json_object", "value": SCHEMA}, WITH_SCHEMA),
        ({"type": "json_object", "json_schema": {"schema": SCHEMA}}, WITH_SCHEMA),
        ({"type": "json_schema", "schema": SCHEMA}, WITH_SCHEMA),
        ({"type": "json_schema", "name": "n", "strict": True, "schema": SCHEMA}, WITH_SCHEMA),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, WITH_SCHEMA),
        ({"type": "json_object", "whitespace": "any"}, replace(OBJECT, whitespace="any")),
        ({"type": "json_object", "whitespace": "compact"}, OBJECT),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA, "whitespace": "any"}},
            replace(WITH_SCHEMA, whitespace="any"),
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA}, "whitespace": "any"},
            replace(WITH_SCHEMA, whitespace="any"),
        ),
    ],
)
def test_every_form_of_response_format(value: dict[str, Any], expected: Grammar) -> None:
    body = {"messages": HELLO, "response_format": value}
    assert parse_chat(json.dumps(body).encode(), {}).params.grammar == expected


@pytest.mark.parametrize("schema", [SCHEMA, {"$ref": "#/$defs/a", "$defs": {"a": {}}}, {"anyOf": [SCHEMA]}], ids=str)
def test_a_schema_in_the_wrong_place_is_not_forgotten(schema: dict[str, Any]) -> None:
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": schema}}
    with pytest.raises(RequestError, match="is not supported") as refusal:
        parse_chat(json.dumps(body).encode(), {})
    assert str(refusal.value.param).startswith("response_format.json_schema.")


def test_whitespace_is_asked_for() -> None:
    body: dict[str, Any] = {"prompt": "a", "structured_outputs": {"json": SCHEMA, "whitespace": "any"}}
    assert parse_completion(json.dumps(body).encode(), {}).params.grammar == replace(WITH_SCHEMA, whitespace="any")
    for fields in (
        {"structured_outputs": {"json": SCHEMA, "whitespace": "some"}},
        {"structured_outputs": {"json": SCHEMA, "whitespace": 3}},
    ):
        with pytest.raises(RequestError, match="compact or any"):
            parse_completion(json.dumps({"prompt": "a", **fields}).encode(), {})


def test_native_fields() -> None:
    body = {"text": "a", "sampling_params": {"ebnf": 'root ::= "a"'}}
    assert parse_generate(json.dumps(body).encode(), {}).params.grammar == Grammar("grammar", 'root ::= "a"')


def test_min_tokens_would_contradict_a_grammar() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(min_tokens=3, grammar=Grammar("regex", "a"))
    assert caught.value.param == "min_tokens"
