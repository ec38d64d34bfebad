"""Fields of structured output: what they become. What is refused is in `tests/e2e/test_structured_output.py`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minisgl.core import Grammar, SamplingParams
from minisgl.errors import RequestError
from minisgl.server.protocol import parse_chat, parse_completion, parse_generate
from minisgl.server.protocol_grammar import schema_grammar

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
    assert schema_grammar(SCHEMA, "x").text.index('"z"') < schema_grammar(SCHEMA, "x").text.index('"a"')


def test_native_fields() -> None:
    body = {"text": "a", "sampling_params": {"ebnf": 'root ::= "a"'}}
    assert parse_generate(json.dumps(body).encode(), {}).params.grammar == Grammar("grammar", 'root ::= "a"')


def test_min_tokens_would_contradict_a_grammar() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(min_tokens=3, grammar=Grammar("regex", "a"))
    assert caught.value.param == "min_tokens"
