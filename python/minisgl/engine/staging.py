"""What goes to a GPU with each step: its numbers, and the prompts and pages that rows gain, in one copy."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import Tensor, to_device
from minisgl.config.runtime import EngineConfig
from minisgl.core import ID_PENDING, MASK_PENDING, MASK_READY, Masks, StepPlan, most_samples
from minisgl.engine.tables import Batch, RowTables, StepIndex, StepTensors, check_pages
from minisgl.kernel.ops import RopeAngles, TorchOps
from minisgl.kernel.sampling import NUM_PLACES, NUM_WORDS, SamplingColumns, Words
from minisgl.layers.rope import RotaryEmbedding

NUM_BUFFERS = 4  # pinned ones, used in turn: two more than there are steps in flight


class Staging:
    """A buffer on the device and its pinned twins: `put` what a step needs, then `flush` it with one copy. places: of
    `TokenStore`, with which a step's buffer begins."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.device = torch.empty(num_words, dtype=torch.int32, device=device)
        self._hosts = [torch.empty(num_words, dtype=torch.int32, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._arrays = [host.numpy() for host in self._hosts]
        self._copied, self._turn, self._end = [torch.cuda.Event() for _ in range(NUM_BUFFERS)], 0, 0

    def begin(self, *arrays: npt.NDArray[np.integer[Any]]) -> None:
        """Put these behind a step's places, one after the other. The step of four steps ago has ended then."""
        self._turn, self._end = (self._turn + 1) % NUM_BUFFERS, 2 * NUM_PLACES
        self._copied[(self._turn + 1) % NUM_BUFFERS].synchronize()  # of the step after that one
        self.places = self._arrays[self._turn][: self._end].view(np.int64)
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
        self.fresh = torch.full((1,), 1 + config.draft_len, dtype=torch.int32, device=device)
        self.window_table = torch.zeros_like(self.page_table) if config.window else self.page_table
        self._tables = self.page_table, self.window_table
        self._ops, self._page_size = ops, config.page_size
        angles = [rope(torch.arange(config.max_seq_len + 1, device=device)) for rope in ropes]
        self._angles = [torch.cat((table.cos[:, 0], table.sin[:, 0]), -1).contiguous() for table in angles]
        num_tokens = max(config.max_prefill_length, most_samples(num_rows) + 1)
        num_words = most_samples(num_rows) * (NUM_WORDS + 9) + 1 + 3 * num_tokens  # `StepTensors`, prompts and pages
        self._drafted, self._sent = list[Tensor](), tuple[Tensor, ...]()
        self._staging = Staging(2 * NUM_PLACES + num_words + 2 * max(num_tokens, 64 * num_rows), device)
        places, takes_rules = self._staging.device[: 2 * NUM_PLACES], config.model.vocab_size <= ops.most_ruled
        self.places = places.view(torch.int64) if takes_rules else None
        self._boards = deque[tuple[Words, ...]]([(np.full(1, MASK_PENDING, np.int32),) * 3] * NUM_BUFFERS)  # none yet

    def tensors(self, index: StepIndex) -> StepTensors:
        """Where a step's numbers lie once they were sent: in the same places for the same numbers of them."""
        sizes = [len(index.sample_rows) * NUM_WORDS, *map(len, index.numbers)]
        sampling, *numbers = self._staging.device[2 * NUM_PLACES :][: sum(sizes)].split(sizes)
        return StepTensors(SamplingColumns(sampling.view(-1, NUM_WORDS)), *numbers)

    def send(self, plan: StepPlan, index: StepIndex, masks: Masks | None = None) -> None:
        """Send a step's numbers, with the prompts and pages that rows gain in it, and write those to the tables."""
        sampling = self.host.sampling(index, () if masks is None else plan.masked)
        self._staging.begin(sampling.ravel(), *index.numbers)
        if self.places is not None:
            if self._sent is not self.host.logit_rules.lists:
                self._sent = bounds, ids, values = self.host.logit_rules.lists
                words = torch.cat((bounds.int(), ids, values.view(torch.int32))).numpy()
                self._entries = to_device(words, self.places.device)  # those before are free when steps have run
            board = (0,) * 3 if masks is None else self._ask(masks)
            self._staging.places[:] = self._entries.data_ptr(), *board, 0
        put = self._staging.put
        prompts = [(admission.row, put(admission.token_ids)) for admission in plan.admissions]
        width, updates = self.page_table.shape[1], plan.page_updates
        entries = [one.row * width + one.first_index + i for one in updates for i in range(len(one.pages))]
        pages = [page for one in updates for page in one.pages], [page for one in updates for page in one.window_pages]
        gained = [put(np.array(values, np.int32)) for values in (entries, *pages) if values]
        width = self.token_ids.shape[1]
        known = [draft for draft in plan.drafts if draft.ids[0] != ID_PENDING]
        places = [row * width + position + i for row, position, ids in known for i in range(len(ids))]
        drafted = places, [token for draft in known for token in draft.ids]
        self._drafted = [put(np.array(values, np.int32)) for values in drafted if values]
        self._staging.flush()
        for row, ids in prompts:
            self.token_ids[row, : len(ids)].copy_(ids)
        for table, values in zip(self._tables, gained[1:], strict=False):
            self._ops.scatter(table, gained[0], values)
        self.write_drafts()
        if plan.expected:  # it waits for the device, now and then
            check_pages(plan, *(table.cpu().numpy() for table in self._tables))

    def _ask(self, masks: Masks) -> list[int]:
        """→ where the device is to look for them: in memory that nobody uses, not even who still computes old ones."""
        self._boards.rotate()
        if MASK_PENDING in self._boards[0][1] or MASK_PENDING in self._boards[-1][1]:  # masks after it read its ids
            num, width = most_samples(self.padding_row), masks.shape[1]
            memory = torch.full((num * (width + 2) + 4,), MASK_READY, dtype=torch.int32, pin_memory=True).numpy()
            self._boards[0] = memory[2 * num : -4].reshape(num, width), memory[:num], memory[num : 2 * num]
        words, states, ids = board = [array[: masks.shape[0]] for array in self._boards[0]]
        states[:], ids[:] = MASK_PENDING, ID_PENDING
        masks(words, states, ids)
        return [array.ctypes.data for array in board]

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
