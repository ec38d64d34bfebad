"""The fields that say what an output has to match, in OpenAI's words and in those of other servers.

`response_format` is OpenAI's. `structured_outputs` and `guided_*` are vLLM's; `json_schema`, `regex` and `ebnf`, in the
`sampling_params` of /generate, SGLang's. At most one of them may be given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import repr as quoted
from typing import Any

from pydantic import BaseModel

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.server.bodies.strict import SCHEMAS, Items, Object, optional, refuse_unless

MAX_CHOICES = 4096
MAX_TEXT = 256 << 10  # characters of a schema, or a grammar
_ANY_OBJECT: Object = {"type": "object"}
_KINDS = {
    **{kind: kind for kind in ("json", "regex", "choice", "grammar")},  # in `structured_outputs`
    **{f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")},
    "json_schema": "json",
    "ebnf": "grammar",
}


class GrammarFields(BaseModel):
    """To be inherited by request bodies of OpenAI's endpoints."""

    response_format: Object | None = optional("OpenAI's way to ask for JSON.", **SCHEMAS["response_format"])
    structured_outputs: Object | None = optional(
        "What the output matches: one of these.", **SCHEMAS["structured_outputs"]
    )
    guided_json: Object | str | None = optional("The output is JSON that matches the schema.")
    guided_regex: str | None = optional("The output matches.", minLength=1)
    guided_choice: Items[str] | None = optional("The output is one of these.", minItems=1, maxItems=MAX_CHOICES)
    guided_grammar: str | None = optional("The output follows the grammar, Lark or EBNF.", minLength=1)


def parse_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """fields: of a request, None where not given. Raises: RequestError naming the field at fault."""
    found: list[Grammar] = []
    for name, value in fields.items():
        if value is None:
            continue
        if name == "response_format":
            found += _response_format(value)
        elif name == "structured_outputs":
            found.append(_structured_outputs(value))
        elif name in _KINDS:
            found.append(_grammar(_KINDS[name], value, name))
    if len(found) > 1:
        raise RequestError(f"{found[0].param} and {found[1].param} cannot both be given", param=found[1].param)
    return found[0] if found else None


def form_grammar(form: Any, param: str) -> Grammar:
    """Of calls, and what may come in their place. Raises: RequestError when it is too long."""
    return _grammar("form", json.dumps(form), param)


def _response_format(value: Any) -> list[Grammar]:
    name = "response_format"
    kind = value.get("type")
    is_known = kind in ("text", "json_object", "json_schema")
    refuse_unless(is_known, f"{name}.type must be text, json_object or json_schema, not {quoted(kind)}", name)
    if kind == "text":
        return []
    inner = value.get("json_schema")
    if inner is None and (kind == "json_object" or value.get("schema") is not None):
        inner = {"schema": value.get("schema")}  # beside the type, as others have it
    refuse_unless(isinstance(inner, dict), f"{name}.json_schema must be an object", name)
    for key, types in (("name", str), ("description", str), ("strict", bool)):
        is_right = isinstance(inner.get(key), types | None)
        refuse_unless(is_right, f"{name}.json_schema.{key} must be a {types.__name__}", name)
    schema, whitespace = inner.get("schema"), value.get("whitespace", inner.get("whitespace"))
    return [_grammar("json", _ANY_OBJECT if schema is None else schema, name, whitespace)]


def _structured_outputs(value: Any) -> Grammar:
    name = "structured_outputs"
    given = {key: part for key, part in value.items() if key != "whitespace" and part not in (None, False)}
    kinds = "json, regex, choice, grammar, json_object"
    refuse_unless(len(given) == 1, f"{name} must have exactly one of {kinds}", name)
    ((key, part),) = given.items()
    if key == "json_object":
        refuse_unless(part is True, f"{name}.json_object must be true or false", name)
        key, part = "json", _ANY_OBJECT
    return _grammar(_KINDS[key], part, name, value.get("whitespace"))


def _grammar(kind: str, value: Any, name: str, whitespace: Any = None) -> Grammar:
    """Raises: RequestError when it is no schema (an object, or its text), or choice, or text; or too long."""
    text = value
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(_bounded(value, name))
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{name} is not valid JSON: {error}", param=name) from None
        refuse_unless(isinstance(value, dict), f"{name} must be a JSON schema: an object", name)
        is_known = whitespace in (None, "compact", "any")
        refuse_unless(is_known, f"{name}.whitespace must be compact or any, not {quoted(whitespace)}", name)
        text = json.dumps(value)
    elif kind == "choice":
        are_texts = value and isinstance(value, list) and all(isinstance(item, str) for item in value)
        refuse_unless(are_texts, f"{name} must be a list of strings that is not empty", name)
        is_short = len(value) <= MAX_CHOICES
        refuse_unless(is_short, f"{name} must have at most {MAX_CHOICES} choices, not {len(value)}", name)
        text = json.dumps(value)
    is_text = text and isinstance(text, str)
    refuse_unless(is_text, f"{name} must be a {kind}: a string that is not empty", name)
    return Grammar(kind, _bounded(text, name), (kind == "json" and whitespace) or "compact", param=name)


def _bounded(text: str, name: str) -> str:
    is_short = len(text) <= MAX_TEXT
    refuse_unless(is_short, f"{name} has {len(text)} characters, more than {MAX_TEXT}", name)
    return text
