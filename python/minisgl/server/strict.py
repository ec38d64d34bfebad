"""JSON bodies, taken literally: no conversions, no unknown fields, and one line that names what is wrong."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from minisgl.errors import RequestError


class Body(BaseModel):
    """Strict: no conversion of strings to numbers; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


B = TypeVar("B", bound=BaseModel)


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
    return RequestError(message, param=param or None)
