"""Decode steps captured in CUDA graphs."""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from minisgl.engine.shapes import GraphShape
from minisgl.kernel.cuda import tensor_at

Tensor = torch.Tensor
logger = logging.getLogger(__name__)
Results = tuple[Tensor, Tensor | None]  # ids [num_samples] int32; drafts, as of `step.Launched`
RunStep = Callable[[], tuple[Results, Tensor]]


class DecodeGraphs:
    """prepare(shape): makes a function that computes a step of this shape from static tensors, and returns its
    results and its logits. shapes: by size.

    Largest first, so that the smaller ones find room in the pool that it leaves. Nothing is collected meanwhile: pinned
    memory that becomes free notes an event on the streams that used it, which cannot be asked for once it is captured.
    """

    def __init__(self, prepare: Callable[[GraphShape], RunStep], shapes: Sequence[GraphShape]) -> None:
        self._graphs: dict[GraphShape, tuple[torch.cuda.CUDAGraph, Results, Callable[[], Tensor]]] = {}
        start, pool, collects = time.perf_counter(), None, gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            for shape in reversed(shapes):
                run = prepare(shape)
                run()  # loads kernels and library workspaces, which a capture cannot
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                    results, logits = run()
                pool = pool or graph.pool()
                place = logits.data_ptr(), tuple(logits.shape), logits.dtype, logits.device
                self._graphs[shape] = graph, results, partial(tensor_at, *place, logits.stride())
                del logits  # its memory serves the next capture, too: graphs of many sizes would hold a GiB of them
        finally:
            if collects:
                gc.enable()
        if shapes:
            torch.cuda.synchronize()
            seconds, most = time.perf_counter() - start, shapes[-1].num_tokens
            logger.info("captured %d CUDA graphs, batches up to %d, in %.1f s", len(shapes), most, seconds)

    def replay(self, shape: GraphShape) -> Results:
        """Launch the step; its results are valid until the next replay."""
        graph, results, _ = self._graphs[shape]
        graph.replay()
        return results

    def logits(self, shape: GraphShape) -> Tensor:
        """What the ids were sampled from, if the last replay was of this shape: valid until the next one."""
        return self._graphs[shape][2]()
