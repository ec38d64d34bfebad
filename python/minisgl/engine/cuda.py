"""The runner of a GPU: steps are launched and not waited for; sampled ids stay on the device for the next step.

A decode step is one host-to-device copy, one graph replay and one copy of the ids back. Everything else of a step
that is not in the graph (prompts and pages that rows gain, steps with prefill) is launched op by op.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from minisgl.attention.base import AttentionStep, StepContext
from minisgl.attention.create import Backend
from minisgl.config.runtime import EngineConfig
from minisgl.core import NOT_READY, Masks, ScheduledReq, StepPlan, StepResult
from minisgl.distributed.cuda import cuda_communicator
from minisgl.engine.graph import DecodeGraphs, GraphShape
from minisgl.engine.logprobs import DeviceLogprobs, gather_logprobs
from minisgl.engine.memory import activation_bytes, large_step, num_pages_used, pages_that_fit
from minisgl.engine.rules import LogitStep, apply_rules, to_device
from minisgl.engine.shard import DTYPES, ModelShard
from minisgl.engine.staging import NUM_BUFFERS, DeviceTables, StepTensors
from minisgl.engine.tables import StepIndex
from minisgl.errors import ConfigError, EngineError
from minisgl.kernel.cuda import create_cuda_ops
from minisgl.kernel.ops import PagedSequences
from minisgl.kernel.sampling import TokenStore
from minisgl.kvcache.pool import KVPool
from minisgl.utils.faults import fault
from minisgl.utils.math import div_ceil

Tensor = torch.Tensor

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2e-5
_NO_STEP = StepPlan(0, (), (), ())


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


class Launched(NamedTuple):
    """Results that will be on the host when the step is done."""

    ids: Tensor  # [n] int32
    logprobs: DeviceLogprobs | None = None
    prompt_logprobs: DeviceLogprobs | None = None


class CudaHandle:
    """A launched step, whose results are on the host after the event (a `core.StepHandle`)."""

    def __init__(self, step_id: int, event: torch.cuda.Event, launched: Launched | Exception) -> None:
        self._step_id, self._event, self._launched = step_id, event, launched

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.perf_counter() + timeout
        try:
            while not isinstance(self._launched, Exception) and not self._event.query():
                if deadline is not None and time.perf_counter() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:  # CUDA reports here what went wrong on the device
            self._launched = error
        return True

    def result(self) -> StepResult:
        self.wait()
        launched = self._launched
        if isinstance(launched, Exception):
            raise EngineError(f"step {self._step_id} failed: {launched}") from launched
        logprobs = None if launched.logprobs is None else launched.logprobs.result()
        prompts = None if launched.prompt_logprobs is None else launched.prompt_logprobs.result()
        token_ids: list[tuple[int, ...]] = list(zip(launched.ids.tolist()))  # each request samples one
        return StepResult(self._step_id, token_ids, logprobs, prompts)


class CudaRunner:
    """Raises: ConfigError when the GPU cannot be used, or the model or the cache does not fit its memory."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._device = open_gpu(rank)
        self._stream = torch.cuda.Stream(self._device)
        try:
            with self._on_device():
                self.shard = load_shard(config, rank, self._device)
                self.num_pages, self._launcher = create_launcher(self.shard)
        except torch.cuda.OutOfMemoryError as error:
            total = torch.cuda.get_device_properties(self._device).total_memory / 2**30
            raise ConfigError(
                f"the model does not fit the GPU ({total:.0f} GiB): try --tensor-parallel-size, a lower "
                f"--max-prefill-length or --max-running-requests ({str(error).splitlines()[0]})"
            ) from error

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> CudaHandle:
        """Launch a step. What fails at once is reported by the handle, like what fails later."""
        event = torch.cuda.Event()
        try:
            fault("step")
            with self._on_device():
                launched = self._launcher.launch(plan, masks)
                event.record()
                return CudaHandle(plan.step_id, event, launched)
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            return CudaHandle(plan.step_id, event, error)

    def close(self) -> None:
        """Raises nothing: it may be a failure that ends the engine."""
        try:
            with self._on_device():
                del self._launcher  # first: NCCL waits for the end of all graphs that have captured it
                self.shard.comm.close()
                torch.cuda.synchronize()
            del self.shard
            torch.cuda.empty_cache()
        except (RuntimeError, EngineError) as error:  # of the GPU, or of other ranks, and reported when it happened
            logger.warning("the GPU's memory is left to the end of the process: %s", str(error).splitlines()[0])


