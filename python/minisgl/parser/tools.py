"""Formats of tool calls: their parser, and what they look like to a grammar.

What is of one format alone is data, in `tools.yaml`. The parser holds back only what may belong to a call: what turns
out to be none, or names a function that the client does not have, comes back as the text that it is. A call whose name
and first bracket of arguments are there has begun, and its arguments are passed on as they come, to where they end or
the text does. Grammars are for outputs that must be calls (`tool_choice` `required`, or a function by name), or calls
or an answer that has a form of its own (`response_format` beside `tools`).
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from minisgl.errors import RequestError
from minisgl.grammar.schema import PATTERNS, definitions, leaves, listed, literals, resolved
from minisgl.parser.parts import BARE, BracketReader, Parser, Part, TaggedArguments, calls_in, num_certain

Form = Any  # of `grammar/source.py`
MAX_TEXT = 256 << 10  # characters of a schema, or a grammar
UNKNOWN = "llama3_json"  # the format of a model whose own is not known
_OTHER = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "propertyNames", "additionalProperties")
_OBJECT = {"type": "object"}
# A call in JSON, up to its arguments; and the beginning of an object that is none, so that it need not be waited for.
_JSON_HEAD = re.compile(
    r'\s*(\[?)\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_JSON_OTHER = re.compile(
    r'\{\s*(?:[^"\s]|"(?!(?:name|type|function|arguments|parameters|id)")[^"\\]*"|'
    r'"name"\s*:\s*(?:[^"\s]|"([^"\\]*)"))'
)


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How calls are written: each as `call` says, with `$name` and `$arguments`; the rest are forms around them."""

    call: str
    between: str = ""
    before: list[Form] = []
    after: list[Form] = []


class CallFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """language: of arguments; "tags": each between tags, strings as they are and other values in JSON; "lines": as
    "python", without a list around the calls, up to the first of `closers`; "names": JSON, and names without quotes.
    markers: what may be a call begins with one of these, wherever they stand; bare: or with this pattern, at the
    beginning of the message or after a call.
    closers: what stands behind a call; each may be missing. between: what may stand between a call and the next, beside
    whitespace.
    named: a pattern of the beginning of a call that is no JSON, up to its arguments; its group is the name.
    begun: and of what may still become one. answer: forms that stand before an answer.
    """

    layouts: list[Layout]
    markers: tuple[str, ...]
    language: Literal["json", "python", "lines", "tags", "names"] = "json"
    bare: str = ""
    closers: list[str] = []
    between: str = ""
    named: str = ""
    begun: str = ""
    answer: list[Form] = []


TOOL_PARSERS = msgspec.convert(  # by the names of `--tool-call-parser`
    msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes()), dict[str, CallFormat]
)


class Found(NamedTuple):
    """What may be a call turned out to be: `end` characters, and the calls in them; None: they are text.

    arguments: what reads those of the last call; None: they have come with it. closers: what stands behind it; each may
    be missing. in_list: at the end, another call may follow after a comma.
    """

    end: int
    calls: list[Part] | None = None
    arguments: BracketReader | TaggedArguments | None = None
    closers: Sequence[str] = ()
    in_list: bool = False


