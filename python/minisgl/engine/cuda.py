"""The runner of a GPU: steps are launched and not waited for; sampled ids stay on the device for the next step.

A decode step is one host-to-device copy, one graph replay and one copy of the ids back. Everything else of a step
that is not in the graph (prompts and pages that rows gain, steps with prefill) is launched op by op."""

import ctypes
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from minisgl.attention.create import Backend
from minisgl.config.runtime import EngineConfig
from minisgl.core import Masks, ScheduledReq, StepPlan, StepResult, most_samples
from minisgl.distributed.comm import Communicator, Rendezvous
from minisgl.distributed.cuda import CudaCommunicator
from minisgl.engine.draft import HeadDrafter, SecondModel
from minisgl.engine.graph import DecodeGraphs, RunStep
from minisgl.engine.memory import activation_bytes, large_step, pages_that_fit
from minisgl.engine.rules import StepRules
from minisgl.engine.shapes import GraphShape, captured_shapes, fit, one_by_one
from minisgl.engine.shard import DTYPES, ModelShard
from minisgl.engine.staging import DeviceTables
from minisgl.engine.step import Launched, LayerByLayer, StepRunner
from minisgl.engine.tables import Batch, StepIndex, StepTensors
from minisgl.errors import ConfigError, EngineError
from minisgl.kernel.cuda import create_cuda_ops
from minisgl.utils.math import div_ceil

Tensor = torch.Tensor
logger = logging.getLogger(__name__)

_POLL_SECONDS, _NO_STEP = 2e-5, StepPlan(0, (), (), ())
_PROMPT_READS = 1 << 16  # tokens before tokens of prompts that are computed as if they were decoded
_LIBC, _PR_SET_TIMERSLACK = ctypes.CDLL(None), 29


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


class CudaHandle:
    """A launched step, whose results are on the host after the event (a `core.StepHandle`)."""

    def __init__(self, plan: StepPlan, event: torch.cuda.Event, launched: Launched | Exception) -> None:
        self._plan, self._event, self._launched = plan, event, launched

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.perf_counter() + timeout
        _LIBC.prctl(_PR_SET_TIMERSLACK, 1)  # sleeps of this thread end in time, not 50 microseconds later
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
        if isinstance(self._launched, Exception):
            raise EngineError(f"step {self._plan.step_id} failed: {self._launched}") from self._launched
        return self._launched.result(self._plan)


