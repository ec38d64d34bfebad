"""Grammars: what their masks allow is what they say, and one that costs too much harms nobody."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from tokenizers import Tokenizer

import minisgl
from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.source import VocabularyConfig
from minisgl.grammar.store import CompiledGrammar, GrammarStore
from minisgl.parser.tools import MAX_TEXT
from minisgl.server.bodies.sampling import MAX_CHOICES
from tests.schemas import schemas
from tests.tokenizers_fixture import make_byte_level

MODEL = Path(minisgl.__file__).parent / "demo_model"
EOS = 2
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
SPECIAL = {0, 1, 2}


@pytest.fixture(scope="module")
def store() -> Iterator[GrammarStore]:
    store = GrammarStore(VocabularyConfig(str(MODEL), 4096, (EOS,)))
    yield store
    store.close()


def compile_in(store: GrammarStore, kind: str, text: Any, **around: str) -> LLMatcher:
    text = text if isinstance(text, str) else json.dumps(text)
    return store.request(Grammar(kind, text, **around)).result().matcher.deep_copy()


def part(kind: str, text: Any) -> dict[str, Any]:
    """Of a form."""
    return {"kind": kind, "text": text if isinstance(text, str) else json.dumps(text), "whitespace": "compact"}


def allowed(matcher: LLMatcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()  # type: ignore[no-any-return]


def walk(matcher: LLMatcher, rng: random.Random, limit: int = 400) -> str | None:
    """A random output; None when it is longer than `limit`. Special tokens but the end are never allowed."""
    ids: list[int] = []
    while len(ids) < limit:
        choices = allowed(matcher)
        assert choices, "nothing is allowed"
        if EOS in choices and (len(choices) < 3 or rng.random() < 0.5):
            return TOKENIZER.decode(ids, skip_special_tokens=False)
        token = rng.choice([token for token in choices if token != EOS])
        assert token not in SPECIAL
        assert matcher.consume_token(token), matcher.get_error()
        ids.append(token)
    return None


def accepts(matcher: LLMatcher, text: str) -> bool:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


SLOW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def test_what_ends_may_be_a_special_token(store: GrammarStore) -> None:
    forms = [{"until": "<|im_start|>"}, {**part("grammar", "start: V\nV: /[a-z ]{1,12}/"), "then": "<|im_start|>"}]
    for form in forms:
        matcher = compile_in(store, "form", ["a", form, "b"])
        assert accepts(matcher.deep_copy(), "a quick fox<|im_start|>b")
        assert not accepts(matcher.deep_copy(), "a quick foxb")
        assert not accepts(matcher, "a<|im_start|><|im_start|>b")


@SLOW
@given(schema=schemas(), seed=st.integers(0, 1000))
def test_every_output_validates(store: GrammarStore, schema: dict[str, Any], seed: int) -> None:
    text = walk(compile_in(store, "json", schema), random.Random(seed))
    if text is not None:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


LEAVES = [
    ({"type": "integer"}, st.integers()),
    ({"type": "number"}, st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 3))),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "string"}, st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)),
    ({"enum": ["größe", "b"]}, st.sampled_from(["größe", "b"])),
    ({"type": "array", "items": {"type": "null"}}, st.lists(st.none(), max_size=3)),
]


@SLOW
@given(data=st.data())
def test_every_object_is_allowed(store: GrammarStore, data: st.DataObject) -> None:
    """In the schema's order of properties, compact, or pretty where whitespace may stand anywhere."""
    fields = data.draw(st.lists(st.sampled_from(LEAVES), max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    value = {}
    for index, (leaf, values) in enumerate(fields):
        schema["properties"][f"f{index}"] = leaf
        if data.draw(st.booleans()):
            schema["required"].append(f"f{index}")
        if f"f{index}" in schema["required"] or data.draw(st.booleans()):
            value[f"f{index}"] = data.draw(values)
    jsonschema.validate(value, schema)
    compact = [json.dumps(value, ensure_ascii=False, separators=(",", space)) for space in (":", ": ")]
    for text in (*compact, json.dumps(value, ensure_ascii=False), json.dumps(value, ensure_ascii=False, indent=2)):
        assert accepts(compile_in(store, "json", schema, whitespace="any"), text), text
        assert accepts(compile_in(store, "json", schema), text) == ("\n" not in text), text


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("regex", r"\d{3}-[a-z]+", "123-abc", "12-abc"),
        ("choice", ["yes", "no", "a <tool_call>"], "a <tool_call>", "maybe"),
        ("grammar", 'start: "a" | "b" X\nX: /[0-9]+/', "b12", "b"),
        ("grammar", 'root ::= "a" | "b" x\nx ::= [0-9]+', "b12", "b"),
        ("json", {"type": "object"}, '{"any":["thing"]}', "[]"),
        ("json", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, '"s"', "null"),
    ],
)
def test_kinds(store: GrammarStore, kind: str, text: Any, good: str, bad: str) -> None:
    assert accepts(compile_in(store, kind, text), good)
    assert not accepts(compile_in(store, kind, text), bad)


