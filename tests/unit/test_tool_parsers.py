"""Tool calls in text: the formats as the model families document them, cut anywhere, and what is malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.parser.harmony import HarmonyParser
from minisgl.parser.parts import Parser, Part, calls_in
from minisgl.parser.tools import TOOL_PARSERS, ToolParser

ANY_TYPE = {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": ["integer", "null"]}}}
NAMES: dict[str, Any] = {"get_weather": {"properties": {"city": {"$ref": "#/$defs/Name"}}, "$defs": {"Name": {}}}}
NAMES["get_weather"]["$defs"]["Name"] = {"type": "string"}
NAMES.update({"get_time": None, "f": ANY_TYPE, "math.add": {"type": "object"}})
PARIS = {"city": "Paris"}
Result = tuple[str, list[tuple[str, Any]]]


def gathered(parts: list[Part]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and each call with its arguments as they are."""
    text = "".join(part.text for part in parts if part.kind == "text")
    calls: list[tuple[str, str]] = []
    for part in parts:
        if part.kind == "call":
            if part.name is not None:
                assert part.call_index == len(calls)
                calls.append((part.name, ""))
            assert part.call_index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return text, calls


def joined(parts: list[Part]) -> Result:
    """The text, and each call with its arguments read."""
    text, calls = gathered(parts)
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


def parts_of(parser: Parser, *texts: str) -> list[Part]:
    return [part for text in texts for part in parser.push(text)] + parser.finish()


def parse(parser: Parser, *texts: str) -> Result:
    return joined(parts_of(parser, *texts))


def parser_of(name: str | None, functions: dict[str, Any]) -> Parser:
    return HarmonyParser(functions) if name == "harmony" else ToolParser(name, functions)


def read(name: str, *texts: str) -> tuple[str, list[tuple[str, str]]]:
    return gathered(parts_of(parser_of(name, NAMES), *texts))


SEED = "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>"
HARMONY = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'
AGAIN = "<|end|><|start|>assistant"
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
MISTRAL = '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]'
CODER = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
GEMMA = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
WEATHER = ("get_weather", PARIS)
TIME = ("get_time", {})
END = "</tool_call>"


def coder(**arguments: str) -> str:
    written = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in arguments.items())
    return f"<tool_call>\n<function=f>\n{written}</function>\n</tool_call>"


