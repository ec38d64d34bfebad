"""Tool calls in text: the formats as the model families document them, cut anywhere, and what is malformed."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.parser.calls import python_calls
from minisgl.parser.forced import ForcedCall, forced_call
from minisgl.parser.parts import CallPart, Parser, Part, TextPart
from minisgl.parser.registry import TOOL_PARSERS, make_forced_parser, make_tool_parser

NAMES = ("get_weather", "get_time", "f", "math.add")
PARIS = {"city": "Paris"}
Result = tuple[str, list[tuple[str, Any]]]


def joined(parts: list[Part]) -> Result:
    """The text, and each call with its arguments read."""
    text = "".join(part.text for part in parts if isinstance(part, TextPart))
    names: list[str] = []
    arguments: list[str] = []
    for part in parts:
        if isinstance(part, CallPart):
            if part.name is not None:
                assert part.index == len(names)
                names.append(part.name)
                arguments.append("")
            arguments[part.index] += part.arguments
    return text, [(name, json.loads(read)) for name, read in zip(names, arguments, strict=True)]


def parse(parser: Parser, *texts: str) -> Result:
    parts: list[Part] = []
    for text in texts:
        parts += parser.push(text)
    return joined(parts + parser.finish())


HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
MISTRAL = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]'
WEATHER = ("get_weather", PARIS)
TIME = ("get_time", {})
END = "</tool_call>"
DOCUMENTED: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    # Qwen and Hermes: the model cards of Qwen2.5 and Hermes-2-Pro.
    ("hermes", HERMES, "", [WEATHER]),
    ("qwen", HERMES + "\n" + HERMES, "", [WEATHER, WEATHER]),
    ("hermes", f"Let me look.\n\n{HERMES}", "Let me look.", [WEATHER]),
    ("hermes", f"{HERMES}\nThere.", "\nThere.", [WEATHER]),
    ("hermes", HERMES.removesuffix("</tool_call>"), "", [WEATHER]),
    ("hermes", HERMES.removesuffix("</tool_call>") + HERMES, "", [WEATHER, WEATHER]),
    ("hermes", '<tool_call>{"arguments": {}, "name": "get_time"}</tool_call>', "", [TIME]),
    ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [TIME]),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {{"x": "{END}"}}}}{END}', "", [("f", {"x": END})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "<tool_call>\\""}}', "", [("f", {"x": '<tool_call>"'})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", {"x": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"code": "a\nb"}}</tool_call>', "", [("f", {"code": "a\nb"})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', "", [("f", {"x": "\ud800"})]),
    # Llama 3.1 and 3.2: Meta's prompt formats, JSON-based tool calling.
    ("llama3_json", LLAMA, "", [WEATHER]),
    ("llama3_json", "<|python_tag|>" + LLAMA, "", [WEATHER]),
    ("llama3_json", f"{LLAMA}; {LLAMA}", "", [WEATHER, WEATHER]),
    ("llama3_json", f"{LLAMA}\n{LLAMA};", "", [WEATHER, WEATHER]),
    ("llama3_json", '{"type": "function", "name": "get_time", "parameters": {}}', "", [TIME]),
    ("llama3_json", '{"type": "function", "function": {"name": "get_time", "parameters": {}}}', "", [TIME]),
    ("llama3_json", "\n\n" + LLAMA, "", [WEATHER]),
    # Mistral: the function calling guide (v3), and tokenizers v11 and v13.
    ("mistral", MISTRAL, "", [WEATHER]),
    ("mistral", "Sure. " + MISTRAL, "Sure.", [WEATHER]),
    ("mistral", MISTRAL[:-1] + ', {"name": "get_time", "arguments": {}}]', "", [WEATHER, TIME]),
    ("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", [WEATHER]),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}', "", [WEATHER, TIME]),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}', "", [WEATHER]),
    ("mistral", '[TOOL_CALLS] {"name": "get_time", "arguments": {}}', "", [TIME]),
    # Llama 3.2 and 4, pythonic: Meta's prompt formats, zero-shot function calling.
    ("pythonic", '[get_weather(city="Paris")]', "", [WEATHER]),
    ("pythonic", "[get_weather(city='Paris'), get_time()]", "", [WEATHER, TIME]),
    ("pythonic", "<|python_start|>[get_time()]<|python_end|>", "", [TIME]),
    ("pythonic", "[math.add(a=1, b=-2.5)]", "", [("math.add", {"a": 1, "b": -2.5})]),
    ("pythonic", "[f(a=[1, {'b': None}], c=True, d=true)]", "", [("f", {"a": [1, {"b": None}], "c": True, "d": True})]),
    ("pythonic", "[f(a=null, b=false)]", "", [("f", {"a": None, "b": False})]),
    ("pythonic", "[f(x=\"it's [here\", y='\\'])')]", "", [("f", {"x": "it's [here", "y": "'])"})]),
    ("pythonic", "[f(x='\\d')]", "", [("f", {"x": "\\d"})]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), DOCUMENTED, ids=lambda value: str(value)[:50])
def test_documented_formats(name: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    assert parse(make_tool_parser(name, NAMES), text) == (content, calls)
    assert parse(make_tool_parser(name, NAMES), *text) == (content, calls)


MALFORMED = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\nhello</tool_call> there"),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par'),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5}</tool_call> and </tool_call> <tool_'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + "[" * 100000 + "</tool_call>"),
    ("llama3_json", '{"name": "Ada", "born": 1815}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", "<|python_tag|>  "),
    ("llama3_json", '{"name": "f", "parameters": {'),
    ("llama3_json", 'The answer: {"name": "f", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] I cannot {do} that"),
    ("mistral", '[TOOL_CALLS]unknown[ARGS]{"a": 1}'),
    ("mistral", "[TOOL_CALLS]f[ARGS]{"),
    ("mistral", "[TOOL_CALLS]" + "x" * 1000),
    ("mistral", "[TOOL_CALLS][ARGS]{}"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(**{})]"),
    ("pythonic", "[f(x=open('a'))]"),
    ("pythonic", "[f(x={1})]"),
    ("pythonic", "[f(x=1"),
    ("pythonic", "[f(x=\0)]"),
    ("pythonic", "[f(x=" + "(" * 500 + ")" * 500 + ")]"),
    ("pythonic", "[f(x=" + "-" * 50000 + "1)]"),
    ("pythonic", "[f(x=" + "1+" * 50000 + "1)]"),
    ("pythonic", "[f(x=" + "9" * 5000 + ")]"),
    ("pythonic", "[f(x='a' * 10)]"),
    ("pythonic", "[link](https://example.com) and more"),
    ("pythonic", "[f(x=1, x=2)]"),
]


@pytest.mark.parametrize(("name", "text"), MALFORMED, ids=lambda value: str(value)[:50])
def test_what_is_malformed_comes_back_as_text(name: str, text: str) -> None:
    assert parse(make_tool_parser(name, NAMES), text) == (text, [])
    if len(text) < 2000:
        assert parse(make_tool_parser(name, NAMES), *text) == (text, [])


def test_text_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    parser = make_tool_parser("hermes", NAMES)
    assert joined(parser.push("a < b ")) == ("a < b", [])
    assert joined(parser.push("<tool")) == ("", [])
    assert joined(parser.push("box> ")) == (" <toolbox>", [])
    assert joined(parser.push("c")) == (" c", [])
    assert joined(parser.push(HERMES)) == ("", [WEATHER])  # at once, not at the end of the message


FRAGMENTS = {
    "hermes": ["<tool_call>", "</tool_call>", HERMES, '{"name": "f"', ', "arguments": {"x": "', '"}}', "<tool_"],
    "llama3_json": ["<|python_tag|>", LLAMA, ";", '{"name": "f"', ', "parameters": {"x": "', '"}}', "<|"],
    "mistral": ["[TOOL_CALLS]", MISTRAL, "[ARGS]", "[CALL_ID]", '[{"name": "f"', "}]", "f{", '{"x": "', '"}', "[TOOL"],
    "pythonic": ["<|python_start|>", "<|python_end|>", "[f(x=1)]", "[", "f(", "x='", "'", ")", "]", ",", "<|python_"],
}


@st.composite
def messages(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A parser's name, and a text of fragments of its format, cut anywhere."""
    name = draw(st.sampled_from(sorted(FRAGMENTS)))
    fragments = st.sampled_from([*FRAGMENTS[name], " ", "\n", "\\", '"', "text", "{", "}", "🙂"])
    text = "".join(draw(st.lists(fragments, max_size=10)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return name, [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=300, deadline=None)
@given(messages())
def test_the_result_does_not_depend_on_the_cuts(message: tuple[str, list[str]]) -> None:
    name, pieces = message
    text = "".join(pieces)
    whole = parse(make_tool_parser(name, NAMES), text)
    assert parse(make_tool_parser(name, NAMES), *pieces) == whole
    assert parse(make_tool_parser(name, NAMES), *text) == whole
    content, calls = whole
    if not calls:
        assert content == text
    for called, arguments in calls:
        assert called in NAMES and isinstance(arguments, dict)
    kept = iter(text)
    assert all(character in kept for character in content)  # nothing is made up, and the order is kept


@settings(deadline=None)
@given(st.sampled_from(sorted(TOOL_PARSERS)), st.lists(st.text(max_size=20), max_size=8))
def test_plain_text_stays_as_it_is(name: str, pieces: list[str]) -> None:
    assert parse(make_tool_parser(name, NAMES), *pieces) == ("".join(pieces), [])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.text(min_size=1), VALUES, max_size=3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["f", "get_time"]), ARGUMENTS), min_size=1, max_size=3), st.booleans())
