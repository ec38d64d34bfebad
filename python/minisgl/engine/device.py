"""The GPU of one rank: the pinned buffers through which the host talks to it, its graphs, and steps on their way."""

from __future__ import annotations

import bisect
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minisgl.core import StepResult
from minisgl.engine.batch import by_request
from minisgl.engine.logprobs import DeviceLogprobs
from minisgl.errors import ConfigError, EngineError
from minisgl.kernel.sampling import NUM_WORDS, SamplingColumns

Tensor = torch.Tensor

NUM_BUFFERS = 4  # pinned ones, used in turn: more than there are steps in flight


def open_gpu(rank: int) -> torch.device:
    """Make GPU `rank` (of the visible ones) the current one. Raises: ConfigError saying why it cannot be used."""
    device = torch.device("cuda", rank)
    try:
        torch.cuda.init()
        if rank >= (count := torch.cuda.device_count()):
            raise ConfigError(f"--tensor-parallel-size: rank {rank} has no GPU, {count} are visible")
        torch.cuda.set_device(rank)
        torch.zeros(1, device=device)  # a GPU that is full, or another program's alone, refuses
    except (RuntimeError, AssertionError) as error:  # its first line says what is wrong with the driver
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device cuda: GPU {rank}: {reason}; look at nvidia-smi and minisgl doctor") from error
    return device


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step's numbers on the device, int32. n samples, m sequences, t tokens."""

    sampling: SamplingColumns  # of n rows; first, since it has wide columns
    sample_rows: Tensor  # [n] of the token table
    logit_tokens: Tensor  # [n] tokens of the batch that sample
    rows: Tensor  # [m] of the page table
    seq_lens: Tensor  # [m]
    cu_q: Tensor  # [m + 1]
    token_rows: Tensor  # [t]
    positions: Tensor  # [t]


@lru_cache(maxsize=4096)
def layout(num_samples: int, num_seqs: int, num_tokens: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each field of `StepTensors` begins and ends in the buffer, in 4-byte words; and where all end."""
    sizes = {"sampling": num_samples * NUM_WORDS, "sample_rows": num_samples, "logit_tokens": num_samples}
    sizes |= {"rows": num_seqs, "seq_lens": num_seqs, "cu_q": num_seqs + 1}
    sizes |= {"token_rows": num_tokens, "positions": num_tokens}
    fields, begin = {}, 0
    for name, size in sizes.items():
        fields[name] = (begin, begin + size)
        begin += size
    return fields, begin


class Staging:
    """A buffer on the device and its pinned twins: `put` what a step needs, then `flush` it with one copy."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self._device = torch.empty(num_words, dtype=torch.int32, device=device)
        self._hosts = [torch.empty(num_words, dtype=torch.int32, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        self._turn, self._end = 0, 0
        self._host: npt.NDArray[np.int32] = self._hosts[0].numpy()

    def begin(self, arrays: Mapping[str, npt.NDArray[np.generic]], counts: tuple[int, int, int]) -> StepTensors:
        """Start a step's buffer with its fields, of these numbers of samples, sequences and tokens."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        self._copied[self._turn].synchronize()
        self._host = self._hosts[self._turn].numpy()
        fields, self._end = layout(*counts)
        for name, (begin, end) in fields.items():
            self._host[begin:end] = arrays[name].ravel()
        return self.tensors(counts)

    def tensors(self, counts: tuple[int, int, int]) -> StepTensors:
        """Views of the device's buffer: at the same addresses for the same counts."""
        fields, _ = layout(*counts)
        views = {name: self._device[begin:end] for name, (begin, end) in fields.items()}
        sampling = SamplingColumns(views.pop("sampling").view(-1, NUM_WORDS))
        return StepTensors(sampling, **views)

    def put(self, values: npt.NDArray[np.int32]) -> Tensor | None:
        """Append int32 values; where they will be on the device, or None when there is no room."""
        begin, end = self._end, self._end + len(values)
        if end > len(self._host):
            return None
        self._host[begin:end] = values
        self._end = end
        return self._device[begin:end]

    def flush(self) -> None:
        host = self._hosts[self._turn]
        self._device[: self._end].copy_(host[: self._end], non_blocking=True)
        self._copied[self._turn].record()


_POLL_SECONDS = 2e-5


class Launched(NamedTuple):
    """Results that will be there when the step is done."""

    ids: torch.Tensor  # [n] int32
    logprobs: DeviceLogprobs | None = None
    prompt_logprobs: DeviceLogprobs | None = None


class CudaHandle:
    """A launched step, whose results are on the host after the event; see `scheduler.executor.StepHandle`."""

    def __init__(self, step_id: int, event: torch.cuda.Event, launched: Launched) -> None:
        self._step_id, self._event, self._launched = step_id, event, launched
        self.error: Exception | None = None

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.perf_counter() + timeout
        try:
            while self.error is None and not self._event.query():
                if deadline is not None and time.perf_counter() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:  # CUDA reports here what went wrong on the device
            self.error = error
        return True

    def result(self) -> StepResult:
        self.wait()
        if self.error is not None:
            raise EngineError(f"step {self._step_id} failed: {self.error}") from self.error
        launched = self._launched
        logprobs = None if launched.logprobs is None else launched.logprobs.result()
        prompts = None if launched.prompt_logprobs is None else launched.prompt_logprobs.result()
        return StepResult(self._step_id, by_request(launched.ids), logprobs, prompts)


logger = logging.getLogger(__name__)


def graph_sizes(max_batch: int) -> list[int]:
    """The batch sizes to capture: dense where padding would cost most. Ascending; the last one is `max_batch`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(544, max(max_batch, 544), 32)]
    return [size for size in sizes if size < max_batch] + [max_batch] if max_batch else []


class DecodeGraphs:
    """prepare(size): makes a function that computes a decode step of `size` sequences from static tensors, and returns
    the tensors of its ids and of its logits.

    Largest first, so that the smaller ones find room in the pool that it leaves.
    """

    def __init__(
        self,
        prepare: Callable[[int], Callable[[], tuple[torch.Tensor, torch.Tensor]]],
        max_batch: int,
        show_progress: bool,
    ) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, _Place]] = {}
        self._sizes = graph_sizes(max_batch)
        start, pool = time.perf_counter(), None
        for i, size in enumerate(reversed(self._sizes)):
            if show_progress and sys.stderr.isatty():
                print(f"\rcapturing CUDA graphs: {i + 1}/{len(self._sizes)}", end="", file=sys.stderr, flush=True)
            run = prepare(size)
            run()  # loads kernels and library workspaces, which a capture cannot
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                ids, logits = run()
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