def gemma(arguments: str) -> str:
    return f"<|tool_call>call:f{{{arguments}}}<tool_call|>"


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
    ("pythonic", "[f(x='''go('t(a) (1)')''', y='')]", "", [("f", {"x": "go('t(a) (1)')", "y": ""})]),
    ("pythonic", "[f(x={'k': (1, 2), 'l':(3,)}, y= -(1))]", "", [("f", {"x": {"k": [1, 2], "l": [3]}, "y": -1})]),
    ("pythonic", "[f(x={1:(2), 3: -(4)})]", "", [("f", {"x": {"1": 2, "3": -4}})]),
    # LFM2: Liquid's pages on tool use.
    ("lfm2", '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>I look.', "I look.", [WEATHER]),
    ("lfm2", "A <|tool_call_start|>[get_weather(city='Paris'), get_time()]<|tool_call_end|>", "A", [WEATHER, TIME]),
    ("lfm2", "<|tool_call_start|>[get_time()]", "", [TIME]),
    # OLMo 3: the chat template of the model.
    ("olmo3", '<function_calls>get_weather(city="Paris")</function_calls>', "", [WEATHER]),
    ("olmo3", '<function_calls>\nget_weather(\n city="Paris")\nget_time()</function_calls> A', " A", [WEATHER, TIME]),
    ("olmo3", "I look.\n<function_calls>get_time()", "I look.", [TIME]),
    # Granite 3 and Phi-4-mini: the chat template of the one, and the cookbook of the other.
    ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [WEATHER]),
    ("granite", '[{"name": "get_time", "arguments": {}}, {"name": "get_time", "arguments": {}}]', "", [TIME, TIME]),
    ("granite", '<tool_call>[{"name": "get_time", "arguments": {}}]', "", [TIME]),
    ("phi4_mini", '<|tool_call|>[{"name": "get_time", "arguments": {}}]<|/tool_call|>', "", [TIME]),
    ("phi4_mini", 'functools[{"name": "get_time", "arguments": {}}]', "", [TIME]),
    # GLM-4: the demonstration of its authors.
    ("glm4", 'get_weather\n{"city": "Paris"}', "", [WEATHER]),
    ("glm4", '\nget_weather\n{"city": "Paris"}\nget_time\n{}', "", [WEATHER, TIME]),
    ("glm4", "get_weather is what\nI would call", "get_weather is what\nI would call", []),
    # Seed-OSS: the chat template of the model.
    ("seed_oss", SEED, "", [WEATHER]),
    ("seed_oss", f"I look.\n{SEED}\n{SEED}", "I look.", [WEATHER, WEATHER]),
    # Gemma 4: the chat template of the model.
    ("gemma4", GEMMA, "", [WEATHER]),
    ("gemma4", f"I look.\n{GEMMA}<|tool_call>call:get_time{{}}<tool_call|>", "I look.", [WEATHER, TIME]),
    ("gemma4", GEMMA.removesuffix("<tool_call|>"), "", [WEATHER]),
    ("gemma4", gemma('a:-1.5,b:true,c:null,d:<|"|><|"|>'), "", [("f", {"a": -1.5, "b": True, "c": None, "d": ""})]),
    ("gemma4", gemma('s:<|"|>{a:"b", c:\nd}<|"|>,n:7'), "", [("f", {"s": '{a:"b", c:\nd}', "n": 7})]),
    ("gemma4", gemma('o:{k:[1,{<|"|>x y<|"|>:<|"|>é<|"|>}]}'), "", [("f", {"o": {"k": [1, {"x y": "é"}]}})]),
    ("gemma4", gemma('first name:1, b c : {d e:2}'), "", [("f", {"first name": 1, "b c": {"d e": 2}})]),
    ("gemma4", gemma('"a": "b, c: {d", e: 1'), "", [("f", {"a": "b, c: {d", "e": 1})]),
    # gpt-oss: OpenAI's description of the format, and what its chat template makes of calls.
    ("harmony", HARMONY, "", [WEATHER]),
    ("harmony", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}', "", [WEATHER]),
    ("harmony", f"{HARMONY}<|call|>{AGAIN} to=functions.get_time<|message|>{{}}", "", [WEATHER, TIME]),
    ("harmony", f"<|channel|>commentary<|message|>I look.{AGAIN}{HARMONY}<|call|>", "I look.", [WEATHER]),
    ("harmony", f"{HARMONY.replace('commentary', 'analysis')} \n<|end|>", "", [WEATHER]),
    ("harmony", HARMONY.replace("get_weather", "get_time").replace('{"city": "Paris"}', ""), "", [TIME]),
    ("harmony", HARMONY.replace("functions.get_weather", "browser.search"), '{"city": "Paris"}', []),
    ("harmony", f"<|channel|>final<|message|>One.{AGAIN}<|channel|>final<|message|>Two.<|return|>", "One.\n\nTwo.", []),
    ("harmony", "<|channel|>final <|constrain|>json<|message|>[1]<|return|>", "[1]", []),
    ("harmony", " No header at all", " No header at all", []),
    ("harmony", "too early", "too early", []),
    ("harmony", "<|channel|>fin", "", []),
    # Qwen3-Coder and Qwen3.5: the chat template of the model.
    ("qwen3_coder", CODER, "", [WEATHER]),
    ("qwen3_coder", f"I look.\n\n{CODER}\n{CODER}", "I look.", [WEATHER, WEATHER]),
    ("qwen3_coder", CODER.removeprefix("<tool_call>\n"), "", [WEATHER]),
    ("qwen3_coder", CODER.removesuffix("\n</tool_call>"), "", [WEATHER]),
    ("qwen3_coder", "<tool_call><function=get_time></function></tool_call> Ok", " Ok", [TIME]),
    ("qwen3_coder", coder(s=' a\n"b" <c> </d>\n', n="5"), "", [("f", {"s": ' a\n"b" <c> </d>\n', "n": 5})]),
    ("qwen3_coder", coder(s="5", n="None"), "", [("f", {"s": "5", "n": None})]),
    ("qwen3_coder", coder(n="many", x="True", y="[1, {}]"), "", [("f", {"n": "many", "x": True, "y": [1, {}]})]),
    ("qwen3_coder", coder(s="a").replace("\n</parameter>", "</parameter>"), "", [("f", {"s": "a"})]),
    ("qwen3_coder", coder(s="a", n="1").replace("\n</parameter>", ""), "", [("f", {"s": "a", "n": 1})]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), DOCUMENTED, ids=lambda value: str(value)[:50])
