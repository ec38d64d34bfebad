"""Grammars of tool calls, alone and beside answers: what they let through, the parsers read back, and it matches."""

from __future__ import annotations

import contextlib
import json
import random
import time
from dataclasses import asdict
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.schema import SchemaError, followed, json_kinds
from minisgl.grammar.store import GrammarStore
from minisgl.parser.tools import TOOL_PARSERS, calls_form
from tests.unit.test_grammar import accepts, compile_in, store, walk
from tests.unit.test_tool_parsers import parse, parser_of

__all__ = ["store"]
POINT = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["x"]}
PARAMETERS: dict[str, dict[str, Any] | None] = {
    "get_time": None,
    "ping": {"type": "object", "properties": {}},
    "plain": {"properties": {"deep": POINT}, "required": ["deep"]},
    "f": {
        "type": "object",
        "properties": {
            "at": {"$ref": "#/$defs/Point"},
            "unit": {"enum": ["C", "F"]},
            "maybe": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
            "code": {"type": "string", "pattern": "^[a-z]{2}$"},
            "day": {"type": "string", "format": "date"},
            "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["at", "code"],
        "$defs": {"Point": POINT},
    },
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": s}} for name, s in PARAMETERS.items()]
ARGUMENTS = {"at": {"x": 1}, "unit": "C", "maybe": None, "code": "ab", "day": "2026-01-02", "flags": [True]}
FORMATS = [*sorted(TOOL_PARSERS), None]
ANSWER = Grammar("json", json.dumps({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}))


def form(name: str | None, *names: str, required: bool = True, parallel: bool = True, tools: Any = TOOLS) -> Any:
    return calls_form(name, tools, names or tuple(PARAMETERS), parallel=parallel, required=required)


def compiled(store: GrammarStore, form: Any, **more: str) -> Any:
    return compile_in(store, "form", form, **more)


def closed(schema: Any) -> Any:
    """As `additionalProperties: false` everywhere would have it."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {**inner, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else inner


def checked(text: str, name: str | None) -> list[tuple[str, Any]]:
    """The calls of an output, which has nothing else."""
    functions: dict[str, Any] = PARAMETERS
    content, calls = parse(parser_of(name, functions), text)
    assert content == "" and calls, text
    assert parse(parser_of(name, functions), *text) == (content, calls)
    for function, arguments in calls:
        jsonschema.validate(arguments, closed(PARAMETERS[function]) or {"type": "object", "maxProperties": 0})
    return calls


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_grammar_lets_through_is_a_call_that_matches(store: GrammarStore, name: str | None) -> None:
    matcher = compiled(store, form(name))
    texts = [walk(matcher.deep_copy(), random.Random(seed), 200) for seed in range(60)]
    calls = [call for text in texts if text is not None for call in checked(text, name)]
    assert {function for function, _ in calls} == set(PARAMETERS)
    assert all(arguments == {} for function, arguments in calls if PARAMETERS[function] in (None, PARAMETERS["ping"]))


def written(name: str | None, function: str, arguments: dict[str, Any]) -> str:
    """As the model's own template writes it."""
    text = json.dumps(arguments)
    call = f"{function}({', '.join(f'{key}={json.dumps(value)}' for key, value in arguments.items())})"
    if name in ("hermes", "qwen"):
        return f'<tool_call>\n{{"name": "{function}", "arguments": {text}}}\n</tool_call>'
    if name == "mistral":
        return f"[TOOL_CALLS]{function}[ARGS]{text}"
    if name == "pythonic":
        return f"[{call}]"
    if name == "lfm2":
        return f"<|tool_call_start|>[{call}]<|tool_call_end|>"
    if name == "olmo3":
        return f"<function_calls>{call}</function_calls>"
    if name in ("granite", "phi4_mini"):
        return f'<|tool_call|>[{{"name": "{function}", "arguments": {text}}}]'
    if name == "glm4":
        return f"{function}\n{text}"
    if name == "harmony":
        return f"<|channel|>commentary to=functions.{function} <|constrain|>json<|message|>{text}"
    if name == "gemma4":
        values = [f'<|"|>{one}<|"|>' if isinstance(one, str) else json.dumps(one) for one in arguments.values()]
        inner = ",".join(f"{key}:{value}" for key, value in zip(arguments, values, strict=True))
        return f"<|tool_call>call:{function}{{{inner}}}<tool_call|>"
    if name in ("qwen3_coder", "seed_oss"):
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        tag = "tool_call" if name == "qwen3_coder" else "seed:tool_call"
        return f"<{tag}>\n<function={function}>\n{inner}</function>\n</{tag}>"
    return f'{{"name": "{function}", "parameters": {text}}}'


@pytest.mark.parametrize("name", FORMATS)
def test_the_model_s_own_way_to_write_calls_is_let_through(store: GrammarStore, name: str | None) -> None:
    matcher = compiled(store, form(name))
    for arguments in (ARGUMENTS, {"at": {"x": 1}, "code": "ab"}, {"at": {"x": 0}, "unit": "F", "code": "xy"}):
        text = written(name, "f", arguments)
        assert accepts(matcher.deep_copy(), text), text
        assert checked(text, name) == [("f", arguments)]
    for bad in ({}, {"at": {"x": 10}, "code": "ab"}, {"at": {"x": 1}, "code": "abc"}, {**ARGUMENTS, "day": "1.2.2026"}):
        assert not accepts(matcher.deep_copy(), written(name, "f", bad)), bad
    for bad in ({"at": {"x": 1, "y": 2}, "code": "ab"}, {"at": {"x": 1}, "code": "ab", "more": 1}):
        assert not accepts(matcher.deep_copy(), written(name, "f", bad)), bad
    assert not accepts(matcher.deep_copy(), written(name, "g", {}))
    assert not accepts(matcher.deep_copy(), written(name, "ping", {"made": "up"}))


BETWEEN = {"llama3_json": "; ", None: "; ", "mistral": "", "gemma4": "", "harmony": "<|end|><|start|>assistant"}
LISTS = ("pythonic", "lfm2", "olmo3", "granite", "phi4_mini")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in LISTS])
def test_one_call_or_several(store: GrammarStore, name: str | None) -> None:
    call = written(name, "plain", {"deep": {"x": 1}})
    several = BETWEEN.get(name, "\n").join([call] * 3)
    one, many = compiled(store, form(name, parallel=False)), compiled(store, form(name))
    assert accepts(one.deep_copy(), call) and not accepts(one, several)
    assert accepts(many.deep_copy(), call) and accepts(many, several)
    assert len(checked(several, name)) == 3


