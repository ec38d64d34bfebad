"""JSON against the `openai` package's own pydantic models: no field missing, none of another type, none too many."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, TypeAdapter


def validated(kind: Any, data: str | bytes, extensions: tuple[str, ...] = ()) -> Any:
    """The JSON as `kind` (a model, or a union of models). extensions: fields that we document and OpenAI does not have.

    Raises: pydantic.ValidationError, AssertionError.
    """
    made = TypeAdapter(kind).validate_json(data, strict=True)
    _no_extras(made, extensions, "")
    return made


def _no_extras(value: Any, extensions: tuple[str, ...], where: str) -> None:
    if isinstance(value, BaseModel):
        extras = [name for name in value.model_extra or {} if name not in extensions]
        assert not extras, f"{where or type(value).__name__} has fields that OpenAI's has not: {extras}"
        for name in value.model_fields_set:
            _no_extras(getattr(value, name, None), extensions, f"{where}.{name}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _no_extras(item, extensions, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _no_extras(item, extensions, f"{where}[{index}]")