def load_shard(config: EngineConfig, rank: int, device: torch.device) -> ModelShard:
    """The model, and what a GPU computes with."""
    dtype, vocab_size = DTYPES[config.dtype], div_ceil(config.model.vocab_size, config.tp_size) * config.tp_size
    logit_bytes = config.max_running_requests * vocab_size * dtype.itemsize
    comm = cuda_communicator(rank, config.tp_size, config.init_method, config.use_pynccl, logit_bytes)
    return ModelShard(config, device, comm, create_cuda_ops(device, dtype, config.moe_backend))


def create_launcher(shard: ModelShard) -> tuple[int, StepLauncher]:
    """The number of pages of the KV cache, and what launches steps with it."""
    config = shard.config
    tables = DeviceTables(config, shard.ops, shard.ropes, shard.device)
    backend = shard.create_attention()
    num_pages = pages_that_fit(config, shard.comm, _activation_bytes(shard, tables, backend))
    tables.set_padding_page(num_pages)
    launcher = StepLauncher(shard, shard.create_kv(num_pages + 1), tables, backend, config.cuda_graph_max_bs)
    torch.cuda.synchronize()
    return num_pages, launcher


def _activation_bytes(shard: ModelShard, tables: DeviceTables, backend: Backend) -> int:
    """What the largest step takes, with a cache of no more pages than it needs."""
    num_pages = num_pages_used(large_step(shard.config, shard.config.max_prefill_length))
    launcher = StepLauncher(shard, shard.create_kv(num_pages), tables, backend, max_batch=0)
    return activation_bytes(shard.config, launcher.launch)


