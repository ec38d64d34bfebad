"""The runner of a GPU: steps are launched and not waited for; sampled ids stay on the device for the next step.

A decode step is one host-to-device copy, one graph replay and one copy of the ids back. Everything else of a step
that is not in the graph (prompts and pages that rows gain, steps with prefill) is launched op by op.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import AttentionStep, IntArray, StepContext
from minisgl.config.runtime import EngineConfig
from minisgl.core import NOT_READY, Admission, Masks, PageUpdate, SamplingParams, ScheduledReq, StepPlan
from minisgl.engine.batch import RowTables, check_pages, columns, copy_pages
from minisgl.engine.device import (
    NUM_BUFFERS,
    CudaHandle,
    DecodeGraphs,
    Launched,
    Staging,
    StepTensors,
    layout,
    open_gpu,
)
from minisgl.engine.logprobs import DeviceLogprobs, LogprobStep, gather_logprobs
from minisgl.engine.rules import LogitStep, apply_rules, to_device
from minisgl.engine.runner import ModelShard
from minisgl.errors import ConfigError, EngineError
from minisgl.kernel.paged import PagedSequences
from minisgl.kernel.sampling import NEUTRAL, TokenStore
from minisgl.utils.faults import fault
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

Tensor = torch.Tensor

WARM_UP_TOKENS = (64, 512, 2048)
_GRAPH_RESERVE = 512 << 20  # bytes for graphs and library workspaces that the largest step did not show


class CudaRunner:
    """Raises: ConfigError when the GPU cannot be used, or the model or the cache does not fit its memory."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self._device = open_gpu(rank)
        self._stream = torch.cuda.Stream(self._device)
        try:
            with self._on_device():
                self._shard = ModelShard(config, rank, self._device)
                self._set_up()
        except torch.cuda.OutOfMemoryError as error:
            total = torch.cuda.get_device_properties(self._device).total_memory / 2**30
            raise ConfigError(
                f"the model does not fit the GPU ({total:.0f} GiB): try --tensor-parallel-size, a lower "
                f"--max-prefill-length or --max-running-requests ({str(error).splitlines()[0]})"
            ) from error

    def _set_up(self) -> None:
        config = self._config
        num_rows, page_size = config.max_running_requests, config.page_size
        self._padding_row = num_rows  # of padded sequences, which own one page of their own
        self._tables = RowTables(num_rows + 1, config.max_seq_len, page_size)
        self._token_ids = torch.zeros(num_rows + 1, config.max_seq_len + 2, dtype=torch.int32, device=self._device)
        max_pages = div_ceil(config.max_seq_len + 1, page_size)
        self._page_table = torch.zeros(num_rows + 1, max_pages, dtype=torch.int32, device=self._device)
        angles = self._shard.rope(torch.arange(config.max_seq_len + 1, device=self._device))
        self._angles = torch.cat((angles.cos[:, 0], angles.sin[:, 0]), -1).contiguous()
        most = config.max_prefill_length
        words = layout(num_rows, num_rows, max(most, num_rows))[1]
        self._staging = Staging(words + 2 * max(most, 64 * num_rows), self._device)
        self._out = [torch.empty(num_rows, dtype=torch.int32, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._backend = self._shard.create_attention()
        self._graphs = DecodeGraphs(self._decode, 0, show_progress=False)
        self.num_pages = self._plan_memory()
        self._kv = self._shard.create_kv(self.num_pages + 1)
        self._page_table[self._padding_row] = self._tables.pages[self._padding_row] = self.num_pages
        self._graphs = DecodeGraphs(self._decode, config.cuda_graph_max_bs, show_progress=self._rank == 0)
        torch.cuda.synchronize()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    # --- memory

    def _plan_memory(self) -> int:
        """Pages that fit beside the weights and the largest step, which is computed once to see what it takes."""
        config = self._config
        plan = _large_step(config, config.max_prefill_length)
        last = max(page for update in plan.page_updates for page in update.pages)
        self._kv = self._shard.create_kv(last + 1)
        for num_tokens in WARM_UP_TOKENS:  # libraries load kernels by size, and Triton compiles some
            if num_tokens < config.max_prefill_length:
                self._launch(_large_step(config, num_tokens))
        torch.cuda.reset_peak_memory_stats()
        self._launch(plan)
        torch.cuda.synchronize()
        activations = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        del self._kv
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        budget = free - int(total * (1 - config.memory_ratio)) - activations - _GRAPH_RESERVE
        affordable = self._shard.comm.all_reduce_min(budget // config.page_bytes) - 1
        num_pages = config.num_pages or affordable
        needed = div_ceil(config.max_seq_len, config.page_size)
        if affordable < max(num_pages, needed):
            raise ConfigError(
                f"--memory-ratio {config.memory_ratio}: the KV cache would hold {max(affordable, 0)} pages of "
                f"{config.page_size} tokens, {max(config.num_pages, needed)} are needed; raise it, lower "
                "--max-seq-len, --num-pages or --max-prefill-length, or use more GPUs"
            )
        kv_bytes = num_pages * config.page_bytes
        logger.info("KV cache: %.1f GiB, activations: %.2f GiB", kv_bytes / 2**30, activations / 2**30)
        # More than all running requests could ever use would only be cache, and that is welcome: nothing is cut off.
        return num_pages

    # --- steps

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> CudaHandle:
        """Launch a step. What fails at once is reported by the handle, like what fails later."""
        event = torch.cuda.Event()
        try:
            fault("step")
            with self._on_device():
                launched = self._launch(plan, masks)
                out = self._out[plan.step_id % NUM_BUFFERS][: len(launched.ids)]
                out.copy_(launched.ids, non_blocking=True)
                event.record()
                return CudaHandle(plan.step_id, event, launched._replace(ids=out))
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            handle = CudaHandle(plan.step_id, event, Launched(self._out[0][:0]))
            handle.error = error
            return handle

    def _launch(self, plan: StepPlan, masks: Masks | None = None) -> Launched:
        self._tables.apply(plan)
        copy_pages(plan, self._kv, self._config.page_size, self._device)
        if not plan.reqs:
            return Launched(self._token_ids[0, :0])
        size = self._graphs.size_for(len(plan.reqs)) if plan.is_decode_only else None
        if size is not None:
            return self._launch_graph(plan, size, masks)
        return self._launch_eager(plan, masks)

    def _launch_graph(self, plan: StepPlan, size: int, masks: Masks | None) -> Launched:
        rows, starts, *_ = columns(plan.reqs)
        num, arrays = len(rows), self._padding(size)
        for name in ("rows", "token_rows", "sample_rows"):
            arrays[name][:num] = rows
        arrays["positions"][:num] = starts
        arrays["seq_lens"][:num] = starts + 1
        arrays["sampling"][:num] = self._tables.sampling(rows, starts + 1)
        tensors = self._staging.begin(arrays, (size, size, size))
        self._flush(plan)
        if self._backend.plans_captured:
            self._backend.prepare(self._padded_step(tensors, arrays), captured=True)
        ids = self._graphs.replay(size)[:num]
        steps = self._tables.logit_rules.steps(rows, starts + 1, plan.masked, masks)
        wanted = self._tables.logprob_rules.sampled(rows)
        if not steps and wanted is None:
            return Launched(ids)
        logits = self._graphs.logits(size)
        self._sample_again(logits, steps, tensors, ids)
        return Launched(ids, self._report(wanted, logits, ids))

    def _sample_again(self, logits: Tensor, steps: Sequence[LogitStep], tensors: StepTensors, ids: Tensor) -> None:
        """Sample some rows from changed logits, in place of what the step has sampled for them: so a captured step
        stays whole, and those that need nothing pay nothing."""
        ops, comm = self._shard.ops, self._shard.comm
        for step in steps:
            index = to_device(step.samples, self._device)
            columns, rows = tensors.sampling.select(index), tensors.sample_rows.index_select(0, index)
            new = torch.empty(len(index), dtype=torch.int32, device=self._device)
            if comm.rank == 0:
                changed = apply_rules(logits, step, self._token_ids)
                ops.sample(changed, columns, new)
                if len(step.absent):
                    new[to_device(step.absent, self._device)] = NOT_READY
            new = comm.broadcast(new)
            ops.store_ids(self._token_ids, rows, columns["position"], new)
            ids.index_copy_(0, index, new)

    def _report(self, wanted: LogprobStep | None, logits: Tensor, ids: Tensor) -> DeviceLogprobs | None:
        """Log-probabilities of sampled tokens, on rank 0."""
        if wanted is None or self._shard.comm.rank > 0:
            return None
        chosen = ids.index_select(0, to_device(wanted.index, self._device))
        return gather_logprobs(wanted, lambda index: logits.index_select(0, index), chosen, self._device)

    def _padding(self, size: int) -> dict[str, Any]:
        """A decode step of `size` sequences that belong to nobody."""
        row = self._padding_row
        fill = {"rows": row, "token_rows": row, "sample_rows": row, "seq_lens": 1}
        arrays: dict[str, Any] = {name: np.full(size, fill.get(name, 0)) for name in StepTensors.__slots__}
        arrays["sampling"] = NEUTRAL.repeat(size, axis=0)
        arrays["cu_q"], arrays["logit_tokens"] = np.arange(size + 1), np.arange(size)
        return arrays

    def _decode(self, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """What is captured: a decode step from the staging buffer, which now holds one of nobody. The function computes
        it → its ids and logits."""
        arrays, counts = self._padding(size), (size, size, size)
        tensors = self._staging.begin(arrays, counts)
        self._staging.flush()
        metadata = self._backend.prepare(self._padded_step(tensors, arrays), captured=True)

        def run() -> tuple[Tensor, Tensor]:
            logits = self._shard.model.logits(self._hidden(tensors, metadata), None)
            return self._sample(logits, tensors), logits

        return run

    def _padded_step(self, tensors: StepTensors, arrays: dict[str, Any]) -> AttentionStep:
        """Of sequences that all decode."""
        rows, offsets = arrays["rows"], arrays["cu_q"]
        return self._attention_step(tensors, rows, arrays["positions"], np.ones_like(rows), offsets, len(rows))

    def _attention_step(
        self,
        tensors: StepTensors,
        rows: IntArray,
        starts: IntArray,
        num_new: IntArray,
        offsets: IntArray,
        num_decode: int,
    ) -> AttentionStep:
        page_size = self._config.page_size
        device = PagedSequences(self._page_table, tensors.rows, tensors.seq_lens, tensors.cu_q, page_size)
        return AttentionStep(rows, starts, num_new, offsets, self._tables.pages, page_size, num_decode, device)

    def _launch_eager(self, plan: StepPlan, masks: Masks | None) -> Launched:
        rows, starts, num_new, num_samples = columns(plan.reqs)
        offsets = np.concatenate(([0], np.cumsum(num_new)))
        token_rows = np.repeat(rows, num_new)
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], num_new)
        sampling = num_samples > 0
        sample_rows, sampled = rows[sampling], (starts + num_new)[sampling]
        counts = (len(sample_rows), len(rows), len(positions))
        arrays: dict[str, Any] = {"sampling": self._tables.sampling(sample_rows, sampled)}
        arrays |= {"sample_rows": sample_rows, "logit_tokens": offsets[1:][sampling] - 1}
        arrays |= {"rows": rows, "seq_lens": starts + num_new, "cu_q": offsets}
        arrays |= {"token_rows": token_rows, "positions": positions}
        tensors = self._staging.begin(arrays, counts)
        self._flush(plan)
        step = self._attention_step(tensors, rows, starts, num_new, offsets, plan.num_decode)
        hidden = self._hidden(tensors, self._backend.prepare(step, captured=False))
        of_prompts = self._prompt_logprobs(plan, hidden, offsets)
        logits = self._shard.model.logits(hidden, tensors.logit_tokens)
        if not len(logits):
            return Launched(self._token_ids[0, :0], None, of_prompts)
        ids = self._sample(logits, tensors)
        steps = self._tables.logit_rules.steps(sample_rows, sampled, plan.masked, masks)
        self._sample_again(logits, steps, tensors, ids)
        reported = self._report(self._tables.logprob_rules.sampled(sample_rows), logits, ids)
        return Launched(ids, reported, of_prompts)

    def _prompt_logprobs(self, plan: StepPlan, hidden: Tensor, offsets: IntArray) -> DeviceLogprobs | None:
        """Every rank takes part: each has a share of the logits."""
        wanted = self._tables.logprob_rules.prompt(plan.reqs, offsets)
        if wanted is None:
            return None
        return gather_logprobs(wanted, lambda index: self._shard.model.logits(hidden, index), None, self._device)

    def _flush(self, plan: StepPlan) -> None:
        """Send the step's buffer, with the prompts and pages that rows gain in it, and write those to the tables."""
        prompts = [(row, self._put(ids)) for row, ids, *_ in plan.admissions]
        pages = self._put_pages(plan)
        self._staging.flush()
        for row, ids in prompts:
            self._token_ids[row, : len(ids)].copy_(ids)
        if pages is not None:
            self._shard.ops.scatter(self._page_table, *pages)
        if plan.expected:  # it waits for the device, now and then
            check_pages(plan, self._page_table.cpu().numpy())

    def _put_pages(self, plan: StepPlan) -> tuple[Tensor, Tensor] | None:
        """Indices into the flat page table, and the pages that go there."""
        if not plan.page_updates:
            return None
        width = self._page_table.shape[1]
        index = [u.row * width + u.first_index + i for u in plan.page_updates for i in range(len(u.pages))]
        values = [page for update in plan.page_updates for page in update.pages]
        return self._put(np.array(index, np.int32)), self._put(np.array(values, np.int32))

    def _put(self, values: npt.NDArray[np.int32]) -> Tensor:
        """Values on the device: in the staging buffer, to be read after its flush, or by themselves if it is full."""
        staged = self._staging.put(values)
        return torch.from_numpy(values).to(self._device) if staged is None else staged

    def _hidden(self, tensors: StepTensors, metadata: object) -> Tensor:
        """Run the model's layers: [num_tokens, hidden]."""
        input_ids, slots, rope = self._shard.ops.step_inputs(
            tensors.token_rows,
            tensors.positions,
            self._token_ids,
            self._page_table,
            self._config.page_size,
            self._angles,
        )
        hidden: Tensor = self._shard.model.hidden(
            input_ids, StepContext(slots, rope, self._kv, self._backend, metadata)
        )
        return hidden

    def _sample(self, logits: Tensor, tensors: StepTensors) -> Tensor:
        """[n] int32, written to the token table too."""
        ops, comm, t = self._shard.ops, self._shard.comm, tensors
        ids = torch.empty(len(logits), dtype=torch.int32, device=self._device)
        if comm.size == 1:
            return ops.sample(logits, t.sampling, ids, TokenStore(self._token_ids, t.sample_rows))
        if comm.rank == 0:  # it decides, so that rounding cannot make ranks differ
            ops.sample(logits, t.sampling, ids)
        ids = comm.broadcast(ids)
        ops.store_ids(self._token_ids, t.sample_rows, t.sampling["position"], ids)
        return ids

    def close(self) -> None:
        """Raises nothing: it may be a failure that ends the engine."""
        try:
            with self._on_device():
                del self._graphs  # first: NCCL waits for the end of all graphs that have captured it
                self._shard.comm.close()
                torch.cuda.synchronize()
            del self._kv, self._shard, self._backend
            torch.cuda.empty_cache()
        except (RuntimeError, EngineError) as error:  # of the GPU, or of other ranks, and reported when it happened
            logger.warning("the GPU's memory is left to the end of the process: %s", str(error).splitlines()[0])


def _large_step(config: EngineConfig, num_tokens: int) -> StepPlan:
    """A step of so many tokens, of as many requests as there can be. All use the same pages: what they compute does not
    matter, and large pages for each would take more than there is."""
    num_reqs = min(config.max_running_requests, num_tokens)
    lengths, left = list[int](), num_tokens - num_reqs
    for _ in range(num_reqs):
        lengths.append(1 + min(left, config.max_seq_len - 2))
        left -= lengths[-1] - 1
    admissions, updates, reqs = [], [], []
    for row, length in enumerate(reversed(lengths)):  # the shortest first: those of one token are decode
        pages = range(div_ceil(length, config.page_size))
        params = SamplingParams(temperature=0.8, top_p=0.9, seed=0)
        admissions.append(Admission(row, np.zeros(length, np.int32), params))
        updates.append(PageUpdate(row, 0, tuple(pages)))
        reqs.append(ScheduledReq(row, 0, length, 1))
    return StepPlan(0, tuple(admissions), tuple(updates), tuple(reqs), lengths.count(1))
