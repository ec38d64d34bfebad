"""JSON objects that somebody else wrote, read with care."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from minisgl.errors import ConfigError

T = TypeVar("T")
MAX_INT, MAX_NUMBER = 2**31 - 1, 1e300
_PLURALS: dict[type, str] = {str: "strings", int: "whole numbers", float: "numbers"}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, objects within objects likewise."""
    both = [key for key, new in changes.items() if isinstance(base.get(key), dict) and isinstance(new, dict)]
    return {**base, **changes, **{key: merge(base[key], changes[key]) for key in both}}


class Fields:
    """A JSON object. null is the same as leaving a key out, and gives the default.

    source: the file, for messages. Every reader raises ConfigError when the value is of another kind than it says."""

    def __init__(self, data: Mapping[str, Any], source: str, path: str = "") -> None:
        self.data, self.source, self._path = data, source, path

    def wrong(self, key: str, expected: str) -> ConfigError:
        """The error to raise for a value that is not what it must be."""
        value = reprlib.repr(self.data.get(key))
        return ConfigError(f"{self.source}: {self._path}{key} must be {expected}, not {value}")

    def integer(self, key: str, default: T, least: int = 1, most: int = MAX_INT) -> int | T:
        expected = f"a whole number of at least {least}" if most == MAX_INT else f"a whole number, {least} to {most}"
        return self._read(key, default, lambda value: type(value) is int and least <= value <= most, expected)

    def number(self, key: str, default: T, above: float = -MAX_NUMBER) -> float | T:
        expected = "a number" if above == -MAX_NUMBER else f"a number above {above:g}"
        return self._read(key, default, lambda v: type(v) in (int, float) and above < v < MAX_NUMBER, expected)

    def boolean(self, key: str, default: T) -> bool | T:
        return self._read(key, default, lambda value: type(value) is bool, "true or false")

    def text(self, key: str, default: T) -> str | T:
        return self._read(key, default, lambda value: type(value) is str, "a string")

    def list_of(self, kind: type[T], key: str) -> list[T]:
        expected = f"a list of {_PLURALS[kind]}"
        return self._read(key, [], lambda value: type(value) is list and {*map(type, value)} <= {kind}, expected)

    def child(self, key: str) -> "Fields":
        """The object at `key`; an empty one where there is none."""
        data = self._read(key, {}, lambda value: isinstance(value, dict), "an object")
        return Fields(data, self.source, f"{self._path}{key}.")

    def _read(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        value = self.data.get(key)
        if value is not None and not fits(value):
            raise self.wrong(key, expected)
        return default if value is None else value
