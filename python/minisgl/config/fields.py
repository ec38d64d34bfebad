"""JSON objects of a model's files, read by type: a value of the wrong kind is one line with file, key and value."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from minisgl.errors import ConfigError
from minisgl.utils.hf_tokenizer import lfs_hint

T = TypeVar("T")
MAX_INT = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises: ConfigError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {lfs_hint(path) or error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} does not hold a JSON object")
    return data


def read_fields(path: Path) -> Fields:
    """The fields of a JSON file; none where there is no such file. Raises: ConfigError naming the file."""
    return Fields(read_json(path) if path.is_file() else {}, str(path))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, objects within objects likewise."""
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


class Fields:
    """A JSON object. null is the same as leaving a key out, and gives the default.

    source: the file, for messages. Every reader raises ConfigError when the value is of another kind than it says.
    """

    def __init__(self, data: Mapping[str, Any], source: str, path: str = "") -> None:
        self._data, self.source, self._path = data, source, path

    def get(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        return self._data.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._data.items()

    def wrong(self, key: str, expected: str) -> ConfigError:
        """The error to raise for a value that is not what it must be."""
        return ConfigError(f"{self.source}: {self._path}{key} must be {expected}, not {reprlib.repr(self.get(key))}")

    def integer(self, key: str, default: T, least: int = 1, most: int = MAX_INT) -> int | T:
        expected = f"a whole number of at least {least}" if most == MAX_INT else f"a whole number, {least} to {most}"
        return self._read(key, default, lambda value: _is_integer(value) and least <= value <= most, expected)

    def number(self, key: str, default: T, above: float = -math.inf) -> float | T:
        expected = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
        value = self._read(key, default, lambda value: _is_number(value) and value > above, expected)
        return float(value) if isinstance(value, int) and value is not default else value

    def boolean(self, key: str, default: T) -> bool | T:
        return self._read(key, default, lambda value: isinstance(value, bool), "true or false")

    def text(self, key: str, default: T) -> str | T:
        return self._read(key, default, lambda value: isinstance(value, str), "a string")

    def texts(self, key: str) -> list[str]:
        return self._read(key, [], lambda value: _is_list(value, str), "a list of strings")

    def integers(self, key: str) -> list[int]:
        return self._read(key, [], lambda value: _is_list(value, int), "a list of whole numbers")

    def child(self, key: str) -> Fields:
        """The object at `key`; an empty one where there is none."""
        data: Mapping[str, Any] = self._read(key, {}, lambda value: isinstance(value, dict), "an object")
        return Fields(data, self.source, f"{self._path}{key}.")

    def _read(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.get(key)
        if value is None:
            return default
        if not fits(value):
            raise self.wrong(key, expected)
        return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, float):
        return _is_integer(value) and abs(value) < 1 << 1000
    return math.isfinite(value)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
