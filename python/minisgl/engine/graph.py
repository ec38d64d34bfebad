"""CUDA graphs of decode steps: one per batch size, padded to; all share one memory pool."""

from __future__ import annotations

import bisect
import logging
import sys
import time
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


def graph_sizes(max_batch: int) -> list[int]:
    """The batch sizes to capture: dense where padding would cost most. Ascending; the last one is `max_batch`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, max(max_batch, 544), 32)]
    return [size for size in sizes if size < max_batch] + [max_batch] if max_batch else []


class DecodeGraphs:
    """run(size): computes a decode step of `size` sequences from static tensors and returns the tensors of its ids and
    of its logits.

    Largest first, so that the smaller ones find room in the pool that it leaves.
    """

    def __init__(
        self, run: Callable[[int], tuple[torch.Tensor, torch.Tensor]], max_batch: int, show_progress: bool
    ) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, _Place]] = {}
        self._sizes = graph_sizes(max_batch)
        start, pool = time.perf_counter(), None
        for i, size in enumerate(reversed(self._sizes)):
            if show_progress and sys.stderr.isatty():
                print(f"\rcapturing CUDA graphs: {i + 1}/{len(self._sizes)}", end="", file=sys.stderr, flush=True)
            run(size)  # loads kernels and library workspaces, which a capture cannot
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                ids, logits = run(size)
            pool = pool or graph.pool()
            self._graphs[size] = graph, ids, _Place(logits)
            del logits  # its memory serves the next capture, too
        if self._sizes:
            torch.cuda.synchronize()
            if show_progress and sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            seconds = time.perf_counter() - start
            logger.info("captured %d CUDA graphs, batches up to %d, in %.1f s", len(self._sizes), max_batch, seconds)

    def size_for(self, batch: int) -> int | None:
        """The smallest captured size that holds `batch` sequences."""
        i = bisect.bisect_left(self._sizes, batch)
        return self._sizes[i] if i < len(self._sizes) else None

    def replay(self, size: int) -> torch.Tensor:
        """Launch the step; its ids: [size] int32, valid until the next replay."""
        graph, ids, _ = self._graphs[size]
        graph.replay()
        return ids

    def logits(self, size: int) -> torch.Tensor:
        """What the ids were sampled from, if the last replay was of this size: valid until the next one."""
        return self._graphs[size][2].tensor()


class _Place:
    """Where a tensor lies, without keeping its memory: graphs of many sizes would hold a GiB of logits that way."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._dtype, self._device = tensor.dtype, tensor.device
        self.__cuda_array_interface__ = {
            "version": 2,
            "typestr": f"<i{tensor.itemsize}",  # it knows no bfloat16
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
        }

    def tensor(self) -> torch.Tensor:
        return torch.as_tensor(self, device=self._device).view(self._dtype)
