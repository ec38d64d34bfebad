"""Fills a model's parameters, from a checkpoint or at random, without ever holding a second copy of them.

A model comes in parts, each of which packs its weights once it is filled. Each checkpoint tensor is read in blocks of
rows straight into its place, converted on the way; a rank reads only what it keeps.
"""

from __future__ import annotations

import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from minisgl.layers.base import Part, WeightSlot
from minisgl.models.checkpoint import BLOCK_BYTES, Checkpoint, Source


def load_weights(parts: Iterable[Part], checkpoint: Checkpoint, show_progress: bool) -> None:
    """Fill all parts from a checkpoint, one after the other.

    Raises: ConfigError naming the files or tensors that are missing, unexpected or of another shape.
    """
    waiting = deque(parts)
    sources = deque(checkpoint.sources([slot for slots, _ in waiting for slot in slots]))
    with torch.inference_mode(), _progress(len(sources), show_progress) as advance:
        while waiting:
            slots, finish = waiting.popleft()
            for slot in slots:
                _fill(slot, sources.popleft())
                advance()
            del slots, slot  # which hold what packing frees
            finish()
    checkpoint.close()


def _fill(slot: WeightSlot, source: Source) -> None:
    """Copy the slot's part of its tensor into its target."""
    begin, end = slot.rows
    step = max(1, BLOCK_BYTES // (4 * (slot.shape[1] if len(slot.shape) > 1 else 1)))
    for first in range(begin, end, step):
        last = min(first + step, end)
        block = source.read(first, last)
        if slot.cols is not None:
            block = block[:, slot.cols[0] : slot.cols[1]]
        target = slot.target if len(slot.shape) == 1 else slot.target[first - begin : last - begin]
        target.copy_(block)


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
