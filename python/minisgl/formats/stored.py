"""What formats of quantized safetensors have in common: which layers are packed, which are in full, and the errors."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from minisgl.config.quantization import Quantization, Scheme
from minisgl.errors import ConfigError
from minisgl.formats.base import FUSED, ByName, Header, Shard, Tensor, Tensors, WeightSlot

FULL = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


class StoredFormat(ByName):
    """header: of the checkpoint; empty: there is none, and all is as `spec` says. source: its directory, for errors."""

    def __init__(
        self, spec: Quantization, header: Mapping[str, Header], source: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(dtype, device)
        self.spec, self.header, self._source = spec, header, source
        self._taken: dict[str, int] = {}  # rows of a fused layer that are those of the parts before

    def error(self, name: str, reason: str) -> ConfigError:
        return ConfigError(f"the weights in {self._source!r} cannot be used: {name}: {reason}")

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        stored, fused = self._where(prefix, shard)
        if self._is_full(stored):
            yield from super().slots(prefix, tensors, shard)  # the loader knows of fused ones
            return
        made: Tensors = {}
        yield from self.packed_slots(stored, made, fused, self.scheme(stored))
        tensors |= {prefix + name.removeprefix(stored): tensor for name, tensor in made.items()}

    def _where(self, prefix: str, shard: Shard) -> tuple[str, Shard]:
        """What a layer's names begin with in the checkpoint, and the shard, in a layer that several make up where it is
        stored so. Raises: ConfigError when these have not as many rows as it has."""
        part, name, axis = prefix.split(".")[-2], *self.rows_at
        fused = next((whole for whole, parts in FUSED.items() if part in parts), part)
        stored = prefix.replace(f".{part}.", f".{fused}.")
        if (is_full := self._is_full(stored)) or fused == part or f"{stored}{name}" not in self.header:
            return stored if is_full else prefix, shard
        first, num_rows = self._taken.get(stored, 0), self.header[f"{stored}{name}"].shape[axis]
        self._taken[stored] = end = first + shard.shape[0]
        if end > num_rows or (end != num_rows and part == FUSED[fused][-1]):
            raise self.error(f"{stored}{name}", f"it has {num_rows} rows, and {', '.join(FUSED[fused])} have {end}")
        rows = first + shard.rows[0], first + shard.rows[1]
        return stored, replace(shard, shape=(num_rows, shard.shape[1]), rows=rows)

    rows_at = ("weight", 0)  # a tensor of each layer that is not in full, and its dimension that counts rows

    @abstractmethod
    def packed_slots(self, prefix: str, tensors: Tensors, shard: Shard, scheme: Scheme) -> Iterator[WeightSlot]:
        """Of a layer that is not stored in full."""

    def scheme(self, prefix: str) -> Scheme:
        """The first whose targets name the layer; those that name it by its class come last."""
        schemes = sorted(self.spec.schemes, key=lambda scheme: "Linear" in scheme.targets)
        return next((s for s in schemes if any(_matches(prefix, t) for t in s.targets)), schemes[-1])

    def _is_full(self, prefix: str) -> bool:
        """What the checkpoint has counts, whatever the lists say."""
        stored = self.header.get(f"{prefix}weight")
        if stored is not None or self.header:
            return stored is not None and stored.dtype in FULL
        return prefix in ("model.embed_tokens.", "lm_head.") or any(_matches(prefix, p) for p in self.spec.ignored)

    def float_type(self, name: str) -> torch.dtype:
        """Of scales, as they are stored. Raises: ConfigError when these are no floats."""
        stored = self.header.get(name, Header("float32", ()))
        if stored.dtype not in FULL:
            raise self.error(name, f"it is {stored.dtype}, and scales are floats")
        return FULL[stored.dtype]

    def check_type(self, name: str, dtype: str) -> None:
        if name in self.header and (found := self.header[name].dtype) != dtype:
            raise self.error(name, f"it is {found}, not {dtype}")

    def check_scales(self, name: str, scales: Tensor) -> None:
        if not bool(scales.isfinite().all()):
            raise self.error(name, "it holds NaN or infinity")


def _matches(prefix: str, pattern: str) -> bool:
    """A regular expression after `re:`, from the beginning on; else a name, or a part of one between dots, with `*`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], prefix.removesuffix(".")) is not None
    return fnmatchcase(f".{prefix}", f"*.{pattern}.*")
