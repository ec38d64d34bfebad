"""The fields that say what an output has to match, in OpenAI's words and in those of other servers.

`response_format` is OpenAI's. `structured_outputs` and `guided_*` are vLLM's; `json_schema`, `regex` and `ebnf`, in the
`sampling_params` of /generate, SGLang's. At most one of them may be given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from reprlib import repr as quoted
from typing import Any

from pydantic import BaseModel

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.server.bodies.strict import SCHEMAS, Items, optional

MAX_CHOICES = 4096
MAX_TEXT = 256 << 10  # characters of a schema, or a grammar
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_WHITESPACE = ("compact", "any")


class GrammarFields(BaseModel):
    """To be inherited by request bodies of OpenAI's endpoints."""

    response_format: dict[str, Any] | None = optional("OpenAI's way to ask for JSON.", **SCHEMAS["response_format"])
    structured_outputs: dict[str, Any] | None = optional(
        "What the output matches: one of these.", **SCHEMAS["structured_outputs"]
    )
    guided_json: dict[str, Any] | str | None = optional("The output is JSON that matches the schema.")
    guided_regex: str | None = optional("The output matches.", minLength=1)
    guided_choice: Items[str] | None = optional("The output is one of these.", minItems=1, maxItems=MAX_CHOICES)
    guided_grammar: str | None = optional("The output follows the grammar, Lark or EBNF.", minLength=1)


def parse_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """fields: of a request, None where not given. Raises: RequestError naming the field at fault."""
    given = {name: value for name, value in fields.items() if value is not None and name in _PARSERS}
    found = [grammar for name, value in given.items() if (grammar := _PARSERS[name](value, name)) is not None]
    if len(found) > 1:
        both = f"{found[0].param} and {found[1].param}"
        raise RequestError(f"{both} cannot both be given", param=found[1].param)
    return found[0] if found else None


def form_grammar(form: Any, param: str) -> Grammar:
    """Of calls, and what may come in their place. Raises: RequestError when it is too long."""
    return Grammar("form", _bounded(json.dumps(form), param), param=param)


def _schema(schema: Any, param: str, whitespace: Any = None) -> Grammar:
    """JSON that matches a schema (an object, or its text). Raises: RequestError when it is no schema, or too long."""
    if isinstance(schema, str):
        try:
            schema = json.loads(_bounded(schema, param))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param} is not valid JSON: {error}", param=param) from None
    if not isinstance(schema, dict):
        raise RequestError(f"{param} must be a JSON schema: an object", param=param)
    if whitespace not in (None, *_WHITESPACE):
        raise RequestError(f"{param}.whitespace must be compact or any, not {quoted(whitespace)}", param=param)
    return Grammar("json", _bounded(json.dumps(schema), param), whitespace or "compact", param=param)


def _response_format(value: Any, name: str) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise RequestError(f"{name}.type must be text, json_object or json_schema, not {quoted(kind)}", param=name)
    if kind == "text":
        return None
    inner, where = value.get("json_schema"), f"{name}.json_schema"
    if inner is None and (kind == "json_object" or value.get("schema") is not None):
        inner = {"schema": value.get("schema")}  # beside the type, as others have it
    if not isinstance(inner, dict):
        raise RequestError(f"{where} must be an object", param=name)
    for key, types in (("name", str), ("description", str), ("strict", bool)):
        if inner.get(key) is not None and not isinstance(inner[key], types):
            raise RequestError(f"{where}.{key} must be a {types.__name__}", param=name)
    schema, whitespace = inner.get("schema"), value.get("whitespace", inner.get("whitespace"))
    return _schema(_ANY_OBJECT if schema is None else schema, name, whitespace)


def _structured_outputs(value: Any, name: str) -> Grammar | None:
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", param=name)
    whitespace = value.get("whitespace")
    given = {key: part for key, part in value.items() if key != "whitespace" and part not in (None, False)}
    if len(given) != 1:
        raise RequestError(f"{name} must have exactly one of {', '.join(_KINDS)}, json_object", param=name)
    ((key, part),) = given.items()
    if key == "json_object" and part is not True:
        raise RequestError(f"{name}.json_object must be true or false", param=name)
    if key == "json_object":
        return _schema(_ANY_OBJECT, name, whitespace)
    return _schema(part, name, whitespace) if key == "json" else _KINDS[key](part, name)


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


def _bounded(text: str, name: str) -> str:
    if len(text) > MAX_TEXT:
        raise RequestError(f"{name} has {len(text)} characters, more than {MAX_TEXT}", param=name)
    return text


_KINDS: dict[str, Callable[[Any, str], Grammar]] = {
    "json": _schema,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("grammar"),
}
_PARSERS: dict[str, Callable[[Any, str], Grammar | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    **{f"guided_{kind}": parse for kind, parse in _KINDS.items()},
    "json_schema": _schema,
    "regex": _text("regex"),
    "ebnf": _text("grammar"),
}
