"""JSON schemas drawn by Hypothesis, of the keywords that structured output takes."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st

NAMES = st.sampled_from(["a", "b", "name", "größe", 'quo"te', "x y"])
Schemas = st.SearchStrategy[dict[str, Any]]


@st.composite
def integers(draw: st.DrawFn) -> dict[str, Any]:
    low, size = draw(st.integers(-200, 200)), draw(st.integers(0, 300))
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + size}
    if draw(st.booleans()) and size > 10:
        schema["multipleOf"] = draw(st.integers(1, 5))
    return schema


@st.composite
def strings(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["length", "pattern", "format"]))
    if kind == "length":
        low = draw(st.integers(0, 4))
        return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 6))}
    if kind == "pattern":
        return {"type": "string", "pattern": draw(st.sampled_from(["^[a-z]{2,5}$", r"^\d{3}-\d{2}$", "^(yes|no)$"]))}
    return {"type": "string", "format": draw(st.sampled_from(["date", "ipv4", "uuid", "email"]))}


@st.composite
def objects(draw: st.DrawFn, inner: Schemas) -> dict[str, Any]:
    names = draw(st.lists(NAMES, max_size=4, unique=True))
    required = [name for name in names if draw(st.booleans())]
    properties = {name: draw(inner) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def arrays(draw: st.DrawFn, inner: Schemas) -> dict[str, Any]:
    low = draw(st.integers(0, 2))
    schema: dict[str, Any] = {"type": "array", "items": draw(inner), "minItems": low}
    schema["maxItems"] = low + draw(st.integers(0, 2))
    if draw(st.booleans()):
        schema["prefixItems"] = [draw(inner)]
        schema["maxItems"] = max(1, schema["maxItems"])
    return schema


def schemas() -> Schemas:
    leaves = st.one_of(
        integers(),
        strings(),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]),
        st.just({"type": "number", "minimum": -5, "maximum": 12.5}),
        st.lists(st.sampled_from(["x", "<tag>", 1, None, True, 'a"b']), min_size=1, max_size=4).map(
            lambda values: {"enum": values}
        ),
        st.sampled_from([{"const": "fixed"}, {"const": {"deep": [1, "two"]}}]),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
        ),
        max_leaves=8,
    )