def test_any_arguments_come_through(calls: list[tuple[str, dict[str, Any]]], ascii_only: bool) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    written = {
        "hermes": "".join(f'<tool_call>{{"name": "{n}", "arguments": {dump(a)}}}</tool_call>' for n, a in calls),
        "llama3_json": ";".join(f'{{"name": "{n}", "parameters": {dump(a)}}}' for n, a in calls),
        "mistral": "".join(f"[TOOL_CALLS]{n}[ARGS]{dump(a)}" for n, a in calls),
    }
    for name, text in written.items():
        assert parse(make_tool_parser(name, NAMES), *text) == ("", calls)


IDENTIFIERS = st.from_regex(r"[a-z]{1,5}_", fullmatch=True)


@settings(deadline=None)
@given(st.dictionaries(IDENTIFIERS, VALUES, max_size=3))
def test_any_python_literals_come_through(arguments: dict[str, Any]) -> None:
    text = f"[f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
    assert parse(make_tool_parser("pythonic", NAMES), *text) == ("", [("f", arguments)])


def test_python_that_is_no_list_is_no_call() -> None:
    assert python_calls("f(x=1)", NAMES) is None


TOOLS = [
    {"type": "function", "function": {"name": "get_time"}},
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "at": {"$ref": "#/$defs/Point"},
                    "self": {"$ref": "#"},
                    "$ref": {"const": {"$ref": "#/x"}},
                },
                "required": ["at"],
                "additionalProperties": False,
                "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
            },
        },
    },
]


