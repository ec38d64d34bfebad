"""Files of tensors, read in parts. They are mapped into memory, and pages that were read count as resident until the
file is closed, so it is reopened every `REOPEN_BYTES`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from minisgl.errors import ConfigError
from minisgl.utils.hf_tokenizer import lfs_hint

REOPEN_BYTES = 16 << 20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Shard:
    """One file, of safetensors or of `torch.save`. Of the latter nothing but tensors is unpickled. `close` gives its
    pages back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, Any] | None = None  # or slices of safetensors
        self._num_bytes = 0
        self._is_mapped = True

    def tensors(self) -> dict[str, Any]:
        """Raises: ConfigError when the file is not what its name says."""
        if self._tensors is None:
            try:
                self._tensors = self._open()
            except Exception as error:  # the libraries' own, and whatever broken data makes them stumble over
                reason = lfs_hint(self._path) or (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(f"cannot read {str(self._path)!r}: {reason}") from None
        return self._tensors

    def _open(self) -> dict[str, Any]:
        if self._path.suffix == ".safetensors":
            file: Any = safe_open(str(self._path), framework="pt")
            return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        with self._path.open("rb") as head:
            self._is_mapped = head.read(2) == b"PK"  # older files are no archives, and are read as a whole
        content = torch.load(self._path, map_location="cpu", mmap=self._is_mapped, weights_only=True)
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}

    def stored(self) -> list[Stored]:
        """All tensors of the file."""
        return [Stored(self, name, *_shape_and_type(tensor)) for name, tensor in self.tensors().items()]

    def read(self, name: str, index: slice | tuple[int, slice]) -> torch.Tensor:
        """A part of a tensor."""
        if self._is_mapped and self._num_bytes > REOPEN_BYTES:
            self.close()
        part: torch.Tensor = self.tensors()[name][index]
        self._num_bytes += part.nbytes
        return part

    def close(self) -> None:
        self._tensors, self._num_bytes = None, 0


class Stored(NamedTuple):
    """A tensor in a file."""

    shard: Shard
    name: str
    shape: tuple[int, ...]
    dtype: str


def _shape_and_type(tensor: Any) -> tuple[tuple[int, ...], str]:
    if isinstance(tensor, torch.Tensor):
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    return tuple(tensor.get_shape()), _DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
