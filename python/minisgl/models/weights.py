"""Fills a model's parameters, from safetensors or at random, without ever holding a second copy of them.

A model comes in parts, each of which packs its weights once it is filled. Each checkpoint tensor is read in blocks of
rows straight into its place, converted on the way; a rank reads only what it keeps. Files are mapped into memory by
safetensors, and pages that were read count as resident until the file is closed, so it is reopened every
`REOPEN_BYTES`.
"""

from __future__ import annotations

import json
import logging
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minisgl.errors import ConfigError
from minisgl.layers.base import Part, WeightSlot

logger = logging.getLogger(__name__)

BLOCK_BYTES = 16 << 20
REOPEN_BYTES = 32 << 20
# Buffers that older exporters saved although they follow from the configuration.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


class ShardReader:
    """One safetensors file, read in blocks. `close` gives its pages back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._num_bytes = 0

    def _open(self) -> Any:
        if self._file is None:
            try:
                self._file = safe_open(str(self._path), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"cannot read {str(self._path)!r}: {error}") from error
        return self._file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        file = self._open()
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def fill(self, slot: WeightSlot) -> None:
        """Copy the slot's part of its tensor into its target."""
        begin, end = slot.rows
        row_bytes = 4 * (slot.shape[1] if len(slot.shape) > 1 else 1)
        step = max(1, BLOCK_BYTES // row_bytes)
        for first in range(begin, end, step):
            last = min(first + step, end)
            block = self._open().get_slice(slot.name)[first:last]
            if slot.cols is not None:
                block = block[:, slot.cols[0] : slot.cols[1]]
            target = slot.target if len(slot.shape) == 1 else slot.target[first - begin : last - begin]
            target.copy_(block)
            del block
            self._num_bytes += (last - first) * row_bytes
            if self._num_bytes > REOPEN_BYTES:
                self.close()

    def close(self) -> None:
        self._file, self._num_bytes = None, 0


def load_weights(parts: Iterable[Part], model_dir: str | Path, show_progress: bool) -> None:
    """Fill all parts from the safetensors of `model_dir`, one after the other.

    Raises: ConfigError naming the files or tensors that are missing, unexpected or of another shape.
    """
    readers = {path.name: ShardReader(path) for path in _shard_paths(Path(model_dir))}
    waiting = deque(parts)
    files: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file, reader in readers.items():
        found = reader.shapes()
        shapes.update(found)
        files.update(dict.fromkeys(found, file))
    _check([slot for slots, _ in waiting for slot in slots], shapes, str(model_dir))
    total = sum(len(slots) for slots, _ in waiting)
    with torch.inference_mode(), _progress(total, show_progress) as advance:
        while waiting:
            slots, finish = waiting.popleft()
            for slot in slots:
                readers[files[slot.name]].fill(slot)
                advance()
            del slots, slot  # which hold what packing frees
            finish()
    for reader in readers.values():
        reader.close()


def _shard_paths(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"cannot read {str(index)!r}: {error!r}") from error
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (model_dir / name).is_file()]
    if missing:
        raise ConfigError(f"{str(model_dir)!r} is incomplete: {_listing(missing)} missing")
    return [model_dir / name for name in names]


def _check(wanted: list[WeightSlot], found: dict[str, tuple[int, ...]], source: str) -> None:
    """One error for everything that does not fit."""
    names = {slot.name for slot in wanted}
    tied_head = {"lm_head.weight"} - names  # a tied model's file may hold the head too: it is the embedding
    unexpected = [n for n in found if n not in names | tied_head and not n.endswith(IGNORED_SUFFIXES)]
    shapes = [
        f"{slot.name} is {list(found[slot.name])}, not {list(slot.shape)}"
        for slot in wanted
        if slot.name in found and found[slot.name] != slot.shape
    ]
    missing = [slot.name for slot in wanted if slot.name not in found]
    problems = [
        f"{title}: {_listing(items)}"
        for title, items in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if items
    ]
    if problems:
        raise ConfigError(f"the weights in {source!r} do not fit config.json; " + "; ".join(problems))


def _listing(items: list[str], limit: int = 8) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; a function that moves it by one."""
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Loading weights", total=total)
        yield lambda: progress.advance(task)


def fill_random(parts: Iterable[Part], seed: int) -> None:
    """Seeded random weights of a sane scale: the same model whatever the number of ranks.

    Matrices have standard deviation 1 / sqrt(fan in), so that activations keep their scale; norms are one, biases zero.
    """
    with torch.inference_mode():
        for slots, finish in parts:
            for slot in slots:
                if len(slot.shape) == 1:
                    slot.target.fill_(0.0 if slot.name.endswith("bias") else 1.0)
                else:
                    _fill_matrix(slot, seed)
            del slots, slot  # as above
            finish()


def _fill_matrix(slot: WeightSlot, seed: int) -> None:
    device = slot.target.device
    generator = torch.Generator(device)
    num_rows, width = slot.shape
    step = max(1, BLOCK_BYTES // (4 * width))
    begin, end = slot.rows
    for first in range(begin // step * step, end, step):  # blocks are aligned, so every rank draws the same ones
        generator.manual_seed((zlib.crc32(f"{seed}/{slot.name}/{first}".encode()) << 16) ^ seed)
        block = torch.empty(min(step, num_rows - first), width, device=device).uniform_(-1, 1, generator=generator)
        block *= (3.0 / width) ** 0.5
        low, high = max(begin, first), min(end, first + step)
        part = block[low - first : high - first]
        slot.target[low - begin : high - begin] = part if slot.cols is None else part[:, slot.cols[0] : slot.cols[1]]