class ToolParser(Parser):
    """Text and calls in turn. A call is JSON, `{"name": …, "arguments": {…}}`, or a list of such, unless the format
    says otherwise.

    name: of the format; None when it is not known. functions: those that can be called, and schemas of their arguments.
    """

    def __init__(self, name: str | None, functions: Mapping[str, Any]) -> None:
        super().__init__()
        self._format = TOOL_PARSERS[name or UNKNOWN]
        self._brackets = {"json": "{[", "python": "["}.get(self._format.language, "")  # of calls without their names
        self._functions = functions
        self._at_start = True  # of the message, or behind a call: whitespace may turn out to be formatting
        self._num_calls = 0
        self._state = self._read_text  # what reads on; False: nothing more can be said yet
        self._reader = BracketReader()  # of what may be a call, with which `_buffer` begins then
        self._num_read = 0  # characters of it that the reader has seen
        self._lead = ""  # what stood before it, and is formatting if it is a call
        self._arguments: BracketReader | TaggedArguments | None = None  # of a call, with which `_buffer` begins then
        self._closers: list[str] = []  # of that call
        self._in_list = False  # the last call stood in a JSON list that goes on

    def read(self, text: str, *, final: bool) -> Found | None:
        """What the beginning of `text` is, a marker included; None as long as more of it decides. `text` is what it was
        before, and more.

        final: there is no more; what is not whole is text then.
        """
        start = next((len(marker) for marker in self._format.markers if text.startswith(marker)), 0)
        named = re.match(self._format.named, text) if self._format.named else None
        if named is not None and (name := named[1].strip()) in self._functions:
            is_tagged = self._format.language == "tags"
            arguments = TaggedArguments(self._functions[name] or {}) if is_tagged else BracketReader()
            return Found(named.end(), [Part("call", "", name)], arguments, self._format.closers)
        rest = text[start:].lstrip()
        if self._format.named and rest and rest[0] not in self._brackets:
            begins = any(marker.startswith(rest) for marker in self._format.markers)
            return None if not final and (begins or re.fullmatch(self._format.begun, text)) else Found(1)
        return self._read_value(text, start, final)

    def _read_value(self, text: str, start: int, final: bool) -> Found | None:
        """start: the length of the marker."""
        head = _JSON_HEAD.match(text, start) if self._format.language == "json" else None
        in_list = (self._in_list and not start) or (head is not None and bool(head[1]))
        closers = ["]", *self._format.closers] if in_list else self._format.closers
        if head is not None and head[2] in self._functions:
            return Found(head.end(), [Part("call", "", head[2])], BracketReader(), ["}", *closers], in_list)
        if self._format.language in ("lines", "names"):
            whole, found, _ = text[start:].partition(closers[0])
            calls = calls_in(whole, self._functions, self._format.language) if found or final else None
            return Found(start + len(whole), calls, None, closers) if found or final else None
        start = len(text) - len(text[start:].lstrip())
        if start == len(text):
            return Found(start) if final else None
        other = _JSON_OTHER.match(text, start)
        if text[start] not in self._brackets or (other is not None and other[1] not in self._functions):
            return Found(start + 1)
        self._num_read = self._num_read or start
        size, _, ended = self._reader.read(text[self._num_read :])
        self._num_read += size
        if not ended:
            return Found(len(text)) if final else None
        whole = text[start : self._num_read]
        calls = None if self._reader.too_deep else calls_in(whole, self._functions, self._format.language)
        return Found(self._num_read, calls, None, closers, in_list)

    def _run(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._buffer and self._state(parts, final):
            pass
        return parts

    def _read_text(self, parts: list[Part], final: bool) -> bool:
        """Let out text up to what may be a call."""
        starts = [at for marker in self._format.markers if (at := self._buffer.find(marker)) >= 0]
        if starts or final:
            end = len(self._buffer[: min(starts)].rstrip()) if starts else len(self._buffer)
        else:
            end = num_certain(self._buffer, (*self._format.markers, self._format.between))
        if self._at_start:
            between = "," if self._in_list else self._format.between if self._num_calls else ""
            rest = re.sub(rf"\s*(?:{re.escape(between)})?\s*", "", self._buffer, count=1)
            bare = r"\{" if self._in_list else self._format.bare
            if bare and re.match(bare, rest):
                starts, end = [len(self._buffer) - len(rest)], 0
            elif not rest and (self._num_calls or not final):
                self._buffer = "" if final else self._buffer
                return False
        if end:
            self._at_start = self._in_list = False
            parts.append(Part("text", self._buffer[:end]))
            self._buffer = self._buffer[end:]
        if starts:
            size = min(starts) - end
            self._lead, self._buffer = self._buffer[:size], self._buffer[size:]
            self._reader, self._num_read = BracketReader("\"'" if self._format.language == "python" else '"'), 0
            self._state = self._read_call
        return bool(starts)

    def _read_call(self, parts: list[Part], final: bool) -> bool:
        if (found := self.read(self._buffer, final=final)) is None:
            return False
        self._at_start = found.calls is not None
        if found.calls is None:
            text, end = self._lead + self._buffer, len(self._lead) + found.end
            parts.append(Part("text", text[:end]))
            self._buffer, self._state = text[end:], self._read_text
            return True
        self._buffer = self._buffer[found.end :]
        parts += [call._replace(call_index=index) for index, call in enumerate(found.calls, self._num_calls)]
        self._num_calls += len(found.calls)
        self._arguments, self._closers, self._in_list = found.arguments, [*found.closers], found.in_list
        self._state = self._read_rest
        return True

    def _read_rest(self, parts: list[Part], final: bool) -> bool:
        """The arguments of a call that has begun, as they come, and what closes it."""
        if self._arguments is not None:
            end, text, ended = self._arguments.read(self._buffer, final=final)
            self._buffer = self._buffer[end:]
            parts += [Part("call", text, None, self._num_calls - 1)] if text else []
            if not ended:
                return False
            self._arguments = None
        while self._closers:
            closer, rest = self._closers[0], self._buffer.lstrip()
            rest = re.sub("^,[^][{}<]*", "", rest) if closer == "}" else rest  # other fields, such as an id
            if rest.startswith(closer):
                self._buffer = rest.removeprefix(closer)
                self._in_list &= closer != "]"
            elif closer.startswith(rest) and not final:
                return False
            self._closers.pop(0)
        self._state = self._read_text
        return True


class Field(NamedTuple):
    """A function, or one of its arguments: its name and schema, and the field that this is from.

    binds: the schema has to be followed, or the request is refused. needed: the argument must be there.
    """

    name: str
    schema: dict[str, Any]
    param: str
    binds: bool
    room: list[int]  # one number: characters of schemas that there may be still
    needed: bool = True

    def json(self, otherwise: dict[str, Any], whitespace: str = "compact") -> Form:
        form = {"kind": "json", "text": json.dumps(self.schema), "whitespace": whitespace, "param": self.param}
        self.take(len(form["text"]))
        return form if self.binds else {**form, "or": {**form, "text": json.dumps(otherwise)}}

    def take(self, size: int) -> None:
        """Raises: RequestError before schemas with many parts in common make a form that is out of all proportion."""
        self.room[0] -= size
        if self.room[0] < 0:
            raise RequestError(f"tools: their calls take more than {MAX_TEXT} characters to describe", param="tools")

    def branches(self, schema: dict[str, Any]) -> list[Any]:
        self.take(8 + len(schema) * len(kinds := listed(schema, "type")) + len(listed(schema, "anyOf")))
        branches = [{**schema, "type": kind} for kind in kinds] or schema.get("anyOf")
        return branches if isinstance(branches, list) and all(isinstance(branch, dict) for branch in branches) else []

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
    room = [MAX_TEXT]
    functions = [
        Field(f["name"], _of_object(f), f"tools[{at}].function.parameters", required or f.get("strict") is True, room)
        for at, f in enumerate(tool["function"] for tool in tools)
        if f["name"] in names
    ]
    spec, choices = TOOL_PARSERS[parser or UNKNOWN], []
    for layout in spec.layouts:
        opening, closing = layout.call.split("$arguments")
        calls = [[opening.replace("$name", f.name), _arguments(spec.language, f), closing] for f in functions]
        many = {"many": {"any": calls}, "between": layout.between} if parallel else {"any": calls}
        choices.append([*layout.before, many, *layout.after])
    return {"any": choices}


def _of_object(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of its arguments: of an object, and without parameters of an empty one."""
    schema = {key: value for key, value in (function.get("parameters") or {}).items() if value is not None}
    if not any(key in schema for key in ("properties", *_OTHER)):
        schema["properties"] = {}
    return schema if "$ref" in schema else {**schema, "type": "object"}


def _arguments(language: str, function: Field) -> Form:
    """The form of a call's arguments. Parameters that the function does not need may be missing."""
    if language == "json":
        return function.json(_OBJECT)
    fields = _fields(function)
    if wrong := [field.param for field in fields if not re.fullmatch(BARE[language], field.name)]:
        raise RequestError(f"{wrong[0]}: this model's format of calls cannot have this name", param=wrong[0])
    if language == "tags":
        return [field.maybe([f"<parameter={field.name}>\n", _value(field)]) for field in fields]
    named = language == "names"
    first = next((index for index, field in enumerate(fields) if field.needed), len(fields))
    function.take(8 * first * len(fields))  # as each of the first ones may be left out
    items = [[f"{f.name}:", _value(f, *_QUOTES)] if named else [f"{f.name}=", f.json({}, "python")] for f in fields]
    behind = [field.maybe(["," if named else ", ", item]) for field, item in zip(fields, items, strict=True)]
    starts: list[Form] = [[item, *behind[index + 1 :]] for index, item in enumerate(items[: first + 1])]
    return {"any": starts if first < len(items) else [*starts, []]}


_END, _STOP, _QUOTES = "\n</parameter>\n", r"\n<\/parameter>\n", ('<|"|>', '<|"|>')


def _value(field: Field, begin: str = "", end: str = _END) -> Form:
    """An argument before the end of its tag, or as Gemma 4 writes it: strings as they are from `begin` on, and JSON."""
    schema, shared = resolved(field.schema, field.schema), definitions(field.schema)
    if (found := leaves(schema, field.schema, field.branches)) and found[0] is not schema:
        return {"any": [_value(field._replace(schema=shared | branch), begin, end) for branch in found]}
    tail = "" if begin else end
    if values := literals(schema):
        field.take(len(json.dumps(values)))
        return {"any": [[begin, one, end] if isinstance(one, str) else [json.dumps(one), tail] for one in values]}
    if schema.get("type") != "string":
        return [field.json({}), tail]
    patterns = [PATTERNS[name] for name in (str(schema.get("format")),) if name in PATTERNS]
    patterns += [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
    least, most = schema.get("minLength") or 0, schema.get("maxLength")
    patterns += [f"^(?s:.{{{least},{'' if most is None else most}}})$"] if least or most is not None else []
    if not patterns:
        return [begin, {"until": end}]
    value = " & ".join(f"/{_searched(pattern)}/" for pattern in patterns)
    field.take(len(value))
    # Its end comes once. Long ones take the shortest match: states for each length and each part of it would be many.
    v, early = ("v[lazy]", f"{{0,{least}}}") if tail and type(most) is int and most > 255 else ("v", "*")
    value = f"(({value}) {json.dumps(tail)}) & ~/(?s:.{early}){_STOP}(?s:.+)/" if tail else value
    form = {"kind": "grammar", "text": f"start: v\n{v}: V\nV: {value}", "param": field.param, "then": end[len(tail) :]}
    return [begin, form if field.binds else {**form, "or": {"until": end}}]


def _searched(pattern: str) -> str:
    """A pattern of JSON schema, which matches anywhere, as one that matches the whole."""
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern[start : len(pattern) - end])
    return f"{'' if start else '(?s:.*)'}({inner}){'' if end else '(?s:.*)'}"


def _fields(whole: Field) -> list[Field]:
    """The arguments of a function. Raises: RequestError when its schema has no list of them."""
    schema = resolved(whole.schema, whole.schema)
    fields = schema.get("properties") or {}
    if any(schema.get(key) not in (None, True, False, {}) for key in _OTHER) or not isinstance(fields, dict):
        message = f"{whole.param} must be an object of named properties, for this model's format of calls"
        raise RequestError(message, param=whole.param)
    shared, needed = definitions(whole.schema), [*map(str, listed(schema, "required"))]
    if schema.get("additionalProperties") is not False:  # what is required may be named there alone
        fields = {name: fields.get(name, {}) for name in (*fields, *needed)}
    return [
        whole._replace(name=name, schema=shared | own, param=f"{whole.param}.properties.{name}", needed=name in needed)
        for name, schema in fields.items()
        if isinstance(own := {} if schema is True else schema, dict)
    ]