class CudaRunner:
    """steps: what it computes with, for tests.

    Raises: ConfigError when the GPU cannot be used, or the model or the cache does not fit its memory."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._device = open_gpu(rank)
        self._stream = torch.cuda.Stream(self._device)
        try:
            with self._on_device():
                pages, self.steps = create_steps(load_shard(config, rank, self._device))
                self.num_pages, self.num_window_pages = pages
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
            with self._on_device():
                launched = self.steps.launch(plan, masks)
                event.record()
                return CudaHandle(plan, event, launched)
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            return CudaHandle(plan, event, error)

    def close(self) -> None:
        """Raises nothing: it may be a failure that ends the engine."""
        try:
            with self._on_device():
                comm = self.steps.shard.comm
                self.steps.propose = None  # who knows the steps, too
                del self.steps  # first: NCCL waits for the end of all graphs that have captured it
                comm.close()
                torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except (RuntimeError, EngineError) as error:  # of the GPU, or of other ranks, and reported when it happened
            logger.warning("the GPU's memory is left to the end of the process: %s", str(error).splitlines()[0])


def load_shard(config: EngineConfig, rank: int, device: torch.device) -> ModelShard:
    """The model, and what a GPU computes with."""
    dtype, size, comm = DTYPES[config.dtype], config.tp_size, Communicator()
    if size > 1:
        num_logits = most_samples(config.max_running_requests) * div_ceil(config.model.vocab_size, size) * size
        meeting = Rendezvous(rank, size, config.init_method)
        comm = CudaCommunicator(meeting, config.use_pynccl, num_logits * dtype.itemsize)
    return ModelShard(config, device, comm, create_cuda_ops(device, dtype, config.moe_backend))


def create_steps(shard: ModelShard) -> tuple[tuple[int, int], "CapturedSteps"]:
    """→ pages of the KV cache (of layers that see all, and of those with windows), and what launches steps."""
    config, backend = shard.config, shard.create_attention()
    tables = DeviceTables(config, shard.ops, shard.ropes, shard.device)
    second = SecondModel(shard, *config.model.second) if config.model.second and not shard.head else None
    num_pages = pages_that_fit(config, shard.comm, _activation_bytes(shard, tables, backend, second))
    # Behind all others. Without windows both kinds of layers have the first table, which is written last.
    tables.window_table[tables.padding_row] = tables.host.window_pages[tables.padding_row] = num_pages[1]
    tables.page_table[tables.padding_row] = tables.host.pages[tables.padding_row] = num_pages[0]
    steps = CapturedSteps(shard, tables, backend, [num + 1 for num in num_pages], config.cuda_graph_max_bs, second)
    torch.cuda.synchronize()
    return num_pages, steps


def _activation_bytes(shard: ModelShard, tables: DeviceTables, backend: Backend, second: SecondModel | None) -> int:
    """Bytes that the largest step takes, measured with a cache of no more pages than it needs."""
    largest = large_step(shard.config, shard.config.max_prefill_length)
    num_pages = max(len(update.pages) for update in largest.page_updates)
    steps = CapturedSteps(shard, tables, backend, [num_pages] * 2, max_batch=0, second=second)
    try:
        return activation_bytes(shard.config, steps.launch)
    finally:
        steps.propose = None  # or a drafter and its steps keep each other, and the cache


class CapturedSteps(StepRunner):
    """Launches steps on the current stream: as graphs those of up to `max_batch` samples that only decode, or verify
    drafts. num_pages: of both kinds of the cache's layers; second: a model that guesses."""

    tables: DeviceTables

    def __init__(
        self, shard: ModelShard, tables: DeviceTables, backend: Backend, num_pages: Sequence[int], max_batch: int,
        second: SecondModel | None = None,
    ) -> None:  # fmt: skip
        kv = shard.create_kv(*num_pages)
        self._layers, self._backend = LayerByLayer(shard, kv, backend, tables.inputs), backend
        super().__init__(shard, kv, tables, self._layers)
        self.left: tuple[Tensor, Tensor] | None = None  # of `HeadDrafter`
        if (head := second or shard.head) is not None:
            drafter = HeadDrafter(head, self, self._layers, *num_pages)
            self.propose, self.left = drafter.propose, drafter.left if shard.ops.draft is not None else None
        longest, kinds = shard.config.draft_len, shard.config.model.states
        self._has_states, self._by_request = bool(kinds), bool(kinds) or head is not None  # layers know requests
        can = not kinds or shard.ops.captures_chunks(kinds)
        self._shapes = captured_shapes(max_batch, longest * (self._by_request and can), shard.config.max_seq_len)
        self._wide = [shape for shape in self._shapes if shape.is_wide]
        self._counting = torch.arange(max_batch + 1, dtype=torch.int32, device=shard.device)
        self._graphs = DecodeGraphs(self._capture, self._shapes)

    def _launch(self, plan: StepPlan, masks: Masks | None, before: Launched) -> Launched:
        """Replay a captured step that holds the plan, padded with requests of nobody's; else launch op by op."""
        num, row = sum(share.num_samples for share in plan.reqs), self.tables.padding_row
        finds_start = before.accepted is not None and self.tables.places is not None  # a captured step, on the device
        if not finds_start or self._backend.plans_captured or num < plan.num_tokens:
            plan = self._resolved(plan, before)
        asks = self.propose is not None and any(share.next_draft_len for share in plan.reqs)
        reqs, size = plan.reqs if plan.num_decode == len(plan.reqs) else self._as_captured(plan), plan.num_tokens
        # Plain graphs make no drafts, and let states take in no accepted tokens.
        shapes = self._wide if any(share.num_accepted or share.follows for share in reqs) else self._shapes
        found = (fit(self._wide, reqs, row) if asks else None) or fit(shapes, reqs, row)
        if found is None:
            return super()._launch(plan, masks, before)
        (shape, padding), usual = found, 1 + self.shard.config.draft_len
        index = StepIndex.of((*reqs, *padding))
        if num < size:
            index = index.all_sampled(num, row)
        if are_new := num < size or bool(plan.admissions):  # requests may read what others write in the same step
            self.tables.fresh.fill_(max(size, usual))
        self.tables.send(plan, index, masks)
        if self._backend.plans_captured:
            self._backend.prepare_both(self._batch(index, shape).attention, captured=True)
        ids, told = self._graphs.replay(shape)
        if are_new:
            self.tables.fresh.fill_(usual)
        source = lambda: (self._graphs.logits(shape), self.tables.tensors(index))  # noqa: E731
        launched = self._finish(plan, masks, index, ids[:num], source)
        drafts = None if told is None or self.propose is None else told[: len(plan.reqs)]
        accepted = self.left[0][: len(plan.reqs)] if self.left and drafts is not None and shape.is_wide else None
        return launched._replace(drafts=drafts, plan=plan, accepted=accepted)

    def _as_captured(self, plan: StepPlan) -> tuple[ScheduledReq, ...]:
        """The requests, as a captured step has them, of a step with drafts, or with prompts so short that reading all
        before each of their tokens takes less time than a launch op by op; none where it cannot be captured."""
        host, row = self.tables.host, self.tables.padding_row
        prompts = [req for req in plan.reqs if req.num_new > req.num_samples]
        num_read = sum(req.num_new * (req.start + req.num_new) for req in prompts)
        can = not self._has_states and not any(req.row in host.pooled.wanted for req in prompts)
        logprobs = host.logprob_rules.prompt(plan.reqs, np.zeros(len(plan.reqs), np.int64))
        if logprobs is not None or num_read > _PROMPT_READS * can:
            return ()
        nobody = [ScheduledReq(row, 0, 1, 1)] * bool(prompts)
        return (*plan.reqs, *nobody) if self._by_request else one_by_one(plan.reqs)

    def _batch(self, index: StepIndex, shape: GraphShape) -> Batch:
        """The batch of a captured step, whose numbers were sent. In a wide one each token is a sequence of its own to
        attention, which has the keys and values of those before it."""
        batch = self.batch(index, shape.num_reqs)
        if not shape.is_wide:
            return batch
        tensors, num = batch.tensors, shape.num_tokens
        on_device = tensors.token_rows, tensors.ends, self._counting[: num + 1]
        alone = index.token_rows, index.positions, np.ones(num, np.int64), np.arange(num + 1)
        return Batch(index, tensors, self.attention(alone, on_device, num), tensors.logit_tokens)

    def _sample(
        self, logits: Tensor, tensors: StepTensors, rules: StepRules | None = None, ids: Tensor | None = None
    ) -> Tensor:
        if ids is not None:  # the replay has overwritten the drafts, which penalties count
            self.tables.write_drafts()
        return super()._sample(logits, tensors, rules, ids)

    def _capture(self, shape: GraphShape) -> RunStep:
        """What is captured: a step from the staging buffer, which now has nobody's → its results and logits."""
        index = StepIndex.of(shape.padding((), self.tables.padding_row) or ())
        self.tables.send(_NO_STEP, index)
        batch, propose, most = self._batch(index, shape), self.propose, self.shard.config.draft_len * shape.is_wide
        metadata = self._backend.prepare_both(batch.attention, captured=True)
        step, left = batch.tensors, self.left if shape.is_wide else None

        def run() -> tuple[tuple[Tensor, Tensor | None], Tensor]:
            if left is not None:
                numbers = step.follows, step.cu_q, step.rows, step.positions, step.ends, step.seq_lens, step.drafted
                self.shard.ops.draft.follow(*left, *numbers, step.sampling.words, self.tables.token_ids)
            computed = self._layers(batch, metadata)
            logits = computed.logits(None)
            ids = self._sample(logits, batch.tensors)
            return (ids, propose and propose(batch, computed, ids, most)), logits

        return run