def test_documented_formats(name: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    assert parse(parser_of(name, NAMES), text) == (content, calls)
    assert parse(parser_of(name, NAMES), *text) == (content, calls)


MALFORMED = [
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>\nhello</tool_call> there"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": 5}</tool_call> and </tool_call> <tool_'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": ' + "[" * 100000 + "</tool_call>"),
    ("llama3_json", '{"name": "Ada", "born": 1815}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", "<|python_tag|>  "),
    ("llama3_json", 'The answer: {"name": "f", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] I cannot {do} that"),
    ("mistral", '[TOOL_CALLS]unknown[ARGS]{"a": 1}'),
    ("mistral", "[TOOL_CALLS]" + "x" * 1000),
    ("mistral", "[TOOL_CALLS][ARGS]{}"),
    ("qwen3_coder", CODER.replace("get_weather", "get_lost")),
    ("qwen3_coder", "<tool_call>\n<function="),
    ("qwen3_coder", "<function=f"),
    ("qwen3_coder", "<tool_call> a <function> b"),
    ("lfm2", "<|tool_call_start|>[nothing()]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>"),
    ("olmo3", "<function_calls>nothing()</function_calls>"),
    ("olmo3", "<function_calls>get_time(</function_calls>"),
    ("olmo3", "<function_calls>x = get_time()</function_calls>"),
    ("granite", "<|tool_call|> I cannot"),
    ("granite", '[{"name": "unknown", "arguments": {}}]'),
    ("phi4_mini", "functools is a module"),
    ("gemma4", GEMMA.replace("get_weather", "get_lost")),
    ("gemma4", gemma("a:b")),
    ("gemma4", gemma('a:<|"|>b')),
    ("gemma4", "<|tool_call>"),
    ("gemma4", gemma("a:" + "[" * 100000)),
    ("gemma4", gemma('<|"|>' * 30001)),
    ("glm4", "unknown\n{}"),
    ("glm4", "get_time"),
    ("seed_oss", SEED.replace("get_weather", "get_lost")),
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
    assert parse(parser_of(name, NAMES), text) == (text, [])
    if len(text) < 2000:
        assert parse(parser_of(name, NAMES), *text) == (text, [])


BEGUN = [
    ("hermes", HERMES[:-14], '{"city": "Paris"}', ""),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par', '{"city": "Par', ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 5</tool_call>', '{"x": 5</tool_call>', ""),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": [}]}</tool_call> a', '{"x": [}]', " a"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}</tool_call> a', "{}", " a"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, "id": "a"}</tool_call>', "{}", ""),
    ("llama3_json", '{"name": "f", "parameters": {', "{", ""),
    ("llama3_json", '{"name": "f", "parameters": {"a": "\n"}} a', '{"a": "\\n"}', " a"),
    ("mistral", "[TOOL_CALLS]f[ARGS]{", "{", ""),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]', '{"x": 1}', ""),
    ("harmony", HARMONY[:-4], '{"city": "Par', ""),
    ("harmony", HARMONY.replace('{"city": "Paris"}', "Paris\n"), "Paris\n", ""),
    ("harmony", HARMONY.replace("Paris", "a\n<|end|>"), '{"city": "a\\n<|end|>"}', ""),
    ("glm4", 'get_weather\n{"city": "Par', '{"city": "Par', ""),
    ("seed_oss", SEED[:-42], '{"city": "Paris', ""),
    ("qwen3_coder", coder(s="abc")[:-35], '{"s": "abc', ""),
    ("qwen3_coder", coder(s="a", n="12")[:-38], '{"s": "a", "n": ', ""),
]


@pytest.mark.parametrize(("name", "text", "arguments", "content"), BEGUN, ids=lambda value: str(value)[:50])
def test_a_call_that_has_begun_is_one_to_its_end(name: str, text: str, arguments: str, content: str) -> None:
    """As in OpenAI's API: it may be cut off by `max_tokens`, and a model may write what is no JSON."""
    called = "get_weather" if "get_weather" in text else "f"
    for pieces in ([text], list(text)):
        assert read(name, *pieces) == (content, [(called, arguments)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("hermes", HERMES), ("llama3_json", LLAMA), ("mistral", MISTRAL), ("qwen3_coder", CODER)),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'),
        *(("harmony", HARMONY), ("glm4", 'get_weather\n{"city": "Paris"}')),
    ],
)
def test_arguments_come_in_pieces(name: str, text: str) -> None:
    """The name first, and each piece as soon as it is there."""
    parser = parser_of(name, NAMES)
    assert parser.push(text[: text.index("Paris") + 3])[0] == Part("call", "", "get_weather")
    assert parser.push("is") == [Part("call", "is")]
    parser = parser_of(name, NAMES)
    parts = [part for piece in text for part in parser.push(piece)]
    assert parts[0] == Part("call", "", "get_weather") and len(parts) > 8
    assert not parser.finish()