def test_lists_of_calls(store: GrammarStore) -> None:
    for name, text in (
        ("pythonic", '[ping(), plain(deep={"x": 1}), get_time()]'),
        ("mistral", '[TOOL_CALLS] [{"name": "ping", "arguments": {}}, {"name": "get_time", "arguments": {}}]'),
        ("mistral", '[TOOL_CALLS][{"name": "ping", "arguments": {}}]'),
        ("granite", '<|tool_call|>[{"name": "ping", "arguments": {}}, {"name": "get_time", "arguments": {}}]'),
        ("lfm2", "<|tool_call_start|>[ping(), get_time()]<|tool_call_end|>"),
        ("olmo3", '<function_calls>ping()\nplain(deep={"x": 1})</function_calls>'),
    ):
        assert accepts(compiled(store, form(name)), text)
        assert len(checked(text, name)) == text.count("ping") + text.count("plain") + text.count("get_time")
        assert accepts(compiled(store, form(name, parallel=False)), text) == (len(checked(text, name)) == 1)


@pytest.mark.parametrize("name", FORMATS)
def test_only_functions_that_are_asked_for(store: GrammarStore, name: str | None) -> None:
    matcher = compiled(store, form(name, "ping"))
    assert accepts(matcher.deep_copy(), written(name, "ping", {}))
    assert not accepts(matcher, written(name, "plain", {"deep": {"x": 1}}))


