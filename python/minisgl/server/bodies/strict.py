"""What models of JSON bodies are made of: types without conversions, and how values are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema

from minisgl.core import MAX_COUNT, Range
from minisgl.errors import RequestError

MAX_SHOWN = 64  # characters of a client's name for something, in messages
T = TypeVar("T")
S = TypeVar("S", bound=Sized)
SCHEMAS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("schemas.yaml").read_text(encoding="utf-8")
)


class Body(BaseModel):
    """Strict: no conversion of strings to numbers. Fields that it has not are left out before (`fields.Reading`)."""

    model_config = ConfigDict(extra="ignore", strict=True)
    inner: ClassVar[Mapping[str, type[BaseModel]]] = {}  # fields whose objects have the fields of a body


def whole(value: Any) -> Any:
    """Whole numbers may be written with a fraction, 16.0, as JavaScript and Lua do not tell them apart."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [whole(item) for item in value] if isinstance(value, list) and {float, list} & {*map(type, value)} else value


WHOLE = BeforeValidator(whole)
Count = Annotated[int, WHOLE]
MaxTokens = Annotated[Count, Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 2**31 - 1})]
Items = Annotated[list[T], Field(fail_fast=True)]  # a list of which one wrong item is enough
Object = dict[str, Any]


def refuse_unless(holds: object, message: str, param: str) -> None:
    """Raises: RequestError."""
    if not holds:
        raise RequestError(message, param=param)


def at_most(most: int, what: str, name: str, values: S) -> S:
    """The values of a field. Raises: RequestError when there are more."""
    refuse_unless(len(values) <= most, f"{name} must hold at most {most} {what}, not {len(values)}", name)
    return values


def _of_some_model(ids: list[int], info: ValidationInfo) -> list[int]:
    bad = next((token for token in ids if not 0 <= token < 2**31), None)
    refuse_unless(bad is None, f"{info.field_name}: {bad} is not a token id", str(info.field_name))
    return ids


Ids = Annotated[Items[TokenId], WHOLE, AfterValidator(_of_some_model)]


def shown(name: str) -> str:
    """A client's name for something, fit for one line."""
    text = name[: MAX_SHOWN + 1] or '""'
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def optional(text: str, within: Range | None = None, **schema: Any) -> Any:
    """A field that may be left out, which is what null means too. text, schema: for the OpenAPI document."""
    low, high = (None, None) if within is None else (within.lowest, within.highest)
    return Field(None, description=text, ge=low, le=high, json_schema_extra=schema or None)
