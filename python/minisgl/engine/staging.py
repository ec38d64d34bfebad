"""What goes to a GPU with each step: its numbers, and the prompts and pages that rows gain, in one copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import to_device
from minisgl.config.runtime import EngineConfig
from minisgl.core import StepPlan, most_samples
from minisgl.engine.tables import Batch, RowTables, StepIndex, StepTensors, check_pages
from minisgl.kernel.ops import RopeAngles, TorchOps
from minisgl.kernel.sampling import NUM_WORDS, SamplingColumns
from minisgl.layers.rope import RotaryEmbedding

Tensor = torch.Tensor

NUM_BUFFERS = 4  # pinned ones, used in turn: more than there are steps in flight


class Staging:
    """A buffer on the device and its pinned twins: `put` what a step needs, then `flush` it with one copy."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.device = torch.empty(num_words, dtype=torch.int32, device=device)
        self._hosts = [torch.empty(num_words, dtype=torch.int32, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        self._turn, self._end = 0, 0

    def begin(self, *arrays: npt.NDArray[np.integer[Any]]) -> None:
        """Start a step's buffer with these, one after the other."""
        self._turn = (self._turn + 1) % NUM_BUFFERS
        self._copied[self._turn].synchronize()
        self._end = 0
        for values in arrays:
            begin, self._end = self._end, self._end + len(values)
            self._arrays[self._turn][begin : self._end] = values

    def put(self, values: npt.NDArray[np.int32]) -> Tensor:
        """Append int32 values: where they will be after the flush. Without room for them they go by themselves."""
        begin, end = self._end, self._end + len(values)
        if end > len(self.device):
            return torch.from_numpy(values).to(self.device.device)
        self._arrays[self._turn][begin:end] = values
        self._end = end
        return self.device[begin:end]

    def flush(self) -> None:
        self.device[: self._end].copy_(self._hosts[self._turn][: self._end], non_blocking=True)
        self._copied[self._turn].record()


class DeviceTables:
    """What a GPU remembers of running requests, by row, beside what the host does (`host`)."""

    def __init__(
        self, config: EngineConfig, ops: TorchOps, ropes: Sequence[RotaryEmbedding], device: torch.device
    ) -> None:
        self.padding_row = num_rows = config.max_running_requests  # of nobody's requests, that pad captured steps
        self.host = RowTables(num_rows + 1, config.max_seq_len, config.page_size, config.window)
        self.token_ids = torch.zeros(num_rows + 1, config.max_seq_len + 2, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(self.host.pages.shape, dtype=torch.int32, device=device)
        self.window_table = torch.zeros_like(self.page_table) if config.window else self.page_table
        self._tables = self.page_table, self.window_table
        self._ops, self._page_size = ops, config.page_size
        angles = [rope(torch.arange(config.max_seq_len + 1, device=device)) for rope in ropes]
        self._angles = [torch.cat((table.cos[:, 0], table.sin[:, 0]), -1).contiguous() for table in angles]
        num_tokens = max(config.max_prefill_length, most_samples(num_rows) + 1)
        num_words = most_samples(num_rows) * (NUM_WORDS + 8) + 1 + 2 * num_tokens  # `StepTensors`, prompts and pages
        self._drafted, self._sent = list[Tensor](), tuple[Tensor, ...]()
        takes_rules = config.model.vocab_size <= ops.most_ruled
        self.entries = torch.zeros(1, dtype=torch.int64, device=device) if takes_rules else None
        self.host.logit_rules.told = torch.zeros(1, dtype=torch.int64, pin_memory=True) if takes_rules else None
        self._staging = Staging(num_words + 2 * max(num_tokens, 64 * num_rows), device)

    def tensors(self, index: StepIndex) -> StepTensors:
        """Where a step's numbers lie once they were sent: in the same places for the same numbers of them."""
        sizes = [len(index.sample_rows) * NUM_WORDS, *map(len, index.numbers)]
        sampling, *numbers = self._staging.device[: sum(sizes)].split(sizes)
        return StepTensors(SamplingColumns(sampling.view(-1, NUM_WORDS)), *numbers)

    def send(self, plan: StepPlan, index: StepIndex) -> None:
        """Send a step's numbers, with the prompts and pages that rows gain in it, and write those to the tables."""
        self._staging.begin(self.host.sampling(index).ravel(), *index.numbers)
        put = self._staging.put
        prompts = [(admission.row, put(admission.token_ids)) for admission in plan.admissions]
        width = self.page_table.shape[1]
        updates = plan.page_updates
        entries = [one.row * width + one.first_index + i for one in updates for i in range(len(one.pages))]
        pages = [page for one in updates for page in one.pages], [page for one in updates for page in one.window_pages]
        gained = [put(np.array(values, np.int32)) for values in (entries, *pages) if values]
        width = self.token_ids.shape[1]
        places = [row * width + position + i for row, position, ids in plan.drafts for i in range(len(ids))]
        drafted = places, [token for draft in plan.drafts for token in draft.ids]
        self._drafted = [put(np.array(values, np.int32)) for values in drafted if values]
        self._staging.flush()
        for row, ids in prompts:
            self.token_ids[row, : len(ids)].copy_(ids)
        for table, values in zip(self._tables, gained[1:], strict=False):
            self._ops.scatter(table, gained[0], values)
        self.write_drafts()
        if self.entries is not None and self._sent is not self.host.logit_rules.lists:
            self._sent = bounds, ids, values = self.host.logit_rules.lists
            words = torch.cat((bounds.int(), ids, values.view(torch.int32)))
            self._entries = to_device(words.numpy(), self.entries.device)  # those before are free when steps have run
            self.entries.fill_(self._entries.data_ptr())
        if plan.expected:  # it waits for the device, now and then
            check_pages(plan, *(table.cpu().numpy() for table in self._tables))

    def write_drafts(self) -> None:
        """The last step's drafts become tokens, (again) in place of what was sampled."""
        if self._drafted:
            self._ops.scatter(self.token_ids, *self._drafted)

    def inputs(self, batch: Batch) -> tuple[Tensor, list[Tensor], list[RopeAngles]]:
        """Ids, slots and angles of a step's tokens, once its numbers were sent."""
        page_tables = self._tables if self.host.window else self._tables[:1]
        tables = self.token_ids, page_tables, self._page_size, self._angles
        ids, slots, ropes = self._ops.step_inputs(batch.tensors.token_rows, batch.tensors.positions, *tables)
        return ids, [slots[0], slots[-1]], ropes