@pytest.mark.parametrize("reasoning", ["", "optional <think> </think>", "always <think> </think>"])
@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_calls_or_an_answer(store: GrammarStore, name: str, reasoning: str) -> None:
    """Of JSON, and of other kinds; after reasoning as well."""
    call = written(name, "f", ARGUMENTS)
    for answer, text, bad in (
        (ANSWER, '{"a":1}', '{"a":3}'),
        (Grammar("json", '{"type": "array", "items": {"type": "integer"}}'), "[1,2]", '["f"]'),
        (Grammar("regex", "[0-9]{3}"), "123", "12"),
        (Grammar("choice", '["yes", "no"]'), "yes", "maybe"),
        (Grammar("grammar", 'start: "x" y\ny: "z"+'), "xzz", "x"),
    ):
        matcher = compiled(store, {"any": [form(name, required=False), asdict(answer)]}, reasoning=reasoning)
        before = "<think>\nHm.\n</think>\n\n" if reasoning else ""
        assert accepts(matcher.deep_copy(), before + text), text
        assert accepts(matcher.deep_copy(), before + call), call
        assert not accepts(matcher.deep_copy(), before + bad)
        assert not accepts(matcher.deep_copy(), before + text + call)
        assert not accepts(matcher.deep_copy(), before)
        assert parse(parser_of(name, PARAMETERS), text) == (text, [])


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


@pytest.mark.parametrize("name", FORMATS)
def test_a_schema_that_cannot_be_followed(store: GrammarStore, name: str | None) -> None:
    """Binds, or else the arguments are any object: the model was free to write them before."""
    tags = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    word = {"type": "object", "properties": {"tags": {"type": "string", "pattern": "(?=a)b"}}}
    for parameters, value in ((tags, [1]), (word, "b")):
        tools = [tool("ping", {}), tool("f", parameters)]
        text = written(name, "f", {"tags": value})
        assert accepts(compiled(store, form(name, "f", "ping", tools=tools, required=False)), text)
        for bad in (
            form(name, "f", tools=tools),
            form(name, "f", tools=[tool("ping", {}), tool("f", parameters, strict=True)], required=False),
        ):
            with pytest.raises(RequestError, match="tags") as caught:
                compiled(store, bad)
            assert str(caught.value.param).startswith("tools[1].function.parameters")
            with pytest.raises(RequestError):  # from memory
                compiled(store, bad)


@pytest.mark.parametrize("name", FORMATS)
def test_names_that_are_none_in_the_language_of_calls(store: GrammarStore, name: str | None) -> None:
    """As tools of MCP servers have them; Python would take them for operators, keywords or numbers."""
    rng = random.Random(1)
    for function, argument in (("get-weather", "from"), ("a.b:c/d", "user-id"), ("1st", "größe"), ("class", "1x")):
        schema = {"type": "object", "properties": {argument: {"enum": ["a-b(c=1, ", "x=1"]}}, "required": [argument]}
        text = walk(compiled(store, form(name, function, tools=[tool(function, schema)], parallel=False)), rng)
        assert text is not None
        content, ((called, arguments),) = parse(parser_of(name, {function: schema}), text)
        assert (content, called) == ("", function)
        jsonschema.validate(arguments, closed(schema))


BARE = {
    "gemma4": ("a:b", "a,b", 'a"', " a", "a:", ""),
    **dict.fromkeys(("qwen3_coder", "seed_oss"), ("a>b", "a\nb", "<a")),
}
BARE |= dict.fromkeys(
    ("pythonic", "lfm2", "olmo3"), ("a,b", 'a"', " a", "first name", "a=b", "a:", "-a", "", "a\nb", "<a")
)


@pytest.mark.parametrize("name", FORMATS)
def test_names_that_could_not_be_read_back_are_refused(store: GrammarStore, name: str | None) -> None:
    """Where names stand without quotes; a name with spaces can be read where a colon ends it."""
    for argument in ("a:b", "a,b", 'a"', " a", "first name", "a=b", "a:", "-a", "", "a>b", "a\nb", "<a"):
        schema = {"type": "object", "properties": {argument: {"enum": [1]}}, "required": [argument]}
        tools = [tool("f", schema)]
        if argument in BARE.get(name or "", ()):
            with pytest.raises(RequestError, match="cannot have this name") as caught:
                form(name, "f", tools=tools)
            assert caught.value.param == f"tools[0].function.parameters.properties.{argument}"
            continue
        text = walk(compiled(store, form(name, "f", tools=tools, parallel=False)), random.Random(1))
        assert text is not None and parse(parser_of(name, {"f": schema}), text) == ("", [("f", {argument: 1})])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_required_need_not_be_among_the_properties(store: GrammarStore, name: str | None) -> None:
    schema = {"type": "object", "properties": {"b": {"enum": [1]}}, "required": ["a", "b"]}
    matcher = compiled(store, form(name, "f", tools=[tool("f", schema)], parallel=False))
    assert accepts(matcher.deep_copy(), written(name, "f", {"b": 1, "a": 2}))
    assert not accepts(matcher.deep_copy(), written(name, "f", {"b": 1}))
    assert not accepts(matcher.deep_copy(), written(name, "f", {}))


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_are_an_object_whatever_the_schema_says(store: GrammarStore, name: str | None) -> None:
    """Else what is let through is no call."""
    for kind in ("array", "string", ["object", "null"]):
        compiled_form = compiled(store, form(name, "f", tools=[tool("f", {"type": kind})]))
        assert accepts(compiled_form, written(name, "f", {}))
        if name in (None, "hermes", "mistral"):
            assert not any(
                accepts(compiled_form, written(name, "f", {}).replace("{}", other)) for other in ("[]", '"x"', "null")
            )


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_arguments_that_have_no_list(name: str) -> None:
    tools = [tool("f", {"anyOf": [POINT, {"type": "object", "properties": {"y": {}}}]})]
    with pytest.raises(RequestError, match="named properties") as caught:
        form(name, "f", tools=tools)
    assert caught.value.param == "tools[0].function.parameters"


