"""Fields of bodies: what models of them are made of, without conversions of values, and what becomes of each field.
`fields.yaml` says it of those that no model of a body has.

A field is known: something is made of it. Or it would change the answer and is not supported: it is refused, unless its
value asks for nothing. Or it is neither: it is ignored, and the client and the log are told so."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, cast

import msgspec
import pydantic
from pydantic_core import from_json

from minisgl.core import MAX_COUNT, Range
from minisgl.errors import RequestError
from minisgl.server.errors import MAX_SHOWN, refuse_unless, shown

T = TypeVar("T")
SCHEMAS: dict[str, dict[str, Any]] = msgspec.yaml.decode(Path(__file__).with_name("schemas.yaml").read_bytes())


class Body(pydantic.BaseModel):
    """Strict: no conversion of strings to numbers. Fields that it has not are left out before (`fields.Reading`)."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)
    inner: ClassVar[Mapping[str, type[pydantic.BaseModel]]] = {}  # fields whose objects have the fields of a body


def whole(value: Any) -> Any:
    """Whole numbers may be written with a fraction, 16.0, as JavaScript and Lua do not tell them apart."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [whole(item) for item in value] if isinstance(value, list) and {float, list} & {*map(type, value)} else value


WHOLE = pydantic.BeforeValidator(whole)
Count = Annotated[int, WHOLE]
MaxTokens = Annotated[Count, pydantic.Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, pydantic.WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 2**31 - 1})]
Items = Annotated[list[T], pydantic.Field(fail_fast=True)]  # a list of which one wrong item is enough
Object = dict[str, Any]


def _of_some_model(ids: list[int], info: pydantic.ValidationInfo) -> list[int]:
    bad = next((token for token in ids if not 0 <= token < 2**31), None)
    refuse_unless(bad is None, f"{info.field_name}: {bad} is not a token id", str(info.field_name))
    return ids


Ids = Annotated[Items[TokenId], WHOLE, pydantic.AfterValidator(_of_some_model)]


def optional(text: str, within: Range | None = None, **schema: Any) -> Any:
    """A field that may be left out, which is what null means too. text, schema: for the OpenAPI document."""
    low, high = (None, None) if within is None else (within.lowest, within.highest)
    return pydantic.Field(None, description=text, ge=low, le=high, json_schema_extra=schema or None)


MAX_IGNORED = 64  # names of one request that are remembered

B = TypeVar("B", bound=Body)
Refused = dict[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields an object in a request may have.

    known: something is made of them. refused: not supported, with the values beside null that ask for nothing.
    ignored: OpenAI's, without bearing on the answer. nested: those that are objects, or lists of objects. others: names
    that other servers have for known fields. by, kinds: the field that says of which kind the object is, and the fields
    of each kind. any_name: all are known, they are names that the client gives. left_out: the whole object is
    ignored. in_lists: an object that is in none is another.
    """

    known: Collection[str] = ()
    refused: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    ignored: Collection[str] = ()
    nested: Mapping[str, "Fields"] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    by: str = ""
    kinds: Mapping[str, "Fields"] = field(default_factory=dict)
    any_name: bool = False
    left_out: bool = False
    in_lists: bool = False

    def of(self, given: Mapping[str, Any]) -> "Fields":
        kind = given.get(self.by)
        return self.kinds.get(kind, self) if isinstance(kind, str) else self

    def refuses(self, name: str, value: Any) -> bool:
        """Values are compared as in JSON, where false is not 0."""
        nothing = self.refused.get(name, (value,))
        return not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in nothing)


@dataclass(slots=True)
class Reading:
    """The reading of one request. strict: what would be ignored is refused.

    ignored: the fields that were, `messages[].id`, with the known ones beside each.
    """

    strict: bool = False
    ignored: dict[str, Collection[str]] = field(default_factory=dict)

    def read(self, given: Any, fields: Fields, where: str = "") -> Any:
        """The object, or list of objects, with known fields only; null is the same as leaving a field out.

        Raises: RequestError naming a field that is refused.
        """
        if isinstance(given, list):
            return [self.read(item, fields, f"{where}[{index}]") for index, item in enumerate(given)]
        if not isinstance(given, dict):
            return given
        kind, fields = given.get(fields.by), fields.of(given)
        if fields.any_name and fields.by:  # of no kind that we know: a client's own data
            return given
        if fields.left_out:
            self.ignore(f"{where}.{kind}", fields)
            return {"type": kind}
        kept = {}
        for name, value in given.items():
            if value is None:
                continue
            here = f"{where}.{shown(name)}" if where else shown(name)
            meant = fields.others.get(name, name)
            unknown = meant not in fields.known or (meant != name and given.get(meant) is not None)
            if unknown and fields.refuses(name, value):
                raise RequestError(f"{here} is not supported", param=here, code="unsupported_parameter")
            inner = fields.nested.get(meant)
            if inner is not None and not (inner.in_lists and isinstance(value, dict)):
                value = self.read(value, inner, here)
            if not unknown or fields.any_name:
                kept[meant] = value
            else:
                self.ignore(here, fields, needless=name in fields.refused or name in fields.ignored)
        return kept

    def ignore(self, where: str, fields: Fields, *, needless: bool = False) -> None:
        """needless: it asks for nothing, so there is nothing that the client may have meant instead.

        Raises: RequestError if that is not to be.
        """
        if self.strict and not needless:
            raise RequestError(f"unknown field: {where}", param=where, code="unknown_parameter")
        if len(self.ignored) < MAX_IGNORED:
            self.ignored.setdefault(re.sub(r"\[\d+\]", "[]", where), () if needless else fields.known)


