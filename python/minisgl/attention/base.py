"""What an attention backend is: metadata built once per step, then one call per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from minisgl.kernel.ops import RopeAngles
from minisgl.kvcache.pool import KVPool

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The sequences of a step, in the order of their tokens in the ragged batch; on the host unless said otherwise.

    Sequence i owns tokens [offsets[i], offsets[i + 1]) of the batch; they stand at positions
    [starts[i], starts[i] + num_new[i]) of it, and attend to everything before them and themselves.
    """

    rows: IntArray  # [n] of the page table
    starts: IntArray  # [n]
    num_new: IntArray  # [n]
    offsets: IntArray  # [n + 1]
    page_table: npt.NDArray[np.int32]  # [max_running_requests, max pages], the host's copy
    page_size: int
    paged: PagedStep | None = None  # the same on the device, for backends that read the page table there

    @property
    def seq_lens(self) -> IntArray:
        return self.starts + self.num_new

    def slots(self, row: int, begin: int, end: int) -> IntArray:
        """The slots of positions [begin, end) of a row: [end - begin]."""
        return self.slots_of(np.int64(row), np.arange(begin, end))

    def slots_of(self, rows: IntArray | np.int64, positions: IntArray) -> IntArray:
        """The slot of each (row, position)."""
        page, offset = np.divmod(positions, self.page_size)
        slots: IntArray = self.page_table[rows, page].astype(np.int64) * self.page_size + offset
        return slots


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Some sequences of a step, as kernels see them: int32 on the device. The bounds may be built into a captured
    graph; the arrays on the host are for backends that plan there, before the step."""

    page_table: torch.Tensor  # [rows, max pages]
    rows: torch.Tensor  # [n] of the page table
    seq_lens: torch.Tensor  # [n] tokens of KV, this step's included
    cu_q: torch.Tensor  # [n + 1]: sequence i owns tokens [cu_q[i], cu_q[i + 1])
    page_size: int
    max_q_len: int
    max_seq_len: int
    rows_cpu: IntArray  # [n]
    starts_cpu: IntArray  # [n]
    num_new_cpu: IntArray  # [n]
    page_table_cpu: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A step's sequences: first those of one token (decode), then the longer ones (prefill)."""

    num_decode: int
    decode: PagedBatch
    prefill: PagedBatch | None


class AttentionBackend(Protocol):
    """Attention over the paged cache. Stateless between steps but for workspaces."""

    def prepare(self, batch: AttentionBatch) -> Any:
        """What `forward` needs of the step: indices, masks, a schedule. The same object goes to every layer."""

    def forward(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None, metadata: Any
    ) -> torch.Tensor:
        """q: [num_tokens, num_qo_heads, head_dim]; caches: [num_slots, num_kv_heads, head_dim] of one layer, this
        step's keys and values stored. window: tokens that a position sees, itself included.

        → [num_tokens, num_qo_heads, head_dim]. Stale or non-finite values of other requests never leak in.
        """


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the layers of a model share in one step."""

    slots: torch.Tensor  # [num_tokens] int64: where this step's KV goes
    rope: RopeAngles  # of this step's tokens
    kv: KVPool
    backend: AttentionBackend
    metadata: Any
