"""JSON schemas as clients write them: what is closed, what is an annotation, what means the same, what is refused."""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import ipaddress
import itertools
import json
import pathlib
import random
import uuid
from typing import Annotated, Any, Literal, Union

import jsonschema
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.schema import followed
from minisgl.grammar.store import GrammarStore
from tests.schemas import NAMES, schemas
from tests.unit.test_grammar import accepts, compile_in, store, walk

__all__ = ["store"]


def takes(store: GrammarStore, schema: Any, value: Any) -> bool:
    return accepts(compile_in(store, "json", schema), json.dumps(value, ensure_ascii=False, separators=(",", ":")))


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}}
DEFS = {"$defs": {"A": A, "B": B}}
REF_A, REF_B = {"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}
REF_X = {"$ref": "#/properties/x/anyOf/0"}
A1, AB, AC, BA = {"a": 1}, {"a": 1, "b": 2}, {"a": 1, "c": 2}, {"b": 2, "a": 1}
CLOSED: list[tuple[Any, list[Any], list[Any]]] = [
    (A, [A1], [AC, {}]),
    ({"properties": {}}, [{}], [A1]),
    ({"type": "object", "properties": {"x": A}}, [{"x": A1}, {}], [{"x": AC}, {"y": 1}]),
    ({"type": "array", "items": A}, [[], [A1]], [[AC]]),
    ({"type": "array", "prefixItems": [A], "minItems": 1, "maxItems": 1}, [[A1]], [[AC]]),
    ({"type": "object", "additionalProperties": A}, [{"x": A1}, {}], [{"x": AC}]),
    ({"type": "object", "patternProperties": {"^x": A}}, [{"x1": A1}], [{"x1": AC}, {"y": A1}]),
    ({"anyOf": [A, {"type": "null"}]}, [A1, None], [AC]),
    ({"oneOf": [A, {"type": "string"}]}, [A1, "x"], [AC]),
    ({**REF_A, **DEFS, "description": "x", "default": None}, [A1], [AC]),
    ({"type": "object", "properties": {"x": REF_A}, **DEFS}, [{"x": A1}], [{"x": AC}]),
    ({"allOf": [REF_A], **DEFS}, [A1], [AC]),
    # What is required and not described is any value, behind the others.
    ({**B, "required": ["a", "b"]}, [{"b": 2, "a": "x"}, {"b": 2, "a": [A1]}], [{"b": 2}, {"b": 2, "a": 1, "c": 3}]),
    ({"properties": {"x": {**B, "required": ["a"]}}}, [{"x": {"b": 2, "a": 1}}, {"x": A1}], [{"x": {"b": 1}}]),
    # Open on purpose.
    ({"type": "object"}, [{}, AC], [1]),
    ({**A, "additionalProperties": True}, [A1, AC], [{}]),
    ({**A, "additionalProperties": {}}, [A1, AC], [{}]),
    ({**A, "additionalProperties": {"type": "integer"}}, [A1, AC], [{"a": 1, "c": "x"}]),
    ({"type": "object", "properties": {"x": {"type": "object"}}}, [{"x": AC}], []),
    ({**A, "additionalProperties": None}, [A1], [AC]),
    # However references are written, and wherever definitions are.
    ({"$ref": "#/definitions/Page%3CA%3E", "definitions": {"Page<A>": A}}, [A1], [AC, {"a": "x"}, 1]),
    ({"$ref": "#/definitions/Page<A>", "definitions": {"Page<A>": A}}, [A1], [AC, {"a": "x"}, 1]),
    ({"$ref": "#/components/schemas/A", "components": {"schemas": {"A": A}}}, [A1], [AC, {"a": "x"}]),
    ({"$id": "http://x/y.json", "$ref": "y.json#/$defs/A", **DEFS}, [A1], [AC, {"a": "x"}]),
    ({"$id": "http://x/y.json", "$ref": "http://x/y.json#/$defs/A", **DEFS}, [A1], [AC, {"a": "x"}]),
    ({**A, "schemas": "1.0", "components": ["x"]}, [A1], [AC]),  # which are keywords of nobody here
    ({"$ref": "#a", "$defs": {"A": {"$anchor": "a", **A}}}, [A1], [AC, {"a": "x"}]),
    ({"properties": {"x": {"$id": "http://x/x", **REF_A, **DEFS}}}, [{"x": A1}], [{"x": AC}, {"x": {"a": "x"}}]),
    # Compositions: by the names of all parts.
    ({"allOf": [A, B]}, [A1, AB], [AC, {"b": 1}, {"a": 1, "b": "x"}]),
    ({"allOf": [REF_A, REF_B], **DEFS}, [A1, AB], [AC]),
    ({**REF_A, **DEFS, "properties": {"b": {"type": "integer"}}}, [A1, AB], [AC, {"a": 1, "b": "x"}]),
    ({**B, "allOf": [REF_A], **DEFS}, [A1, BA], [AC, AB]),
    ({**B, "anyOf": [A, {"properties": {"c": {}}, "required": ["c"]}]}, [A1, BA, {"c": 1}], [{}, {"a": 1, "d": 1}, AB]),
    ({"allOf": [REF_B, REF_A], **DEFS}, [A1, BA], [AB]),  # in the order of the schema
    ({"properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, [AB, A1], [{}, AC]),
    ({"allOf": [{"properties": {"x": A}}, {"properties": {"x": B}}]}, [{"x": AB}], [{"y": 1}]),
    ({"allOf": [A, {**B, "additionalProperties": True}]}, [AB, AC], [{}]),
    ({"allOf": [{"allOf": [REF_A, REF_B]}, {"properties": {"c": {}}}], **DEFS}, [{**AB, "c": 1}], [{**AB, "d": 1}]),
    ({"allOf": [A, B], "unevaluatedProperties": False}, [AB], [AC]),
    ({**A, "unevaluatedProperties": False}, [A1], [AC]),
    ({"properties": {"x": {"anyOf": [A, {}]}, "y": {"allOf": [REF_X, B]}}}, [{"y": AB}], []),
    # A part of a composition elsewhere: open there, and therefore here.
    ({"properties": {"x": REF_A, "y": {"allOf": [REF_A, REF_B]}}, **DEFS}, [{"x": A1, "y": AB}], [{"y": AC}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CLOSED, ids=lambda value: str(value)[:60])
def test_objects_are_closed_where_the_schema_does_not_say(
    store: GrammarStore, schema: Any, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        jsonschema.validate(value, schema if schema.get("additionalProperties", 0) is not None else A)
        assert takes(store, schema, value), value
    for value in bad:
        assert not takes(store, schema, value), value


SECRET = {"x-guidance": {"lenient": True, "whitespace_flexible": True, "item_separator": ";"}}


@pytest.mark.parametrize(
    "schema", [{**A, **SECRET}, {"anyOf": [{**A, **SECRET}]}, {**REF_A, "$defs": {"A": {**A, **SECRET}}}]
)
def test_options_of_the_compiler_are_not_for_clients(store: GrammarStore, schema: Any) -> None:
    matcher = compile_in(store, "json", schema)
    assert accepts(matcher.deep_copy(), '{"a":1}') and not accepts(matcher, '{"a":\n1}')
    with pytest.raises(RequestError, match="uniqueItems"):
        compile_in(store, "json", {**schema, "uniqueItems": True})
    assert takes(store, {"properties": {"x-guidance": {"type": "integer"}}}, {"x-guidance": 1})


ANNOTATIONS = [
    *(
        {"format": name}
        for name in ("path", "file-path", "password", "binary", "regex", "int32", "phone", "", "unknown")
    ),
    *(
        {key: "x"}
        for key in ("$comment", "title", "description", "contentEncoding", "contentMediaType", "x-order", "xml")
    ),
    *({key: True} for key in ("deprecated", "readOnly", "writeOnly", "nullable", "x-internal")),
    {"default": {"uniqueItems": True}},
    {"examples": [{"not": {}}]},
    {"example": "x"},
    {"contentSchema": {"uniqueItems": True}},
    {"discriminator": {"propertyName": "kind"}},
    {"uniqueItems": False},
    {"then": {}, "else": {}, "minContains": 1},
    {"dependentRequired": {}, "propertyNames": True, "unevaluatedProperties": {}},
    {"minLength": None, "pattern": None, "not": None, "format": None},
    {"$id": "https://example.com/x", "$schema": "http://json-schema.org/draft-07/schema#", "$anchor": "a"},
    {"$defs": {"Unused": {"uniqueItems": True}}},
]


@pytest.mark.parametrize("more", ANNOTATIONS, ids=str)
def test_annotations_say_nothing(store: GrammarStore, more: dict[str, Any]) -> None:
    for value in ("", "any text"):
        assert takes(store, {"type": "string", **more}, value)
        if not more.keys() & {"$id", "$defs"}:
            assert takes(store, {"type": "object", "properties": {"x": {"type": "string", **more}}}, {"x": value})


REFUSED: list[tuple[Any, str]] = [
    (
        {"properties": {"tags": {"type": "array", "uniqueItems": True}}},
        "uniqueItems is not supported (at properties.tags)",
    ),
    ({"type": "array", "items": {"not": {"type": "null"}}}, "not is not supported (at items)"),
    ({"anyOf": [A, {"if": A, "then": B}]}, "if is not supported (at anyOf.1)"),
    ({"properties": {"x": REF_A}, "$defs": {"A": {"contains": {}}}}, "contains is not supported (at $defs.A)"),
    (
        {"properties": {"x": {"dependentRequired": {"a": ["b"]}}}},
        "dependentRequired is not supported (at properties.x)",
    ),
    ({"properties": {"x": {"propertyNames": {"format": "zip"}}}}, "propertyNames is not supported (at properties.x)"),
    ({"propertyNames": {"minLength": 2}}, "propertyNames is not supported"),
    ({"properties": {"x": 5}}, "a schema must be an object, not 5 (at properties.x)"),
    ({"properties": {"x": {"properties": []}}}, "properties must be an object (at properties.x)"),
    ({"properties": {"x": {"anyOf": {}}}}, "anyOf must be a list (at properties.x)"),
    ({"properties": {"x": {"required": "a"}}}, "required must be a list (at properties.x)"),
    ({"properties": {"a": {}, "x": {"items": {"type": "strin"}}}}, "Invalid type: strin (at properties.x.items)"),
    (
        {"properties": {"x": {"properties": {"y": {"pattern": "(?=a)"}}}}},
        "not supported (at properties.x.properties.y)",
    ),
    ({"properties": {"x": {"pattern": "("}}}, "(at properties.x)"),
    ({"properties": {"x": {"$ref": "#/$defs/None"}}}, "(at properties.x)"),
    ({"properties": {"x": {"minLength": -1}}}, "(at properties.x)"),
    ({"properties": {"x": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}, "(at properties.x)"),
    ({"properties": {"x": {"properties": {"a": {}, "b": {}}, "minProperties": 2}}}, "(at properties.x)"),
    ({"uniqueItems": True}, "here: uniqueItems is not supported"),
]


@pytest.mark.parametrize(("schema", "why"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_refusal_says_where(store: GrammarStore, schema: Any, why: str) -> None:
    with pytest.raises(RequestError) as caught:
        store.request(Grammar("json", json.dumps(schema), param="here")).result()
    assert (caught.value.status, caught.value.param) == (400, "here")
    assert str(caught.value).startswith("here: ") and str(caught.value).endswith(why), str(caught.value)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Tree(BaseModel):
    """Recursive."""

    leaf: bool
    children: list[Tree] = []


Pet = Annotated[Union[Cat, Dog], Field(discriminator="kind")]  # noqa: UP007
V4 = ipaddress.IPv4Address("10.1.2.3")
VALUES: list[tuple[Any, Any]] = [
    *((getattr(pydantic, f"UUID{v}"), uuid.UUID(f"12345678-1234-{v}234-9234-123456789abc")) for v in (1, 3, 4, 5)),
    *((getattr(pydantic, f"UUID{v}"), uuid.UUID(f"12345678-1234-{v}234-9234-123456789abc")) for v in (6, 7, 8)),
    (uuid.UUID, uuid.UUID(int=5, version=4)),
    (pathlib.Path, pathlib.Path("/tmp/x")),
    (pydantic.NewPath, pathlib.Path("/nowhere/x")),
    (ipaddress.IPv4Address, V4),
    (ipaddress.IPv6Address, ipaddress.IPv6Address("2001:db8:1:2:3:4:5:6")),
    (ipaddress.IPv4Interface, ipaddress.IPv4Interface("10.1.2.3/24")),
    (ipaddress.IPv6Interface, ipaddress.IPv6Interface("2001:db8:1:2:3:4:5:6/64")),
    *((ipaddress.IPv4Network, ipaddress.IPv4Network(net)) for net in ("10.0.0.0/8", "10.1.2.0/24", "10.1.2.3/32")),
    (ipaddress.IPv6Network, ipaddress.IPv6Network("2001:db8:1:2::/64")),
    (pydantic.IPvAnyAddress, V4),
    (pydantic.Base64Bytes, b"hello"),
    (pydantic.Base64UrlStr, "hello?"),
    (pydantic.Json[list[int]], [1, 2]),
    (bytes, b"x"),
    (pydantic.AnyUrl, pydantic.AnyUrl("https://example.com/a?b=c")),
    (datetime.timedelta, datetime.timedelta(days=1)),
    (datetime.datetime, datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)),
    (datetime.date, datetime.date(2026, 1, 2)),
    (datetime.time, datetime.time(1, 2, 3, tzinfo=datetime.timezone.utc)),
    (decimal.Decimal, decimal.Decimal("1.25")),
    (tuple[int, str], (1, "a")),
    (dict[str, int], {"x": 1}),
    (dict[Colour, int], {Colour.RED: 1}),
    (dict[Literal["a", "b"], int], {"a": 1, "b": 2}),
    (dict[datetime.date, int], {datetime.date(2026, 1, 2): 3}),
    (dict[Annotated[str, Field(pattern="^x")], int], {"x1": 1}),
    (dict[uuid.UUID, Cat], {uuid.UUID(int=5, version=4): Cat(kind="cat", lives=9)}),
    (Pet, Dog(name="Rex")),
    (list[Pet], [Cat(kind="cat", lives=9), Dog(name="Rex")]),
    (Pet | None, None),
    (Tree, Tree(leaf=False, children=[Tree(leaf=True)])),
    (Annotated[int, Field(multiple_of=3, gt=0)], 6),
    (Annotated[list[int], Field(min_length=1, max_length=2)], [1]),
    (Colour | int | None, Colour.BLUE),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=lambda value: str(value)[:40])
def test_types_of_pydantic_are_followed(store: GrammarStore, kind: Any, value: Any) -> None:
    adapter = TypeAdapter(kind)
    if value == [1, 2]:
        text = '"[1,2]"'
    elif kind in (pydantic.Base64Bytes, pydantic.Base64UrlStr):
        encode = base64.b64encode if value == b"hello" else base64.urlsafe_b64encode
        text = json.dumps(encode(value if isinstance(value, bytes) else value.encode()).decode())
    else:
        text = adapter.dump_json(value).decode()
    schema = adapter.json_schema()
    matcher = compile_in(store, "json", schema)
    assert accepts(matcher.deep_copy(), text), text
    any_text = {"type": "string"} in schema.get("anyOf", ())  # as newer versions have it for decimals
    if kind in (bytes, pydantic.NewPath, pathlib.Path) or value == [1, 2] or any_text:
        return  # of these any text matches
    for seed in range(5):
        made = walk(matcher.deep_copy(), random.Random(seed), 120)
        if made is not None:
            adapter.validate_json(made)


def test_what_older_libraries_write(store: GrammarStore) -> None:
    """pydantic's decimals with a look-ahead, and the limits of draft 4."""
    number = {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}
    for text, good in (("1.5", True), ("-.5", True), ("+", False), ("", False), (".", False), ("1,5", False)):
        assert takes(store, number, text) == good, text
    limits = {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 3, "exclusiveMaximum": False}
    assert [value for value in range(5) if takes(store, limits, value)] == [2, 3]


def test_what_zod_writes(store: GrammarStore) -> None:
    """Patterns with look-around beside their formats, and what the names of a record are. A null is no keyword."""
    pattern = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    for text, good in (("a@b.cd", True), ("a", False)):
        assert takes(store, {"type": "string", "format": "email", "pattern": pattern, "enum": None}, text) == good
    record = {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}}
    assert takes(store, record, {"a": 1}) and not takes(store, record, {"a": "b"})


def test_branches_told_apart(store: GrammarStore) -> None:
    """`oneOf` with references, as of discriminated unions, by `discriminator` or what is required."""
    defs = {
        "A": {"properties": {"t": {"const": "a"}, "x": {"type": "integer"}}, "required": ["t"]},
        "B": {"properties": {"t": {"enum": ["b", "c"]}}, "required": ["t"]},
    }
    schema = {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": defs}
    assert takes(store, schema, {"t": "a", "x": 1}) and takes(store, schema, {"t": "c"})
    assert not takes(store, schema, {"t": "b", "x": 1}) and not takes(store, schema, {"t": "d"})
    defs["B"]["properties"]["t"] = {"enum": ["a", "b"]}  # type: ignore[index]
    with pytest.raises(RequestError, match="oneOf"):
        compile_in(store, "json", schema)


NULL = {"type": "null"}


def test_branches_told_apart_by_their_types(store: GrammarStore) -> None:
    """As nullable references of other languages' libraries are written, and enumerations of their values."""
    union: dict[str, Any] = {"oneOf": [NULL, REF_A, {"enum": [1, "a"]}, {"type": "array"}], **DEFS}
    given: list[Any] = [None, A1, 1, "a", []]
    for value in given:
        assert takes(store, union, value), value
    for value in (AC, {}, 2, "b", True):
        assert not takes(store, union, value), value
    tagged = {name: {**A, "properties": {"t": {"const": name}}, "required": ["t"]} for name in "AB"}
    union = {"oneOf": [REF_A, NULL, REF_B], "$defs": tagged}
    assert all(takes(store, union, value) for value in (None, {"t": "A"}, {"t": "B"})) and not takes(store, union, {})
    untyped = {name: {"properties": {"t": {"const": name}}, "required": ["t"]} for name in "AB"}
    assert not takes(store, {"oneOf": [REF_A, REF_B], "$defs": untyped}, 5)  # it would match both
    tagged["B"]["type"] = ["object", "null"]
    assert all(takes(store, {"oneOf": [REF_A, REF_B], "$defs": tagged}, value) for value in (None, {"t": "B"}))
    tagged["A"]["type"] = ["object", "null"]
    assert not takes(store, {"oneOf": [REF_A, REF_B], "$defs": tagged}, None)  # it would match both
    maps = {"A": {"type": "object", "additionalProperties": {"type": "integer"}}, "B": {"type": "string"}}
    for value, is_right in ({"k": 1}, True), ("b", True), ({"k": "b"}, False), (1, False):
        assert takes(store, {"oneOf": [REF_A, REF_B], "$defs": maps}, value) == is_right, value
    for branches in ([NULL, {"$ref": "#/$defs/A"}], [{"type": "integer"}, {"type": "number"}], [NULL, True]):
        with pytest.raises(RequestError, match="oneOf"):
            compile_in(store, "json", {"oneOf": branches, "$defs": untyped})


def test_bounds_beyond_what_the_compiler_has(store: GrammarStore) -> None:
    """Those of 64 bits and of floats, as libraries write them for their types."""
    for kind in ("integer", "number"):
        for least, most in ((-(2**63), 2**63 - 1), (0, 2**64 - 1), (-3.4028234663852886e38, 3.4028234663852886e38)):
            schema = {"type": kind, "minimum": least, "maximum": most}
            assert takes(store, schema, 10**18) and takes(store, schema, 0), schema
            assert takes(store, schema, -5) == (least < 0), schema
    with pytest.raises(RequestError, match="range"):
        compile_in(store, "json", {"type": "number", "minimum": 1e30})


@pytest.mark.parametrize("form", ["date", "date-time"])
def test_dates_are_in_the_calendar(store: GrammarStore, form: str) -> None:
    matcher = compile_in(store, "json", {"type": "string", "format": form})
    for year, month in itertools.product((0, 1, 4, 100, 400, 1000, 1900, 2000, 2021, 2024, 9999), range(14)):
        for day in (0, 1, 28, 29, 30, 31, 32):
            text = f"{year:04}-{month:02}-{day:02}"
            try:
                is_one = bool(datetime.date.fromisoformat(text))
            except ValueError:
                is_one = False
            written = json.dumps(text + "T01:02:03Z" * (form == "date-time"))
            assert accepts(matcher.deep_copy(), written) == is_one, text


@st.composite
def loose(draw: st.DrawFn) -> dict[str, Any]:
    """Objects whose schemas do not say what else there may be, put together in every way."""
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    own: dict[str, Any] = {"properties": {name: draw(schemas()) for name in names}}
    if draw(st.booleans()):
        own["required"] = names[:1]
    return own


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(loose(), min_size=1, max_size=3),
    how=st.sampled_from(["allOf", "anyOf", "beside", "reference", "property"]),
    seed=st.integers(0, 1000),
)
def test_closing_never_contradicts(store: GrammarStore, parts: list[Any], how: str, seed: int) -> None:
    """What comes out matches the schema as it was, and there is always something that does."""
    taken: set[str] = set()
    for index, part in enumerate(parts):  # values of a name in two parts may exclude each other by themselves
        part["properties"] = {f"{name}{index}": value for name, value in part["properties"].items()}
        part["required"] = [f"{name}{index}" for name in part.get("required", ())]
        taken |= set(part["properties"])
    schema: dict[str, Any]
    if how == "beside":
        schema = {"type": "object", **parts[0], "anyOf": parts[1:] or [{}]}
    elif how == "reference":
        defs = {f"D{index}": part for index, part in enumerate(parts)}
        schema = {"type": "object", "allOf": [{"$ref": f"#/$defs/{name}"} for name in defs], "$defs": defs}
    elif how == "property":
        schema = {"type": "object", "properties": {"p": {"type": "object", "allOf": parts}}, "required": ["p"]}
    else:
        schema = {"type": "object", how: parts}
    text = walk(compile_in(store, "json", schema), random.Random(seed))
    if text is not None:
        value = json.loads(text)
        jsonschema.validate(value, schema)
        assert set(value.get("p", value) if how == "property" else value) <= taken


def test_alternatives_that_branches_share_are_looked_at_once() -> None:
    """Hundreds of nullable references to one union of hundreds; the types of each that is named are kept."""
    union = {"anyOf": [{"type": "string", "minLength": length} for length in range(1000)]}
    branches = [{"anyOf": [{"$ref": "#/$defs/U"}]}, {"type": "null"}]
    names = {f"p{number}": {"oneOf": branches} for number in range(1000)}
    looked: list[object] = []

    class Counted(dict[str, object]):
        def get(self, key: str, default: object = None) -> object:
            looked.append(key)
            return super().get(key, default)

    union["anyOf"] = [Counted(one) for one in union["anyOf"]]
    followed({"type": "object", "properties": names, "$defs": {"U": union}})
    assert len(looked) < 100_000  # 20 for each of the thousand; three millions where each reference looks at all