def test_as_many_choices_as_there_may_be(store: GrammarStore) -> None:
    choices = [f"c{index}" for index in range(MAX_CHOICES)]
    assert accepts(compile_in(store, "choice", choices), choices[-1])


def test_text_around(store: GrammarStore) -> None:
    """The marks of a tool call are the model's own tokens for them."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = ["<tool_call>\n", part("json", schema), "\n</tool_call>"]
    assert accepts(compile_in(store, "form", form), '<tool_call>\n{"a":1}\n</tool_call>')
    assert allowed(compile_in(store, "form", form)) == [TOKENIZER.token_to_id("<tool_call>")]


@pytest.mark.parametrize("call", [False, True])
@pytest.mark.parametrize("kind", ["json", "regex", "choice"])
def test_reasoning_comes_before_the_answer(store: GrammarStore, kind: str, call: bool) -> None:
    text: Any = {"json": {"const": {"a": 1}}, "regex": r"\{\"a\":1\}", "choice": ['{"a":1}', "b"]}[kind]
    answer = '{"a":1}'
    if call:
        kind, text = "form", ["<tool_call>\n", part(kind, text), "\n</tool_call>"]
        answer = f"<tool_call>\n{answer}\n</tool_call>"
    optional = compile_in(store, kind, text, reasoning="optional <think> </think>")
    always = compile_in(store, kind, text, reasoning="always <think> </think>")
    thought = 'so {"a": 0}?\n größer 🙂\n' * 50 + "</think>"
    for tagged in (f"<think>\n{thought}\n\n", "<think></think>", "<think>\n\n</think>\n\n"):
        assert accepts(optional.deep_copy(), tagged + answer)
        assert accepts(always.deep_copy(), tagged + answer)
        assert not accepts(optional.deep_copy(), tagged)
        assert not accepts(optional.deep_copy(), tagged + "no")
    assert accepts(optional.deep_copy(), answer)
    assert not accepts(optional.deep_copy(), thought + answer)
    assert not accepts(always.deep_copy(), answer)
    assert accepts(always.deep_copy(), thought + answer)
    assert EOS not in allowed(always)


def test_reasoning_tags_that_are_no_tokens(tmp_path: Path) -> None:
    """They are found in the text then, at the first place where it has them."""
    model = make_byte_level(tmp_path)
    store, tokenizer = (
        GrammarStore(VocabularyConfig(str(model), 400, (2,))),
        Tokenizer.from_file(f"{model}/tokenizer.json"),
    )
    try:
        for reasoning, head in (("always", "so </thin"), ("optional", "<think>so ")):
            matcher = compile_in(store, "choice", ["yes", "no"], reasoning=f"{reasoning} <think> </think>")
            for text, good in ((f"{head}</think>\nyes", True), (f"{head}</think>x", False), (f"{head}yes", False)):
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                trial = matcher.deep_copy()
                assert (trial.try_consume_tokens(ids) == len(ids) and trial.is_accepting()) is good, text
    finally:
        store.close()


def test_several_of_them(store: GrammarStore) -> None:
    """Parallel tool calls."""
    call = '<tool_call>\n{"a":1}\n</tool_call>'
    once = ["<tool_call>\n", part("json", {"type": "object", "properties": {"a": {"const": 1}}}), "\n</tool_call>"]
    matcher = compile_in(store, "form", {"many": once, "between": "\n"})
    assert accepts(matcher.deep_copy(), call)
    assert accepts(matcher.deep_copy(), f"{call}\n{call}\n{call}")
    assert not accepts(matcher.deep_copy(), f"{call}{call}")
    assert not accepts(matcher.deep_copy(), f"{call}\n")


def test_added_tokens_in_strings(store: GrammarStore) -> None:
    """Prescribed strings that look like tokens can be written: the mask never allows what cannot be taken."""
    rng = random.Random(0)
    assert walk(compile_in(store, "json", {"const": "a <tool_call> <|im_end|>"}), rng) == '"a <tool_call> <|im_end|>"'


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("json", '{"type": "strin"}', "Invalid type: strin"),
        ("json", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json", '{"enum": []}', "Unsatisfiable"),
        ("json", "{", "not valid JSON"),
        ("regex", "(a", "regex"),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", 'start: "a" | "b" X', 'unknown name: "X"'),
        ("grammar", 'root ::= (("a"', "Expected"),
        ("grammar", 'x ::= "a"', "No 'root' rule"),
        ("grammar", "root ::= x", "Rule 'x' not found"),
        ("grammar", "root ::= " + "x" * 100_000, "Rule 'xxx"),
        ("regex", "(" * 50_000 + "a" + ")" * 50_000, "invalid regex"),
        ("json", '{"$ref": "#"}', "nothing matches"),
    ],
)
def test_invalid(store: GrammarStore, kind: str, text: str, why: str) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(RequestError) as caught:
            store.request(Grammar(kind, text, param="here")).result()
        assert caught.value.param == "here" and caught.value.status == 400
        assert str(caught.value).startswith("here: ") and why in str(caught.value), str(caught.value)
        assert len(str(caught.value)) < 600


def _chain(count: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(count)) + f'r{count}: "a"'


PATHOLOGICAL = {
    "stack": ("grammar", _chain(20_000)),
    "nesting": ("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "schema nesting": ("json", '{"items":' * 5000 + "{}" + "}" * 5000),
    "time": ("json", '{"type": "integer", "multipleOf": 9999991, "minimum": 0}'),
    "size": ("json", json.dumps({"enum": [f"value number {i}" for i in range(150_000)]})),
    "references": (
        "json",
        json.dumps(
            {
                "$ref": "#/$defs/d0",
                "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{(i + 1) % 3000}"}, {}]} for i in range(3000)},
            }
        ),
    ),
}


def test_pathological_ones_end_within_seconds(store: GrammarStore) -> None:
    """All of them at once, and a sane one behind them."""
    compile_in(store, "regex", "[ab]")
    futures = {name: store.request(Grammar(*source)) for name, source in PATHOLOGICAL.items()}
    assert accepts(compile_in(store, "regex", "[abc]"), "c")
    assert not wait(futures.values(), 100).not_done, "however busy the machine is"
    for name, future in futures.items():
        assert isinstance(future.exception(), RequestError), name
    assert "3 s" in str(futures["time"].exception())
    assert "nested" in str(futures["stack"].exception())
    assert "too deeply nested" in str(futures["nesting"].exception())


def test_compiled_once(store: GrammarStore) -> None:
    grammar = Grammar("regex", "[0-9]{1,7}")
    first, second = store.request(grammar), store.request(Grammar("regex", "[0-9]{1,7}", param="other"))
    assert first.result() is second.result() is store.request(grammar).result()


def test_the_oldest_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not while a request holds them."""
    monkeypatch.setattr("minisgl.grammar.store.MAX_STORED", 1)
    store = GrammarStore(VocabularyConfig(str(MODEL), 4096, (EOS,)))
    grammars = [Grammar("regex", f"a{{{count}}}") for count in (1, 2, 3)]
    held = store.request(grammars[0]).result()
    for grammar in grammars[1:]:
        store.request(grammar).result()
    assert store.request(grammars[0]).result() is held
    assert not store.request(grammars[1]).done(), "it is compiled again"
    store.close()