POINT = {"at": {"x": 1}, "self": {"at": {"x": 2}}, "$ref": {"$ref": "#/x"}}
FORMATS = [*sorted(TOOL_PARSERS), None]


def accepts(schema: dict[str, Any], value: Any) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def forced(name: str | None, function: str | None, *, parallel: bool = True) -> ForcedCall:
    return forced_call(name, TOOLS, function, parallel=parallel)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parallel", [False, True])
def test_forced_calls_are_read_back(name: str | None, parallel: bool) -> None:
    """What the grammar lets through is what the parser takes."""
    form = forced(name, None, parallel=parallel)
    key = "parameters" if name == "llama3_json" else "arguments"
    calls = [{"name": "f", key: POINT}, {"name": "get_time", key: {}}] if parallel else [{"name": "f", key: POINT}]
    if form.schema.get("type") == "array":
        assert accepts(form.schema, calls)
        assert accepts(form.schema, calls * 2) == parallel
        text = form.prefix + json.dumps(calls) + form.suffix
    else:
        assert all(accepts(form.schema, call) for call in calls)
        assert (form.separator is not None) == parallel
        text = (form.separator or "").join(form.prefix + json.dumps(call) + form.suffix for call in calls)
    expected = [(call["name"], call[key]) for call in calls]
    for pieces in ([text], list(text)):
        assert parse(make_forced_parser(name, NAMES, None), *pieces) == ("", expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_function_by_name_is_called_once(name: str | None) -> None:
    assert forced(name, "get_time") == forced(name, "get_time", parallel=False)


@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_follow_the_schema_of_their_function(name: str | None) -> None:
    schema = forced(name, None).schema
    key = "parameters" if name == "llama3_json" else "arguments"

    def call(function: str, arguments: Any) -> Any:
        made = {"name": function, key: arguments}
        return [made] if schema.get("type") == "array" else made

    assert accepts(schema, call("get_time", {}))
    for bad in (
        [],
        call("g", {}),
        call("get_time", []),
        call("f", {"at": {"x": "1"}}),
        call("f", {"at": {"x": 1}, "self": {}}),
        call("f", {"at": {"x": 1}, "more": 1}),
    ):
        assert not accepts(schema, bad)


def test_the_only_call_of_a_named_function() -> None:
    for name in ("hermes", "llama3_json", "mistral"):
        schema = forced(name, "f").schema
        assert "get_time" not in json.dumps(schema)
    schema = forced(None, "f").schema
    assert accepts(schema, POINT)
    assert not accepts(schema, {"at": {"x": "1"}})
    assert accepts(forced("pythonic", "get_time").schema, {})
    assert not accepts(forced("pythonic", "get_time").schema, [])
    text = ' {"city": "Paris"}'
    for pieces in ([text], list(text)):
        assert parse(make_forced_parser(None, NAMES, "get_weather"), *pieces) == ("", [WEATHER])
    begun = make_forced_parser(None, NAMES, "get_weather").push('{"ci')
    assert begun == [CallPart(0, "get_weather", '{"ci')]


def test_plain_calls_that_are_cut_off() -> None:
    calls = '[{"name": "get_weather", "arguments": {"city": "Paris"}},\n {"name": "get_time", "arguments": {}}]'
    content, found = parse(make_forced_parser(None, NAMES, None), *calls[:-15])
    assert found == [WEATHER] and content.startswith('{"name": "get_time"')
