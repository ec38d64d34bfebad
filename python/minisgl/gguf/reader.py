"""The header of a GGUF file, read without trust: metadata by key, and where each tensor's bytes are.

The `gguf` package's reader makes objects of every token before anybody asks (seconds for a large vocabulary), and goes
wherever a length points. Here nothing is read beyond the file, and lists stay in it until they are wanted.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minisgl.errors import ConfigError

NAMES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("names.yaml").read_text(encoding="utf-8"))
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _LIST = 8, 9
_size_at = struct.Struct("<Q").unpack_from
_MAX_ENTRIES = 2**17  # keys, or tensors: more than any model has
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PRIVATE = mmap.MAP_PRIVATE | 0x4000  # MAP_NORESERVE: torch wants memory that may be written, which nobody does


class Kind(NamedTuple):
    """How a type of tensors lies in memory. values, num_bytes: of a block; scales: where in it float16 scales are."""

    name: str
    values: int
    num_bytes: int
    scales: tuple[int, ...] = ()

    def row_bytes(self, num_values: int) -> int:
        return num_values // self.values * self.num_bytes


KINDS = {i: Kind(name, values, size, tuple(at)) for i, (name, values, size, at) in NAMES["types"].items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """shape: as in torch, [out, in]; offset: in the file."""

    name: str
    file: GgufFile
    kind: Kind
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])

    def wrong(self, reason: str) -> ConfigError:
        return self.file.wrong(f"tensor {self.name} {reason}")


@dataclass(frozen=True, slots=True)
class _List:
    """A list that is still in the file."""

    kind: int
    count: int
    offset: int


class GgufFile:
    """data: the bytes of the file, mapped; metadata: by key, lists for `values`; tensors: by name.

    Raises: ConfigError naming the file, and what it is or lacks.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 4
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, flags=_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:  # the latter: it is empty
            raise ConfigError(f"cannot read {str(path)!r}: {error}") from None
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        if self.data[:4] != b"GGUF":
            is_pointer = self.data[:19] == b"version https://git"
            raise self.wrong("it is a Git LFS pointer; run git lfs pull" if is_pointer else "it is no GGUF file")
        if (version := self._number("<I")) not in (2, 3):
            raise self.wrong(f"it is of version {version} of the format, or of another byte order (supported: 2, 3)")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors + num_keys > _MAX_ENTRIES:
            raise self.wrong(f"it says that it has {num_tensors} tensors and {num_keys} keys")
        for _ in range(num_keys):
            key = self._text()
            self.metadata[key] = self._value(key)
        self._place([self._tensor() for _ in range(num_tensors)])

    def wrong(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: {reason}")

    def integer(self, key: str, default: int = 0) -> int:
        """Raises: ConfigError when it is something else."""
        value = self.metadata.get(key, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise self.wrong(f"{key} must be a whole number below {2**31}, not {value!r:.40}")
        return value

    def values(self, prefix: str) -> dict[str, Any]:
        """The metadata whose keys begin so: numbers, texts, and lists of them."""
        found = {key: value for key, value in self.metadata.items() if key.startswith(prefix)}
        return {key: self._items(value) if isinstance(value, _List) else value for key, value in found.items()}

    def release(self) -> None:
        """Give back the memory of what was read of the file; whoever looks again reads again."""
        self.data.madvise(mmap.MADV_DONTNEED)

    def _items(self, of: _List) -> list[Any]:
        if of.kind != _TEXT:
            return list(struct.unpack_from(f"<{of.count}{_SCALARS[of.kind][1]}", self.data, of.offset))
        texts, data, at = list[str](), self.data, of.offset
        for _ in range(of.count):
            begin = at + 8
            at = begin + _size_at(data, at)[0]
            texts.append(data[begin:at].decode(errors="replace"))
        return texts

    def _value(self, key: str) -> Any:
        kind, count = self._number("<I"), 0
        if kind == _TEXT:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _LIST:
            kind, count = self._number("<I"), self._number("<Q")
        begin, total = self._at, count
        if kind == _TEXT:
            at, last = begin, len(self.data) - 8
            while count and at <= last:  # hundreds of thousands
                at, count = at + 8 + _size_at(self.data, at)[0], count - 1
            self._take(at - begin + 8 * count)
        elif kind in _SCALARS:
            self._take(count * struct.calcsize(_SCALARS[kind]))
        else:
            raise self.wrong(f"{key[:100]!r} is of a type that is unknown, or a list of lists ({kind})")
        return _List(kind, total, begin)

    def _tensor(self) -> StoredTensor:
        name, num_dims = ascii(self._text())[1:-1][:100], self._number("<I")
        shape = tuple(self._number("<Q") for _ in range(min(num_dims, 4)))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if number not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            kind_name = NAMES["others"].get(number, number)
            raise self.wrong(f"tensor {name} is of type {kind_name}, not supported (supported: {known})")
        kind = KINDS[number]
        if not 1 <= num_dims <= 4 or not 0 < prod(shape) < 2**50 or shape[-1] % kind.values:
            raise self.wrong(f"tensor {name} cannot be {kind.name} of {num_dims} dimensions, {list(shape)}")
        return StoredTensor(name, self, kind, shape, offset)

    def _place(self, tensors: list[StoredTensor]) -> None:
        """Keep the tensors, with their offsets from the file's beginning. One lies behind the other."""
        alignment = self.integer("general.alignment", 32)
        if alignment < 8 or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {alignment}, which is no power of 2, or below 8")
        start = end = -(-self._at // alignment) * alignment
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            begin = start + tensor.offset
            if begin % alignment or begin < end or tensor.name in self.tensors:
                raise tensor.wrong(f"cannot be at byte {begin}, or is there twice")
            end = begin + tensor.num_bytes
            if end > len(self.data):
                raise tensor.wrong(f"ends at byte {end} of {len(self.data)}: the file was cut off")
            self.tensors[tensor.name] = replace(tensor, offset=begin)

    def _take(self, size: int) -> int:
        """Go forward by `size` bytes; → where they begin."""
        begin = self._at
        if size > len(self.data) - begin:
            raise self.wrong(f"byte {begin} of {len(self.data)} is followed by {size} more: the file was cut off")
        self._at += size
        return begin

    def _number(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self._take(struct.calcsize(form)))[0]

    def _text(self) -> str:
        size = self._number("<Q")
        begin = self._take(size)
        return self.data[begin : begin + size].decode(errors="replace")


def parts_of(path: Path) -> list[Path]:
    """All files of a model, in their order. Raises: ConfigError naming those that are missing."""
    match = _PART.fullmatch(path.name)
    count = int(match[3]) if match else 0
    parts = [path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count) if match]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ConfigError(f"{str(path)!r} is incomplete: {', '.join(missing[:8])} missing")
    return parts or [path]


def models_in(folder: Path, patterns: Sequence[str] = ()) -> list[Path]:
    """The GGUF files in a directory, of each model the first part; or all below it whose names fit a pattern."""
    paths = sorted(folder.rglob("*.gguf") if patterns else folder.glob("*.gguf"))
    names = {path: path.relative_to(folder).as_posix() for path in paths if not path.name.startswith("mmproj")}
    fitting = [path for path in names if not patterns or any(fnmatch(names[path], pattern) for pattern in patterns)]
    return [path for path in fitting if (part := _PART.fullmatch(path.name)) is None or part[2] == "00001"]
