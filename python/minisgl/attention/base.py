"""What an attention backend is: metadata made once per step, then one call per layer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from minisgl.config.model import AttentionSpec
from minisgl.kernel.ops import PagedSequences, RopeAngles
from minisgl.kernel.state import StateSequences
from minisgl.kvcache.pool import KVPool, LayerCache

IntArray = npt.NDArray[np.int64]
Tensor = torch.Tensor
Metadata = TypeVar("Metadata")


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A host array on the device, without waiting for it: through pinned memory, which torch keeps until it is read."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """The sequences of a step, in the order of their tokens in the ragged batch: first those that decode, of one token.

    Sequence i owns tokens [offsets[i], offsets[i + 1]) of the batch; they stand at positions
    [starts[i], starts[i] + num_new[i]) of it, and attend to everything before them and themselves."""

    rows: IntArray  # [n] of the page table
    starts: IntArray  # [n]
    num_new: IntArray  # [n]
    offsets: IntArray  # [n + 1]
    page_table: npt.NDArray[np.int32]  # [max_running_requests, max pages], the host's copy
    page_size: int
    num_decode: int
    device: PagedSequences | None = None  # the same on a GPU
    window: int | None = None  # of the layers that it is for; 0: that see all; None: all have the same pages
    windowed: "AttentionStep | None" = None  # for layers whose windows slide: entries behind these are others'

    @property
    def seq_lens(self) -> IntArray:
        return self.starts + self.num_new

    @property
    def is_decode(self) -> bool:
        return self.num_decode == len(self.rows)

    def slots_of(self, rows: IntArray | np.int64, positions: IntArray) -> IntArray:
        """The slot of each (row, position)."""
        page, offset = np.divmod(positions, self.page_size)
        slots: IntArray = self.page_table[rows, page].astype(np.int64) * self.page_size + offset
        return slots

    def on_device(self) -> PagedSequences:
        assert self.device is not None
        return self.device

    def part(self, begin: int, end: int) -> "AttentionStep":
        """A step of the sequences [begin, end) alone."""
        if (begin, end) == (0, len(self.rows)):
            return self
        device = self.device
        if device is not None:
            cu_q = device.cu_q[begin : end + 1]
            rows, seq_lens, cu_q = device.rows[begin:end], device.seq_lens[begin:end], cu_q - cu_q[0] if begin else cu_q
            device = replace(device, rows=rows, seq_lens=seq_lens, cu_q=cu_q)
        own, starts, num_new = (numbers[begin:end] for numbers in (self.rows, self.starts, self.num_new))
        offsets, num_decode = self.offsets[begin : end + 1] - self.offsets[begin], self.num_decode - begin
        sequences = own, starts, num_new, offsets, self.page_table, self.page_size
        return AttentionStep(*sequences, min(max(num_decode, 0), end - begin), device, self.window)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What kernels and workspaces of a GPU are made for; heads are those of this rank."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int
    max_running_requests: int
    max_seq_len: int
    windows: tuple[int | None, ...] = (None,)  # that layers have
    has_float8: bool = False  # the cache is e4m3; dtype is that of queries


class AttentionBackend(ABC, Generic[Metadata]):
    """Attention over the paged cache. Stateless between steps but for workspaces.

    plans_captured: `prepare` is called before each replay of a captured step too, since a replay reads what it writes.
    """

    plans_captured = False

    @abstractmethod
    def prepare(self, step: AttentionStep, captured: bool) -> Metadata:
        """What `forward` needs of the step: indices, masks, a schedule. The same object goes to every layer.

        captured: the step is, or was, captured in a graph, for any lengths of its sequences, which all decode. It is
        called before the capture, and what `forward` reads of the step must be read on the device."""

    def prepare_both(self, step: AttentionStep, captured: bool) -> tuple[Metadata, Metadata]:
        """`prepare`, for layers that see all, and for those whose windows slide."""
        metadata = self.prepare(step, captured)
        return metadata, metadata if step.windowed is None else self.prepare(step.windowed, captured)

    @abstractmethod
    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: Metadata, sinks: Tensor | None = None, /
    ) -> Tensor:
        """q: [num_tokens, num_qo_heads, head_dim], perhaps strided between tokens; cache: this step's keys and values
        are stored in it; sinks: [num_qo_heads] float32, of each head a score of no token, which only the softmax's sum
        counts (arXiv 2309.17453), where `spec` has them.

        → [num_tokens, num_qo_heads, v_dim]. Stale or non-finite values of other requests never leak in."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the layers of a model share in one step."""

    input_ids: torch.Tensor  # [num_tokens]
    slots: Sequence[torch.Tensor]  # [num_tokens] int64: where this step's KV goes; and in layers whose windows slide
    positions: torch.Tensor  # [num_tokens]
    ropes: Sequence[RopeAngles]  # of this step's tokens, by `AttentionSpec.rope_index`
    kv: KVPool
    backend: AttentionBackend[object]
    metadata: Sequence[object]  # of `prepare_both`
    seqs: StateSequences  # for layers with states
