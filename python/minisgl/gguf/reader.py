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
from minisgl.utils.fields import Fields

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


class _List(NamedTuple):
    """A list that is still in the file."""

    kind: int
    num_items: int
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
        if self.data[:4] != b"GGUF":
            is_pointer = self.data[:19] == b"version https://git"
            raise self.wrong("it is a Git LFS pointer; run git lfs pull" if is_pointer else "it is no GGUF file")
        if (version := self._number("<I")) not in (2, 3):
            raise self.wrong(f"it is of version {version} of the format, or of another byte order (supported: 2, 3)")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors + num_keys > _MAX_ENTRIES:
            raise self.wrong(f"it says that it has {num_tensors} tensors and {num_keys} keys")
        metadata = dict(self._entry() for _ in range(num_keys))
        self.metadata = Fields(metadata, str(path))
        self.tensors = self._placed([self._tensor() for _ in range(num_tensors)])

    def wrong(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.path}: {reason}")

    def values(self, prefix: str = "") -> Fields:
        """The metadata whose keys begin so: numbers, texts, and lists of them."""
        found = {key: value for key, value in self.metadata.data.items() if key.startswith(prefix)}
        items = {key: self._items(*value) for key, value in found.items() if isinstance(value, _List)}
        return Fields(found | items, str(self.path))

    def release(self) -> None:
        """Give back the memory of what was read of the file; whoever looks again reads again."""
        self.data.madvise(mmap.MADV_DONTNEED)

    def _items(self, kind: int, count: int, offset: int) -> list[Any]:
        if kind != _TEXT:
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind][1]}", self.data, offset))
        texts, data, at = list[str](), self.data, offset
        for _ in range(count):
            begin = at + 8
            at = begin + _size_at(data, at)[0]
            texts.append(data[begin:at].decode(errors="replace"))
        return texts

    def _entry(self) -> tuple[str, Any]:
        key, kind = self._text(), self._number("<I")
        if kind in _SCALARS:
            return key, self._number(_SCALARS[kind])
        if kind == _TEXT:
            return key, self._text()
        of, count = (self._number("<I"), self._number("<Q")) if kind == _LIST else (kind, 0)
        if of not in _SCALARS and of != _TEXT:
            raise self.wrong(f"{key[:100]!r} is of a type that is unknown, or a list of lists ({of})")
        begin = self._at
        size = self._texts_size(count) if of == _TEXT else count * struct.calcsize(_SCALARS[of])
        self._take(size)
        return key, _List(of, count, begin)

    def _texts_size(self, count: int) -> int:
        """Bytes of the texts ahead: there may be hundreds of thousands. Too many where they go beyond the file."""
        at, last, data = self._at, len(self.data) - 8, self.data
        while count and at <= last:
            at, count = at + 8 + _size_at(data, at)[0], count - 1
        return at - self._at + 8 * count

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

    def _placed(self, tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors with their offsets from the file's beginning, by name. One lies behind the other."""
        alignment, placed = self.metadata.integer("general.alignment", 32, 8), dict[str, StoredTensor]()
        if alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {alignment}, which is no power of 2")
        start = end = -(-self._at // alignment) * alignment
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            begin = start + tensor.offset
            if begin % alignment or begin < end or tensor.name in placed:
                raise tensor.wrong(f"cannot be at byte {begin}, or is there twice")
            end = begin + tensor.num_bytes
            if end > len(self.data):
                raise tensor.wrong(f"ends at byte {end} of {len(self.data)}: the file was cut off")
            placed[tensor.name] = replace(tensor, offset=begin)
        return placed

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
