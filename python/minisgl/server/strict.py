"""JSON bodies, taken literally: no conversions, no unknown fields, and one line that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import from_json

from minisgl.errors import RequestError


class Body(BaseModel):
    """Strict: no conversion of strings to numbers; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


B = TypeVar("B", bound=BaseModel)
SCHEMA_REF = "#/components/schemas/{model}"
TokenId = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 2**31 - 1})]


def optional(
    text: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None, **schema: Any
) -> Any:
    """A field that may be left out, which is what null means too. text, schema: for the OpenAPI document."""
    return Field(None, description=text, ge=ge, gt=gt, le=le, json_schema_extra=schema or None)


def beside(no_effect: Iterable[str], unsupported: Mapping[str, Sequence[Any]]) -> Callable[[dict[str, Any]], None]:
    """Tells the OpenAPI document of fields that are taken out before a model sees them."""

    def extend(schema: dict[str, Any]) -> None:
        properties = schema["properties"]
        for name in sorted(no_effect):
            properties[name] = {"description": "Accepted, without effect."}
        for name, neutral in unsupported.items():
            properties[name] = {"description": "Not supported; these values ask for nothing.", "enum": [None, *neutral]}

    return extend


def asks_for_nothing(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether it is null, or one of these values as JSON knows them: there, false is not 0."""
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than_equal")


def load_object(data: bytes) -> dict[str, Any]:
    """Raises: RequestError when it is no JSON object."""
    try:
        raw = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object")
    return raw


def validate(model: type[B], raw: Any, where: str = "") -> B:
    """where: it stands in the body. Raises: RequestError naming the first field at fault."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error, where) from None


def _refusal(error: ValidationError, where: str) -> RequestError:
    """The first problem, in one line."""
    problem = error.errors(include_url=False, include_context=False)[0]
    path = [part for part in problem["loc"] if isinstance(part, int) or part.isidentifier()]
    param = where
    for part in path:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part not in ("str", "int", "float", "bool"):  # pydantic's names for the members of a union
            param += f".{part}" if param else part
    if problem["type"] == "extra_forbidden":
        message = f"unknown field: {param}"
    elif problem["type"] == "missing":
        message = f"{param} is required"
    else:
        message = f"{param}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
        if problem["type"] in _OUT_OF_RANGE:
            message += f", not {problem['input']}"
    return RequestError(message, param=param or None)