KEYWORDS = st.sampled_from(
    """type properties required items anyOf oneOf allOf $ref $defs enum const format pattern minLength maxLength x
    additionalProperties patternProperties propertyNames unevaluatedProperties uniqueItems discriminator #/$defs/x
    definitions maxItems exclusiveMinimum minimum prefixItems""".split()  # noqa: SIM905
)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | KEYWORDS
    | st.sampled_from(["string", "object", "#", "#/$defs/x", "("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYWORDS, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", FORMATS)
def test_references_may_begin_with_the_schema_s_own_name(store: GrammarStore, name: str | None) -> None:
    """Of each argument, too, where these are forms of their own."""
    reference = {"$ref": "http://x/f.json#/$defs/A"}
    schema = {"$id": "http://x/f.json", "properties": {"x": reference}, "required": ["x"]}
    matcher = compiled(store, form(name, "f", tools=[tool("f", {**schema, "$defs": {"A": {"type": "integer"}}})]))
    assert accepts(matcher.deep_copy(), written(name, "f", {"x": 5}))
    assert not accepts(matcher, written(name, "f", {"x": True}))


def test_types_within_types_are_read_once(store: GrammarStore) -> None:
    """A schema of a few kB that names each of its parts many times, in many levels, in the API server."""
    for key in ("anyOf", "oneOf", "allOf"):
        defs: dict[str, Any] = {"L0": {"type": ["integer", "null"]}}
        defs |= {f"L{level}": {key: [{"$ref": f"#/$defs/L{level - 1}"}] * 40} for level in range(1, 12)}
        schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/L11"}}, "required": ["x"], "$defs": defs}
        assert json_kinds(schema["properties"]["x"], schema, {}) == {"integer", "null"}  # type: ignore[index]
        forms = {name: form(name, "f", tools=[tool("f", schema)]) for name in FORMATS}
        if key == "anyOf":
            matcher = compiled(store, forms["qwen3_coder"])
            assert accepts(matcher.deep_copy(), written("qwen3_coder", "f", {"x": 5}))
            assert not accepts(matcher, written("qwen3_coder", "f", {"x": "b"}))
    endless = {"properties": {"x": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}]}}}
    assert json_kinds({"$ref": "#/$defs/A"}, endless, {}) == set()
    chain: dict[str, Any] = {f"L{level}": {"anyOf": [{"$ref": f"#/$defs/L{level - 1}"}]} for level in range(1, 3000)}
    deep = {"$defs": chain | {"L0": {"type": "integer"}}}
    assert json_kinds({"$ref": "#/$defs/L9"}, deep, {}) == {"integer"}
    assert json_kinds({"$ref": "#/$defs/L2999"}, deep, {}) == set()  # too deep to be told
    for name in FORMATS:
        form(name, "f", tools=[tool("f", endless)], required=False)


