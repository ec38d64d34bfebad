"""What tool calls look like to a grammar, in each format: for outputs that must be calls (`tool_choice` `required`, or
a function by name), or calls or an answer that has a form of its own (`response_format` beside `tools`)."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from minisgl.errors import RequestError
from minisgl.grammar.schema import PATTERNS, definitions, listed, literals, resolved

Form = Any  # of `grammar/source.py`
UNKNOWN = "llama3_json"  # the format of a model whose own is not known
_OTHER = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "propertyNames", "additionalProperties")
_OBJECT = {"type": "object"}
_MAX_BRANCHES = 8  # of types within types, which a schema may have without end


class Part(NamedTuple):
    """A function, or one of its arguments: its name and schema, and the field that this is from.

    binds: the schema has to be followed, or the request is refused. needed: the argument must be there.
    """

    name: str
    schema: dict[str, Any]
    param: str
    binds: bool
    needed: bool = True

    def json(self, otherwise: dict[str, Any], whitespace: str = "compact") -> Form:
        form = {"kind": "json", "text": json.dumps(self.schema), "whitespace": whitespace, "param": self.param}
        return form if self.binds else {**form, "or": {**form, "text": json.dumps(otherwise)}}

    def maybe(self, form: Form) -> Form:
        return form if self.needed else {"any": [form, []]}


def calls_form(
    parser: str | None, tools: Sequence[Mapping[str, Any]], names: Collection[str], *, parallel: bool, required: bool
) -> Form:
    """Calls in the model's own format, which is what it knows best.

    parser: the name of the format, as for `--tool-call-parser`; None: unknown.
    tools: as in the request (`{"type": "function", "function": {…}}`); those with these names can be called.
    parallel: there may be several calls. required: arguments match their schema, or the request is refused; else that
    is so for functions that are `strict`, and others whose schema cannot be followed have any arguments.
    """
    functions = [
        Part(f["name"], _of_object(f), f"tools[{index}].function.parameters", required or f.get("strict") is True)
        for index, f in enumerate(tool["function"] for tool in tools)
        if f["name"] in names
    ]
    name = parser or UNKNOWN
    return _json_calls(functions, parallel, *_JSON[name]) if name in _JSON else _FORMATS[name](functions, parallel)


def _of_object(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of its arguments: of an object, and without parameters of an empty one."""
    schema = {key: value for key, value in (function.get("parameters") or {}).items() if value is not None}
    if not any(key in schema for key in ("properties", *_OTHER)):
        schema["properties"] = {}
    return schema if "$ref" in schema else {"type": "object", **schema}


def _many(forms: Sequence[Form], between: str, parallel: bool) -> Form:
    return {"many": {"any": forms}, "between": between} if parallel else {"any": forms}


def _json_calls(functions: Sequence[Part], parallel: bool, opening: str, key: str, closing: str, between: str) -> Form:
    calls = [[f'{opening}{{"name": "{f.name}", "{key}": ', f.json(_OBJECT), "}" + closing] for f in functions]
    return _many(calls, between, parallel)


def _mistral(functions: Sequence[Part], parallel: bool) -> Form:
    """Calls in a list, or each by itself: versions of the model differ."""
    calls = ["[TOOL_CALLS]", {"any": [" ", ""]}, "[", _json_calls(functions, parallel, "", "arguments", "", ", "), "]"]
    named = [[f"[TOOL_CALLS]{function.name}[ARGS]", function.json(_OBJECT)] for function in functions]
    return {"any": [calls, _many(named, "", parallel)]}


def _pythonic(functions: Sequence[Part], parallel: bool) -> Form:
    calls = [[f"{function.name}(", _separated(_fields(function)), ")"] for function in functions]
    return ["[", _many(calls, ", ", parallel), "]"]


def _separated(fields: Sequence[Part]) -> Form:
    """Arguments follow each other with commas between them; those that are not needed may be missing."""
    items = [[f"{field.name}=", field.json({}, "python")] for field in fields]
    behind = [field.maybe([", ", item]) for field, item in zip(fields, items, strict=True)]
    first = next((index for index, field in enumerate(fields) if field.needed), len(items))
    starts: list[Form] = [[item, *behind[index + 1 :]] for index, item in enumerate(items[: first + 1])]
    return {"any": starts if first < len(items) else [*starts, []]}


def _qwen3_coder(functions: Sequence[Part], parallel: bool) -> Form:
    calls = []
    for function in functions:
        arguments = [field.maybe([f"<parameter={field.name}>\n", _value(field)]) for field in _fields(function)]
        calls.append([f"<tool_call>\n<function={function.name}>\n", *arguments, "</function>\n</tool_call>"])
    return _many(calls, "\n", parallel)


_END = "\n</parameter>\n"


def _value(field: Part, depth: int = 0) -> Form:
    """An argument as Qwen3-Coder writes it, up to the end of its tag: strings without quotes, and JSON."""
    schema = resolved(field.schema, field.schema)
    branches = schema.get("anyOf")
    if isinstance(schema.get("type"), list):
        branches = [{**schema, "type": kind} for kind in schema["type"]]
    if isinstance(branches, list) and depth < _MAX_BRANCHES and all(isinstance(branch, dict) for branch in branches):
        shared = definitions(field.schema)
        return {"any": [_value(field._replace(schema={**shared, **branch}), depth + 1) for branch in branches]}
    if values := literals(schema):
        return {"any": [[value if isinstance(value, str) else json.dumps(value), _END] for value in values]}
    if schema.get("type") != "string":
        return [field.json({}), _END]
    patterns = [PATTERNS[name] for name in (str(schema.get("format")),) if name in PATTERNS]
    patterns += [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
    least, most = schema.get("minLength") or 0, schema.get("maxLength")
    if least or most is not None:
        patterns.append(f"^(?s:.{{{least},{'' if most is None else most}}})$")
    if not patterns:
        return {"until": _END}
    lark = f"start: V {json.dumps(_END)}\nV: " + " & ".join(f"/{_searched(pattern)}/" for pattern in patterns)
    form = {"kind": "grammar", "text": lark, "param": field.param}
    return form if field.binds else {**form, "or": {"until": _END}}


def _searched(pattern: str) -> str:
    """A pattern of JSON schema, which matches anywhere, as one that matches the whole."""
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern[start : len(pattern) - end])
    return f"{'' if start else '(?s:.*)'}({inner}){'' if end else '(?s:.*)'}"


def _fields(function: Part) -> list[Part]:
    """The arguments of a function. Raises: RequestError when its schema has no list of them."""
    schema = resolved(function.schema, function.schema)
    fields = schema.get("properties") or {}
    if any(schema.get(key) not in (None, True, False, {}) for key in _OTHER) or not isinstance(fields, dict):
        message = f"{function.param} must be an object of named properties, for this model's format of calls"
        raise RequestError(message, param=function.param)
    shared = definitions(function.schema)
    required = listed(schema, "required")
    return [
        Part(name, shared | inner, f"{function.param}.properties.{name}", function.binds, name in required)
        for name, schema in fields.items()
        if isinstance(inner := {} if schema is True else schema, dict)
    ]


_HERMES = ("<tool_call>\n", "arguments", "\n</tool_call>", "\n")
_JSON = {"hermes": _HERMES, "qwen": _HERMES, "llama3_json": ("", "parameters", "", "; ")}
_FORMATS = {"mistral": _mistral, "pythonic": _pythonic, "qwen3_coder": _qwen3_coder}
