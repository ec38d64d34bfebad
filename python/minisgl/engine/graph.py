"""Decode steps captured in CUDA graphs."""

import bisect
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Tensor = torch.Tensor

logger = logging.getLogger(__name__)

RunStep = Callable[[], tuple[Tensor, Tensor]]


class GraphShape(NamedTuple):
    """What is built into a captured step."""

    batch: int  # requests
    q_len: int  # tokens of each, all of which sample


class DecodeGraphs:
    """prepare(shape): makes a function that computes a decode step of this shape from static tensors, and returns the
    tensors of its ids and of its logits.

    Largest first, so that the smaller ones find room in the pool that it leaves.
    """

    def __init__(self, prepare: Callable[[GraphShape], RunStep], max_batch: int) -> None:
        self._graphs: dict[GraphShape, tuple[torch.cuda.CUDAGraph, Tensor, _Place]] = {}
        sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, max(max_batch, 544), 32)]
        self._sizes = [size for size in sizes if size < max_batch] + [max_batch] * (max_batch > 0)  # of batches
        start, pool = time.perf_counter(), None
        for size in reversed(self._sizes):
            shape = GraphShape(size, 1)
            run = prepare(shape)
            run()  # loads kernels and library workspaces, which a capture cannot
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                ids, logits = run()
            pool = pool or graph.pool()
            self._graphs[shape] = graph, ids, _Place(logits)
            del logits  # its memory serves the next capture, too
        if self._sizes:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            logger.info("captured %d CUDA graphs, batches up to %d, in %.1f s", len(self._sizes), max_batch, seconds)

    def shape_for(self, batch: int, q_len: int) -> GraphShape | None:
        """The smallest captured one that holds `batch` requests of `q_len` tokens each."""
        i = bisect.bisect_left(self._sizes, batch)
        shape = GraphShape(self._sizes[i], q_len) if i < len(self._sizes) else None
        return shape if shape in self._graphs else None

    def replay(self, shape: GraphShape) -> Tensor:
        """Launch the step; its ids: [batch * q_len] int32, valid until the next replay."""
        graph, ids, _ = self._graphs[shape]
        graph.replay()
        return ids

    def logits(self, shape: GraphShape) -> Tensor:
        """What the ids were sampled from, if the last replay was of this shape: valid until the next one."""
        return self._graphs[shape][2].tensor()


class _Place:
    """Where a tensor lies, without keeping its memory: graphs of many sizes would hold a GiB of logits that way."""

    def __init__(self, tensor: Tensor) -> None:
        self._dtype, self._device = tensor.dtype, tensor.device
        self.__cuda_array_interface__ = {
            "version": 2,
            "typestr": f"<i{tensor.itemsize}",  # it knows no bfloat16
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
        }

    def tensor(self) -> Tensor:
        return torch.as_tensor(self, device=self._device).view(self._dtype)