_TABLE = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())
NO_EFFECT = frozenset(_TABLE["no_effect"].split())
OTHER_NAMES: dict[str, str] = _TABLE["other_names"]
KEYS: dict[str, dict[str, str]] = _TABLE["names_for_chats"]
EMPTY = tuple(_TABLE["refused"][0]["unless"])
UNSUPPORTED: Refused = {
    name: tuple(group["unless"])
    for group in _TABLE["refused"]
    for key in group.keys() - {"unless"}
    for name in group[key].split()
}


def _objects() -> dict[str, Fields]:
    made: dict[str, Fields] = {}
    for name, entry in _TABLE["objects"].items():
        words = {key: tuple(entry.get(key, "").split()) for key in ("known", "ignored", "refused")}
        entry |= {**words, "refused": dict.fromkeys(words["refused"], EMPTY)}
        entry["nested"] = {field: made[of] for field, of in entry.get("nested", {}).items()}
        entry["kinds"] = {kind: made[of] for of, kinds in entry.get("kinds", {}).items() for kind in kinds.split()}
        made[name] = Fields(**entry)
    return made


OBJECTS = _objects()
_WRAPPED = Fields((), {**UNSUPPORTED, **dict.fromkeys(_TABLE["wrapped"].split(), ())})
_NESTED = {name: OBJECTS[of] for name, of in _TABLE["nested"].items()}
_NESTED |= dict.fromkeys(_TABLE["wrappers"].split(), _WRAPPED)


# Halves of characters beyond 16 bits, where a client has cut a text between them; and what looks like one.
_HALVES = re.compile(rb"\\(?:(\\|u[dD][89abAB]%b\\u[dD][c-fC-F]%b)|u[dD][89a-fA-F]%b)" % ((b"[0-9a-fA-F]{2}",) * 3))


def load_object(data: bytes, model: type[Body], reading: Reading | None = None) -> dict[str, Any]:
    """The body of such a model, as `Reading.read` leaves it.

    Raises: RequestError when it is no JSON object, or has refused fields.
    """
    try:
        raw = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        mended = _HALVES.sub(lambda found: found[0] if found[1] else rb"\ufffd", data)
        if mended != data:
            return load_object(mended, model, reading)
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object")
    return cast(dict[str, Any], (reading or Reading()).read(raw, fields_of(model)))


def load(model: type[B], data: bytes, reading: Reading | None) -> B:
    """The body, checked. Raises: RequestError."""
    return validate(model, load_object(data, model, reading))


@cache
def fields_of(model: type[Body]) -> Fields:
    """The fields that a body may have."""
    known, own = frozenset(model.model_fields), _TABLE["bodies"].get(model.__name__, {})
    if own.get("alone"):
        return Fields(known)
    refused: Refused = UNSUPPORTED | {name: tuple(values) for name, values in own.get("refused", {}).items()}
    refused |= dict.fromkeys(_TABLE["wrapped"].split() if own.get("wrapped") else (), ())
    return Fields(
        known,
        {name: unless for name, unless in refused.items() if not {name, OTHER_NAMES.get(name)} & known},
        NO_EFFECT - known,
        _NESTED
        | {name: OBJECTS[of] for name, of in own.get("nested", {}).items()}
        | {name: fields_of(inner) for name, inner in model.inner.items()},
        {old: of for old, of in (OTHER_NAMES | own.get("other_names", {})).items() if old not in known and of in known},
    )


_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


def validate(model: type[B], raw: Any) -> B:
    """Raises: RequestError naming the first field at fault."""
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        raise _refusal(error, raw) from None


def _refusal(error: pydantic.ValidationError, raw: Any) -> RequestError:
    """The first problem, in one line: of several ways to read a value, that of the one that got furthest."""
    problems = error.errors(include_url=False, include_context=False)
    problem = max((p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]), key=lambda p: len(p["loc"]))
    param = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
            raw = raw[part] if isinstance(raw, list) and part < len(raw) else None
        elif (isinstance(raw, dict) and part in raw) or problem["type"] == "missing":
            param += f".{shown(part)}" if param else shown(part)
            raw = raw.get(part) if isinstance(raw, dict) else None
        # else it is pydantic's name for a member of a union
    if problem["type"] == "missing":
        return RequestError(f"{param} is required", param=param or None, code="missing_required_parameter")
    said = re.sub(r"dictionary( or instance of \w+)?", "object", problem["msg"])
    message = f"{param}: {said[:1].lower()}{said[1:]}"
    if problem["type"].endswith(("_type", "_equal", "greater_than")):
        message += f", not {_KINDS.get(type(problem['input'])) or json.dumps(problem['input'])[:MAX_SHOWN]}"
    return RequestError(message, param=param or None, code="invalid_value")
