"""The fields that say what an output has to match, in OpenAI's words and in those of other servers.

`response_format` is OpenAI's. `structured_outputs` and `guided_*` are vLLM's; `json_schema`, `regex` and `ebnf`, in the
`sampling_params` of /generate, SGLang's. At most one of them may be given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.limits import MAX_TEXT
from minisgl.server.strict import optional

MAX_CHOICES = 4096
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_SPECIFIED = {
    "type": ["object", "null"],
    "required": ["name"],
    "properties": {"name": {"type": "string", "minLength": 1}, "schema": {"type": ["object", "null"]}},
}
_FORMAT_SCHEMA: dict[str, Any] = {
    "required": ["type"],
    "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": _SPECIFIED},
}
_KINDS_SCHEMA: dict[str, Any] = {
    "properties": {
        "json": {"type": ["object", "string", "null"]},
        "regex": {"type": ["string", "null"]},
        "choice": {"type": ["array", "null"], "items": {"type": "string"}},
        "grammar": {"type": ["string", "null"]},
        "json_object": {"type": ["boolean", "null"]},
    },
    "additionalProperties": False,
}
# Which engine is to follow a grammar is not a client's choice; nor where whitespace may stand.
_ONLY: dict[str, tuple[Any, ...]] = {
    "guided_decoding_backend": (None, "auto", "guidance", "llguidance"),
    "guided_whitespace_pattern": (None,),
}


class GrammarFields(BaseModel):
    """To be inherited by request bodies of OpenAI's endpoints."""

    response_format: dict[str, Any] | None = optional("OpenAI's way to ask for JSON.", **_FORMAT_SCHEMA)
    structured_outputs: dict[str, Any] | None = optional("What the output matches: one of these.", **_KINDS_SCHEMA)
    guided_json: dict[str, Any] | str | None = optional("The output is JSON that matches the schema.")
    guided_regex: str | None = optional("The output matches.", minLength=1)
    guided_choice: list[str] | None = optional("The output is one of these.", minItems=1, maxItems=MAX_CHOICES)
    guided_grammar: str | None = optional("The output follows the grammar, Lark or EBNF.", minLength=1)
    guided_decoding_backend: str | None = optional("There is but one.", enum=[*_ONLY["guided_decoding_backend"]])
    guided_whitespace_pattern: str | None = optional("Not supported.", enum=[None])


def parse_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """fields: of a request, None where not given. Raises: RequestError naming the field at fault."""
    for name, values in _ONLY.items():
        if fields.get(name) not in values:
            raise RequestError(f"{name}={fields[name]!r} is not supported", param=name)
    found: list[Grammar] = []
    for name, value in fields.items():
        if value is not None and name in _PARSERS:
            grammar = _PARSERS[name](value, name)
            if grammar is not None:
                found.append(grammar)
    if len(found) > 1:
        both = f"{found[0].param} and {found[1].param}"
        raise RequestError(f"{both} cannot both be given", param=found[1].param)
    return found[0] if found else None


def schema_grammar(
    schema: Any, param: str, *, prefix: str = "", suffix: str = "", separator: str | None = None
) -> Grammar:
    """JSON that matches a schema (an object, or its text), between two texts; with a separator, as often as the model
    likes. That is the grammar of tool calls that the model has to make.

    Raises: RequestError when it is no schema, or too long.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param} is not valid JSON: {error}", param=param) from None
    if not isinstance(schema, dict):
        raise RequestError(f"{param} must be a JSON schema: an object", param=param)
    text = _bounded(json.dumps(schema), param)
    return Grammar("json", text, prefix=prefix, suffix=suffix, separator=separator, param=param)


def _response_format(value: Any, name: str) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(f"{name}.type must be text, json_object or json_schema, not {kind!r}", param=name)
    _known(value, ("type", "json_schema") if kind == "json_schema" else ("type",), name)
    if kind == "text":
        return None
    if kind == "json_object":
        return schema_grammar(_ANY_OBJECT, name)
    inner = value.get("json_schema")
    where = f"{name}.json_schema"
    if not isinstance(inner, dict):
        raise RequestError(f"{where} must be an object", param=name)
    _known(inner, ("name", "description", "schema", "strict"), where)
    for key, types in (("name", str), ("description", str), ("strict", bool)):
        if inner.get(key) is not None and not isinstance(inner[key], types):
            raise RequestError(f"{where}.{key} must be a {types.__name__}", param=name)
    if not inner.get("name"):
        raise RequestError(f"{where}.name is required", param=name)
    schema = inner.get("schema")
    return schema_grammar(_ANY_OBJECT if schema is None else schema, name)


def _structured_outputs(value: Any, name: str) -> Grammar | None:
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", param=name)
    _known(value, (*_KINDS, "json_object"), name)
    given = {key: part for key, part in value.items() if part is not None and (key, part) != ("json_object", False)}
    if len(given) != 1:
        raise RequestError(f"{name} must have exactly one of {', '.join(_KINDS)}, json_object", param=name)
    ((key, part),) = given.items()
    if key == "json_object":
        if part is not True:
            raise RequestError(f"{name}.json_object must be true or false", param=name)
        return schema_grammar(_ANY_OBJECT, name)
    return _KINDS[key](part, name)


def _text(kind: str) -> Callable[[Any, str], Grammar]:
    def parse(value: Any, name: str) -> Grammar:
        if not isinstance(value, str) or not value:
            raise RequestError(f"{name} must be a {kind}: a string that is not empty", param=name)
        return Grammar(kind, _bounded(value, name), param=name)

    return parse


def _choice(value: Any, name: str) -> Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise RequestError(f"{name} must be a list of strings that is not empty", param=name)
    if len(value) > MAX_CHOICES:
        raise RequestError(f"{name} must have at most {MAX_CHOICES} choices, not {len(value)}", param=name)
    return Grammar("choice", _bounded(json.dumps(value), name), param=name)


def _known(value: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in names:
            raise RequestError(f"unknown field: {where}.{key}", param=where.partition(".")[0])


def _bounded(text: str, name: str) -> str:
    if len(text) > MAX_TEXT:
        raise RequestError(f"{name} has {len(text)} characters, more than {MAX_TEXT}", param=name)
    return text


_KINDS: dict[str, Callable[[Any, str], Grammar]] = {
    "json": schema_grammar,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("grammar"),
}
_PARSERS: dict[str, Callable[[Any, str], Grammar | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": schema_grammar,
    "guided_regex": _text("regex"),
    "guided_choice": _choice,
    "guided_grammar": _text("grammar"),
    "json_schema": schema_grammar,
    "regex": _text("regex"),
    "ebnf": _text("grammar"),
}