def test_a_model_without_a_usable_tokenizer_refuses(tmp_path: Path) -> None:
    store = GrammarStore(VocabularyConfig(str(tmp_path), 4096, (EOS,)))
    with pytest.raises(RequestError, match=r"tokenizer\.json") as caught:
        store.request(Grammar("regex", "a", param="guided_regex")).result()
    assert caught.value.param == "guided_regex"
    store.close()


def test_matchers_are_independent(store: GrammarStore) -> None:
    first, second = (compile_in(store, "regex", "a{3}") for _ in range(2))
    before = allowed(second)
    assert first.consume_token(allowed(first)[0])
    assert allowed(second) == before


@pytest.mark.parametrize("text", ['{"a":1,"b":[2,3]}', '{"a": 1, "b": [2, 3]}', '{"a":1, "b":[2,3]}'])
def test_json_has_no_room_for_blanks(store: GrammarStore, text: str) -> None:
    """A weak model would fill its tokens with them. One after a comma or colon is what models have learnt to write."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}}
    compact, free = (compile_in(store, "json", schema, whitespace=name) for name in ("compact", "any"))
    assert accepts(compact.deep_copy(), text) and accepts(free.deep_copy(), text)
    for more in (text.replace(",", ",  ", 1), text.replace(":", " :", 1), text.replace("{", "{\n"), text[:-1] + " }"):
        assert not accepts(compact.deep_copy(), more)
        assert accepts(free.deep_copy(), more)
    assert not accepts(free, "{" + " " * 33 + text[1:])


def _large(number: int, store: GrammarStore) -> None:
    choices = [f"{number} {index} and then some more" for index in range(MAX_CHOICES)]
    store.request(Grammar("choice", json.dumps(choices))).result()


def test_what_is_held_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the process stays where it is, however many large grammars come."""
    monkeypatch.setattr("minisgl.grammar.store.MAX_STORED_BYTES", 40 << 20)
    store = GrammarStore(VocabularyConfig(str(MODEL), 4096, (EOS,)))
    try:
        for number in range(8):
            _large(number, store)
        process = psutil.Process()
        before = process.memory_info().rss
        for number in range(8, 22):  # of 8 MB each: more than 100 MB
            _large(number, store)
        assert process.memory_info().rss - before < 40 << 20
    finally:
        store.close()