@pytest.mark.parametrize("name", ["qwen3_coder", "pythonic", "gemma4"])
def test_what_arguments_have_in_common_does_not_multiply(name: str) -> None:
    """It would be gigabytes, in the API server, of bodies that are let in."""
    reference = {"type": "object", "properties": {"y": {"$ref": "#/$defs/A"}}}
    shared = {"A": {"type": "string", "description": "x" * 10000}}
    schema = {"properties": {f"x{index}": reference for index in range(20_000)}, "$defs": shared}
    many = {"properties": {f"x{index}": {"type": "integer"} for index in range(20_000)}}
    for wide in (schema, many):
        with pytest.raises(RequestError, match="tools: their calls take more than") as caught:
            form(name, "f", tools=[tool("f", wide)])
        assert caught.value.param == "tools"
    few = {"properties": {f"x{index}": reference for index in range(20)}, "$defs": shared}
    form(name, "f", tools=[tool("f", few)])


@pytest.mark.parametrize("name", ["qwen3_coder", "gemma4"])
@pytest.mark.parametrize(
    "shared",
    [
        {"enum": [f"value{index}" for index in range(1000)]},
        {"type": "string", "pattern": "a" * 10_000},
        {"anyOf": [{"type": "string", "description": str(index)} for index in range(1000)]},
        {"anyOf": [{"$ref": "#/$defs/B"}] * 1000},
        {"type": [*map(str, range(500))], **{f"k{index}": 0 for index in range(500)}},
    ],
    ids=["values", "pattern", "alternatives", "references", "types"],
)
def test_arguments_that_are_no_json_do_not_multiply_either(name: str, shared: dict[str, Any]) -> None:
    """A first one that is needed, so that not even optional ones before it are many."""
    reference, defs = {"$ref": "#/$defs/A"}, {"A": shared, "B": {"type": "string"}}
    schema = {"properties": {f"x{index}": reference for index in range(1000)}, "required": ["x0"], "$defs": defs}
    begin = time.process_time()
    with pytest.raises(RequestError, match="tools: their calls take more than"):
        form(name, "f", tools=[tool("f", schema)])
    assert time.process_time() - begin < 2  # seconds; all of them would be megabytes, or gigabytes


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYWORDS, JUNK, max_size=5), st.booleans())
def test_whatever_a_client_takes_for_a_schema_is_refused_or_read(schema: dict[str, Any], required: bool) -> None:
    """By what runs in the API server, and by what prepares schemas for the compiler."""
    with contextlib.suppress(SchemaError):
        followed(schema)
    for name in FORMATS:
        with contextlib.suppress(RequestError):
            form(name, "f", tools=[tool("f", schema)], required=required)
        for value in ("5", "x", "{}"):
            arguments = {"x": value, "type": value}
            text = written(name, "f", arguments)
            assert len(parse(parser_of(name, {"f": schema}), text)[1]) == 1


@pytest.mark.parametrize("name", [name for name, spec in TOOL_PARSERS.items() if spec.language == "tags"])
@pytest.mark.parametrize(
    ("limits", "good", "bad"),
    [
        ({"minLength": 1}, ["a", "two\nlines", "x\n</parameter> y"], [""]),
        ({"minLength": 2, "maxLength": 60}, ["ab", "a" * 60], ["a", "a" * 61]),
        ({"minLength": 1, "maxLength": 255}, ["ab", "a" * 255], ["", "a" * 256]),
        ({"maxLength": 10_000}, ["", "a" * 9_000, "x\n</parameter> y"], ["a" * 10_001]),
        ({"minLength": 3, "maxLength": 4096}, ["abc", "\n" * 900], ["ab", ""]),
        (
            {"pattern": "^https?://", "maxLength": 2083},
            ["http://a", "https://b\n"],
            ["ftp://a", "http://" + "a" * 2083],
        ),
        ({"pattern": "^https?://"}, ["http://a", "https://b\n"], ["ftp://a"]),
        ({"pattern": "[0-9]", "maxLength": 99}, ["a5", "5\n"], ["a"]),
        ({"pattern": "^[^@]+@[^@]+$"}, ["a@b", "a\n@b"], ["a"]),
        ({"pattern": "^a$|^b$"}, ["a", "b"], ["ab"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_strings_end_where_their_tag_does(
    store: GrammarStore, name: str, limits: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    """Whatever else they may have in them: the model could never end the call."""
    schema = {"type": "object", "properties": {"x": {"type": "string", **limits}}, "required": ["x"]}
    matcher = compiled(store, form(name, "f", tools=[tool("f", schema)]))
    for value in good + bad:
        text = written(name, "f", {"x": value})
        assert accepts(matcher.deep_copy(), text) == (value in good), value
        assert not accepts(matcher.deep_copy(), text + "more")