class StepLauncher:
    """Launches steps on the current stream. max_batch: of the largest decode step that is captured; 0: none is."""

    def __init__(self, shard: ModelShard, kv: KVPool, tables: DeviceTables, backend: Backend, max_batch: int) -> None:
        self._shard, self._kv, self._tables, self._backend = shard, kv, tables, backend
        num_rows = shard.config.max_running_requests
        self._out = [torch.empty(num_rows, dtype=torch.int32, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._graphs = DecodeGraphs(self._decode, max_batch, show_progress=max_batch > 0 and shard.comm.rank == 0)

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Launched:
        self._tables.host.apply(plan)
        self._shard.copy_pages(plan, self._kv)
        launched = Launched(self._tables.token_ids[0, :0])
        if plan.reqs:
            shape = self._graphs.shape_for(len(plan.reqs), 1) if plan.is_decode_only else None
            launched = self._launch_eager(plan, masks) if shape is None else self._launch_graph(plan, masks, shape)
        out = self._out[plan.step_id % NUM_BUFFERS][: len(launched.ids)]
        return launched._replace(ids=out.copy_(launched.ids, non_blocking=True))

    def _launch_graph(self, plan: StepPlan, masks: Masks | None, shape: GraphShape) -> Launched:
        """The captured step has more requests than the plan: the others are nobody's."""
        num = len(plan.reqs)
        index = StepIndex.of((*plan.reqs, *self._padding(shape, shape.batch - num)))
        self._tables.send(plan, index)
        if self._backend.plans_captured:
            step = self._attention_step(self._tables.tensors(index), index, shape.batch)
            self._backend.prepare(step, captured=True)
        ids = self._graphs.replay(shape)[:num]
        return self._finish(plan, masks, index, ids, lambda: self._graphs.logits(shape))

    def _launch_eager(self, plan: StepPlan, masks: Masks | None) -> Launched:
        index, model = StepIndex.of(plan.reqs), self._shard.model
        self._tables.send(plan, index)
        tensors = self._tables.tensors(index)
        step = self._attention_step(tensors, index, plan.num_decode)
        hidden = self._hidden(tensors, self._backend.prepare(step, captured=False))
        wanted, prompts = self._tables.host.logprob_rules.prompt(plan.reqs, index.offsets), None
        if wanted is not None:  # every rank takes part: each has a share of the logits
            prompts = gather_logprobs(wanted, lambda tokens: model.logits(hidden, tokens), None, self._shard.device)
        logits = model.logits(hidden, tensors.logit_tokens)
        if not len(logits):
            return Launched(self._tables.token_ids[0, :0], None, prompts)
        ids = self._sample(logits, tensors)
        return self._finish(plan, masks, index, ids, lambda: logits)._replace(prompt_logprobs=prompts)

    def _finish(
        self, plan: StepPlan, masks: Masks | None, index: StepIndex, ids: Tensor, logits: Callable[[], Tensor]
    ) -> Launched:
        """Sample again the rows whose logits are to be changed, and gather log-probabilities. ids: those of the plan,
        which come first in `index`; logits: what they were sampled from, asked for only then."""
        rows, positions = index.sample_rows[: len(ids)], index.sample_positions[: len(ids)]
        steps = self._tables.host.logit_rules.steps(rows, positions, plan.masked, masks)
        wanted = self._tables.host.logprob_rules.sampled(rows)
        if not steps and wanted is None:
            return Launched(ids)
        before = logits()
        self._sample_again(before, steps, self._tables.tensors(index), ids)
        if wanted is None or self._shard.comm.rank > 0:
            return Launched(ids)
        chosen = ids.index_select(0, to_device(wanted.index, ids.device))
        return Launched(
            ids, gather_logprobs(wanted, lambda samples: before.index_select(0, samples), chosen, ids.device)
        )

    def _sample_again(self, logits: Tensor, steps: Sequence[LogitStep], tensors: StepTensors, ids: Tensor) -> None:
        """Sample some rows from changed logits, in place of what the step has sampled for them: so a captured step
        stays whole, and those that need nothing pay nothing."""
        ops, comm, token_ids = self._shard.ops, self._shard.comm, self._tables.token_ids
        for step in steps:
            index = to_device(step.samples, ids.device)
            columns, rows = tensors.sampling.select(index), tensors.sample_rows.index_select(0, index)
            new = torch.empty(len(index), dtype=torch.int32, device=ids.device)
            if comm.rank == 0:
                ops.sample(apply_rules(logits, step, token_ids), columns, new)
                if len(step.absent):
                    new[to_device(step.absent, ids.device)] = NOT_READY
            new = comm.broadcast(new)
            ops.store_ids(token_ids, rows, columns["position"], new)
            ids.index_copy_(0, index, new)

    def _sample(self, logits: Tensor, tensors: StepTensors) -> Tensor:
        """[n] int32, written to the token table too."""
        ops, comm, token_ids = self._shard.ops, self._shard.comm, self._tables.token_ids
        ids = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        if comm.size == 1:
            return ops.sample(logits, tensors.sampling, ids, TokenStore(token_ids, tensors.sample_rows))
        if comm.rank == 0:  # it decides, so that rounding cannot make ranks differ
            ops.sample(logits, tensors.sampling, ids)
        ids = comm.broadcast(ids)
        ops.store_ids(token_ids, tensors.sample_rows, tensors.sampling["position"], ids)
        return ids

    def _padding(self, shape: GraphShape, num: int) -> tuple[ScheduledReq, ...]:
        """So many requests of nobody."""
        return (ScheduledReq(self._tables.padding_row, 0, shape.q_len, shape.q_len),) * num

    def _decode(self, shape: GraphShape) -> Callable[[], tuple[Tensor, Tensor]]:
        """What is captured: a decode step from the staging buffer, which now holds one of nobody. The function computes
        it → its ids and logits."""
        index = StepIndex.of(self._padding(shape, shape.batch))
        self._tables.send(_NO_STEP, index)
        tensors = self._tables.tensors(index)
        metadata = self._backend.prepare(self._attention_step(tensors, index, shape.batch), captured=True)

        def run() -> tuple[Tensor, Tensor]:
            logits = self._shard.model.logits(self._hidden(tensors, metadata), None)
            return self._sample(logits, tensors), logits

        return run

    def _attention_step(self, tensors: StepTensors, index: StepIndex, num_decode: int) -> AttentionStep:
        tables, page_size = self._tables, self._shard.config.page_size
        device = PagedSequences(tables.page_table, tensors.rows, tensors.seq_lens, tensors.cu_q, page_size)
        return tables.host.attention(index, num_decode, device)

    def _hidden(self, tensors: StepTensors, metadata: object) -> Tensor:
        """Run the model's layers: [num_tokens, hidden]."""
        input_ids, slots, ropes = self._tables.inputs(tensors)
        return self._shard.model.hidden(input_ids, StepContext(slots, ropes, self._kv, self._backend, metadata))