def test_the_number_of_grammars_is_bounded_too(store: GrammarStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.grammar.store.MAX_STORED", 2)
    grammars = [Grammar("regex", f"b{{{count}}}") for count in (1, 2, 3)]
    for grammar in grammars:
        store.request(grammar).result()
    assert store.request(grammars[2]).done() and store.request(grammars[1]).done()
    assert not store.request(grammars[0]).done()


def test_grammars_in_use_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of requests are not given up, so new ones are refused until some of them end."""
    monkeypatch.setattr("minisgl.grammar.store.MAX_STORED_BYTES", 0)
    store = GrammarStore(VocabularyConfig(str(MODEL), 4096, (EOS,)))
    try:
        held = [store.request(Grammar("regex", "c{1}")).result()]
        with pytest.raises(RequestError) as caught:
            store.request(Grammar("regex", "c{2}", param="here")).result()
        assert (caught.value.status, caught.value.param, caught.value.retry_after) == (503, "here", 5)
        held.clear()
        assert store.request(Grammar("regex", "c{3}")).exception() is None
    finally:
        store.close()


@pytest.mark.parametrize("kill", [False, True])
def test_a_compiler_that_is_stopped_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch, kill: bool) -> None:
    store = GrammarStore(VocabularyConfig(str(MODEL), 4096, (EOS,)))
    try:
        before = psutil.Process().children()
        store.request(Grammar("regex", "d{1}")).result()
        monkeypatch.setattr("minisgl.grammar.store.TRIAL_SECONDS", 1.0)
        (process,) = (child for child in psutil.Process().children() if child not in before)
        process.send_signal(signal.SIGSTOP)
        future = store.request(Grammar("regex", "d{2}"))
        if kill:
            time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
        error = future.exception(60)
        assert isinstance(error, RequestError) and (error.status, error.retry_after) == (503, 5)
        monkeypatch.setattr("minisgl.grammar.store.TRIAL_SECONDS", 100.0)
        assert accepts(store.request(Grammar("regex", "d{2}")).result().matcher.deep_copy(), "dd"), "it was forgotten"
    finally:
        store.close()


@pytest.fixture
def gate(store: GrammarStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is compiled before it is set: however long it takes to ask."""
    event, compile_one = threading.Event(), store._compile

    def behind(grammar: Grammar) -> CompiledGrammar | RequestError:
        event.wait()
        return compile_one(grammar)

    monkeypatch.setattr(store, "_compile", behind)
    yield event
    event.set()


def test_clients_take_turns(store: GrammarStore, gate: threading.Event) -> None:
    """One that asks for forty large grammars keeps another one waiting for one of them at most."""
    order: list[str] = []
    many = []
    texts = [json.dumps([f"{number} {index}: any text" for index in range(1000)]) for number in range(40)]
    for text in texts:
        many.append(store.request(Grammar("choice", text), "greedy"))
        many[-1].add_done_callback(lambda _: order.append("greedy"))
    for client in ("first", "second"):
        store.request(Grammar("regex", f"{client}[0-9]{{4}}"), client).add_done_callback(
            lambda _: order.append("small")
        )
    gate.set()
    wait(many)
    assert [index for index, who in enumerate(order) if who == "small"][-1] < 8


def test_one_client_has_so_many_in_the_queue(
    store: GrammarStore, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.grammar.store.MAX_WAITING", 3)
    futures = [store.request(Grammar("regex", f"(ef){{{count}}}", param="here"), "greedy") for count in range(1, 30)]
    other = store.request(Grammar("regex", "(ef)+"), "other")
    gate.set()
    errors = [error for future in futures if (error := future.exception()) is not None]
    assert len(errors) == 29 - 1 - 3, "one of them is compiled, and three wait"
    assert {(error.status, error.param, error.retry_after) for error in errors} == {(429, "here", 5)}  # type: ignore[attr-defined]
    assert other.exception() is None


def test_the_compiler_imports_nothing_from_where_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psutil", "json", "llguidance", "minisgl"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m minisgl` has it
    store = GrammarStore(VocabularyConfig(str(MODEL), 4096, (EOS,)))
    try:
        assert accepts(compile_in(store, "regex", "[ab]"), "a")
    finally:
        store.close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("count", [1, MAX_CHOICES])
def test_stated_maxima(store: GrammarStore, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is as large as may be is served, or is a 400."""
    monkeypatch.setattr("minisgl.grammar.store.TRIAL_SECONDS", 200.0)  # by a clock that other work makes fast
    room = MAX_TEXT // count - len('"", ')
    longest = json.dumps([f"{index:0{room}}" for index in range(count)])
    assert len(longest) <= MAX_TEXT
    nested = '{"items":' * 20_000 + "{}" + "}" * 20_000
    regex = "(" + "a?" * (MAX_TEXT // 2 - 1) + ")"
    for kind, text in (("choice", longest), ("json", nested), ("regex", regex), ("regex", "x" * MAX_TEXT)):
        error = store.request(Grammar(kind, text, param="here")).exception()
        assert error is None or (isinstance(error, RequestError) and error.status == 400), (kind, error)