def test_objects_that_are_no_calls_are_not_waited_for() -> None:
    """An answer in JSON is streamed, though calls are JSON as well."""
    for text in ('{"a', '{"answer": ', '{"name": "Ada"', "{ ", '{"name": 5', '{"name": ["', "{}"):
        assert joined(ToolParser("llama3_json", NAMES).push(text)) != ("", []) or text in ('{"a', "{ "), text
        assert read("llama3_json", text) == (text, [])


def test_text_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    parser = ToolParser("hermes", NAMES)
    assert joined(parser.push("a < b ")) == ("a < b", [])
    assert joined(parser.push("<tool")) == ("", [])
    assert joined(parser.push("box> ")) == (" <toolbox>", [])
    assert joined(parser.push("c")) == (" c", [])
    assert joined(parser.push(HERMES)) == ("", [WEATHER])  # at once, not at the end of the message


FRAGMENTS = {
    "hermes": ["<tool_call>", "</tool_call>", HERMES, '{"name": "f"', ', "arguments": {"x": "', '"}}', "<tool_"],
    "llama3_json": ["<|python_tag|>", LLAMA, ";", '{"name": "f"', ', "parameters": {"x": "', '"}}', "<|"],
    "mistral": ["[TOOL_CALLS]", MISTRAL, "[ARGS]", "[CALL_ID]", '[{"name": "f"', "}]", "f{", '{"x": "', '"}', "[TOOL"],
    "qwen3_coder": [
        "<tool_call>",
        "<function=f>",
        "<parameter=s>",
        "<parameter=n>",
        "</parameter>",
        "5",
        CODER,
        "</fun",
    ],
    "lfm2": ["<|tool_call_start|>", "<|tool_call_end|>", "[f(x=1)]", "[", "f(", "x='", "'", ")", "]", "<|tool_"],
    "olmo3": ["<function_calls>", "</function_calls>", "f(x=1)", "f(", "x='", "'", ")", "<func"],
    "granite": ["<|tool_call|>", '[{"name": "f"', ', "arguments": {"x": "', '"}}', "]", ",", "<|tool_", "<tool_call>"],
    "phi4_mini": [
        "<|tool_call|>",
        "<|/tool_call|>",
        '[{"name": "f"',
        ', "arguments": {',
        "}}",
        "]",
        "func",
        "functools",
    ],
    "gemma4": ["<|tool_call>", "<tool_call|>", "call:f{", "x:", '<|"|>', "}", "1", ",", GEMMA, "<|tool_"],
    "glm4": ["f", "get_time", "\n{", '{"x": "', '"}', "\n"],
    "seed_oss": [
        "<seed:tool_call>",
        "</seed:tool_call>",
        "<function=f>",
        "<parameter=s>",
        "</parameter>",
        SEED,
        "<seed:",
    ],
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
    whole = read(name, text)
    assert read(name, *pieces) == whole
    assert read(name, *text) == whole
    content, calls = whole
    if not calls:
        assert content == text
    assert all(called in NAMES and arguments[:1] in ("", "{") for called, arguments in calls)
    kept = iter(text)
    assert all(character in kept for character in content)  # nothing is made up, and the order is kept


@settings(deadline=None)
@given(st.sampled_from(sorted(TOOL_PARSERS)), st.lists(st.text(max_size=20), max_size=8))
def test_plain_text_stays_as_it_is(name: str, pieces: list[str]) -> None:
    assert parse(parser_of(name, NAMES), *pieces) == ("".join(pieces), [])


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
        assert parse(parser_of(name, NAMES), *text) == ("", calls)


IDENTIFIERS = st.from_regex(r"[a-z]{1,5}_", fullmatch=True)


@settings(deadline=None)
@given(st.dictionaries(IDENTIFIERS, VALUES, max_size=3))
def test_any_python_literals_come_through(arguments: dict[str, Any]) -> None:
    text = f"[f({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
    assert parse(ToolParser("pythonic", NAMES), *text) == ("", [("f", arguments)])


def test_python_that_is_no_list_is_no_call() -> None:
    assert calls_in("f(x=1)", NAMES, "python") is None
