"""What goes to a GPU with each step: its numbers, and the prompts and pages that rows gain, in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from minisgl.config.runtime import EngineConfig
from minisgl.core import StepPlan
from minisgl.engine.tables import RowTables, StepIndex, check_pages
from minisgl.kernel.ops import RopeAngles, TorchOps
from minisgl.kernel.sampling import NUM_WORDS, SamplingColumns, Words
from minisgl.layers.rope import RotaryEmbedding

Tensor = torch.Tensor

NUM_BUFFERS = 4  # pinned ones, used in turn: more than there are steps in flight


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step's numbers on the device, int32. n samples, m requests, t tokens."""

    sampling: SamplingColumns  # of n rows; first, since it has wide columns
    sample_rows: Tensor  # [n] of the token table
    logit_tokens: Tensor  # [n] tokens of the batch that sample
    rows: Tensor  # [m] of the page table
    seq_lens: Tensor  # [m]
    cu_q: Tensor  # [m + 1]
    token_rows: Tensor  # [t]
    positions: Tensor  # [t]


@lru_cache(maxsize=4096)
def layout(num_samples: int, num_reqs: int, num_tokens: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each field of `StepTensors` begins and ends in the buffer, in 4-byte words; and where all end."""
    sizes = {"sampling": num_samples * NUM_WORDS, "sample_rows": num_samples, "logit_tokens": num_samples}
    sizes |= {"rows": num_reqs, "seq_lens": num_reqs, "cu_q": num_reqs + 1}
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
        self._arrays = [host.numpy() for host in self._hosts]
        self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        self._turn, self._end = 0, 0

    def begin(self, index: StepIndex, sampling: Words) -> None:
        """Start a step's buffer with its fields."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        self._copied[self._turn].synchronize()
        fields, self._end = layout(*index.counts)
        values = {"sampling": sampling.ravel(), "sample_rows": index.sample_rows, "logit_tokens": index.logit_tokens}
        values |= {"rows": index.rows, "seq_lens": index.starts + index.num_new, "cu_q": index.offsets}
        values |= {"token_rows": index.token_rows, "positions": index.positions}
        host = self._arrays[self._turn]
        for name, (begin, end) in fields.items():
            host[begin:end] = values[name]

    def tensors(self, index: StepIndex) -> StepTensors:
        """Views of the device's buffer: at the same addresses for the same numbers of samples, requests and tokens."""
        fields, _ = layout(*index.counts)
        views = {name: self._device[begin:end] for name, (begin, end) in fields.items()}
        return StepTensors(SamplingColumns(views.pop("sampling").view(-1, NUM_WORDS)), **views)

    def put(self, values: npt.NDArray[np.int32]) -> Tensor:
        """Append int32 values: where they will be after the flush. Without room for them they go by themselves."""
        begin, end = self._end, self._end + len(values)
        if end > len(self._device):
            return torch.from_numpy(values).to(self._device.device)
        self._arrays[self._turn][begin:end] = values
        self._end = end
        return self._device[begin:end]

    def flush(self) -> None:
        self._device[: self._end].copy_(self._hosts[self._turn][: self._end], non_blocking=True)
        self._copied[self._turn].record()


class DeviceTables:
    """What a GPU remembers of running requests, by row, beside what the host does (`host`)."""

    def __init__(
        self, config: EngineConfig, ops: TorchOps, ropes: Sequence[RotaryEmbedding], device: torch.device
    ) -> None:
        self.padding_row = num_rows = config.max_running_requests  # of nobody's requests, that pad captured steps
        self.host = RowTables(num_rows + 1, config.max_seq_len, config.page_size)
        self.token_ids = torch.zeros(num_rows + 1, config.max_seq_len + 2, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(self.host.pages.shape, dtype=torch.int32, device=device)
        self._ops, self._page_size = ops, config.page_size
        angles = [rope(torch.arange(config.max_seq_len + 1, device=device)) for rope in ropes]
        self._angles = [torch.cat((table.cos[:, 0], table.sin[:, 0]), -1).contiguous() for table in angles]
        words = layout(num_rows, num_rows, max(config.max_prefill_length, num_rows))[1]
        self._staging = Staging(words + 2 * max(config.max_prefill_length, 64 * num_rows), device)

    def set_padding_page(self, page: int) -> None:
        """The page to which padding writes its keys and values."""
        self.page_table[self.padding_row] = self.host.pages[self.padding_row] = page

    def tensors(self, index: StepIndex) -> StepTensors:
        """Where a step's numbers lie once they were sent."""
        return self._staging.tensors(index)

    def send(self, plan: StepPlan, index: StepIndex) -> None:
        """Send a step's numbers, with the prompts and pages that rows gain in it, and write those to the tables."""
        self._staging.begin(index, self.host.sampling(index))
        prompts = [(admission.row, self._staging.put(admission.token_ids)) for admission in plan.admissions]
        width = self.page_table.shape[1]
        firsts = [(update.row * width + update.first_index, update.pages) for update in plan.page_updates]
        entries = [first + i for first, pages in firsts for i in range(len(pages))]
        pages = [page for _, pages in firsts for page in pages]
        gained = [self._staging.put(np.array(values, np.int32)) for values in (entries, pages) if values]
        self._staging.flush()
        for row, ids in prompts:
            self.token_ids[row, : len(ids)].copy_(ids)
        if gained:
            self._ops.scatter(self.page_table, *gained)
        if plan.expected:  # it waits for the device, now and then
            check_pages(plan, self.page_table.cpu().numpy())

    def inputs(self, tensors: StepTensors) -> tuple[Tensor, Tensor, list[RopeAngles]]:
        """Ids, slots and angles of a step's tokens, once its numbers were sent."""
        tables = self.token_ids, self.page_table, self._page_size, self._angles
        return self._ops.step_inputs(tensors.token_rows, tensors.positions, *tables)
