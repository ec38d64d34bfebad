"""The runner of a CPU: a thread executes one step after the other, layer by layer in torch's terms, or all layers at
once in C++."""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import numpy as np
import torch

from minisgl.attention.base import IntArray, StepContext
from minisgl.attention.cpu import CpuBackend
from minisgl.attention.create import Backend
from minisgl.config.runtime import EngineConfig
from minisgl.core import NOT_READY, Masks, StepPlan, StepResult, TokenLogprobs
from minisgl.distributed.comm import cpu_communicator
from minisgl.engine.logprobs import gather_logprobs
from minisgl.engine.rules import apply_rules
from minisgl.engine.shard import ModelShard
from minisgl.engine.tables import Batch, TokenTables
from minisgl.errors import ConfigError, EngineError
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.sampling import SamplingColumns
from minisgl.kvcache.pool import KVPool
from minisgl.layers.base import CpuSpec
from minisgl.utils.faults import fault

Tensor = torch.Tensor

logger = logging.getLogger(__name__)


class Forward(Protocol):
    """One step at a time."""

    def __call__(self, batch: Batch) -> Tensor:
        """The logits of the tokens that sample: [n, vocab_size], valid until the next step."""

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits of any tokens of the last step. tokens: [n] int64 → [n, vocab_size]."""


class LayerByLayer:
    """The readable path: the model's own modules, one after the other."""

    def __init__(self, shard: ModelShard, kv: KVPool, backend: Backend) -> None:
        self._model, self._ropes, self._kv, self._backend = shard.model, shard.ropes, kv, backend
        self._hidden = torch.empty(0)

    def __call__(self, batch: Batch) -> Tensor:
        metadata = self._backend.prepare(batch.attention, captured=False)
        ropes = [rope(batch.positions) for rope in self._ropes]
        step = StepContext(batch.slots, ropes, self._kv, self._backend, metadata)
        self._hidden = self._model.hidden(batch.input_ids, step)
        return self._model.logits(self._hidden, batch.logit_tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        return self._model.logits(self._hidden, tokens)


class WholeStep:
    """One call for all layers of one rank, which share their threads without returning to Python. specs: of them."""

    def __init__(self, shard: ModelShard, kv: KVPool, ops: CpuOps, specs: list[CpuSpec]) -> None:
        embedding, *layers, head = specs
        config, model = shard.config.model, shard.model
        self._module, self._backend = ops.module, CpuBackend(ops)
        self._vocab_size, self._keep = config.vocab_size, (model, kv, ops)
        self._rotation = shard.ropes[0](torch.arange(shard.config.max_seq_len + 1))
        self._logits = torch.empty(0, self._vocab_size)
        self._handle: int = self._module.create_model(
            ops.workers,
            config.num_qo_heads,
            config.num_kv_heads,
            config.head_dim,
            config.rms_norm_eps,
            embedding.matrices[0][0],
            head.matrices[0][0],
            model.norm,
        )
        weakref.finalize(self, self._module.destroy_model, self._handle)
        for index, spec in enumerate(layers):
            matrices = (value for matrix in spec.matrices for value in matrix)
            self._module.add_layer(self._handle, *matrices, *spec.norms, *kv.layer(index), spec.window or 0)

    def __call__(self, batch: Batch) -> Tensor:
        num_logits = len(batch.input_ids) if batch.logit_tokens is None else len(batch.logit_tokens)
        if num_logits > len(self._logits):  # kept, since new memory costs a fault for each page
            self._logits = torch.empty(num_logits, self._vocab_size)
        logits = self._logits[:num_logits]
        metadata = self._backend.prepare(batch.attention)
        self._module.forward(
            self._handle,
            batch.input_ids,
            batch.positions,
            batch.slots,
            *metadata,
            self._rotation.cos,
            self._rotation.sin,
            batch.logit_tokens,
            logits,
        )
        return logits

    def logits(self, tokens: Tensor) -> Tensor:
        logits = torch.empty(len(tokens), self._vocab_size)
        self._module.more_logits(self._handle, tokens, logits)
        return logits


def rank_cores(rank: int, tp_size: int) -> list[int]:
    """The cores that a rank's threads keep to, so that ranks do not get into each other's way; []: all.

    Few cores are left to the scheduler of the system, which knows what else has to run on them.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if tp_size == 1 or len(cores) < 4 * tp_size:
        return []
    return cores[rank * len(cores) // tp_size : (rank + 1) * len(cores) // tp_size]


@contextmanager
def _keep_to(cores: list[int]) -> Iterator[None]:
    """Meanwhile, this thread and those that it starts run on these cores; []: on any."""
    before = os.sched_getaffinity(0) if cores else set[int]()
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)


class CpuHandle:
    """A step in the runner's thread (a `core.StepHandle`)."""

    def __init__(self, plan: StepPlan, masks: Masks | None) -> None:
        self.plan, self.masks = plan, masks
        self._done = threading.Event()
        self._result: StepResult | Exception = StepResult(plan.step_id, [])

    def finish(self, result: StepResult | Exception) -> None:
        self._result = result
        self._done.set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._done.wait(timeout)

    def result(self) -> StepResult:
        self._done.wait()
        if isinstance(self._result, Exception):
            raise EngineError(f"step {self.plan.step_id} failed: {self._result}") from self._result
        return self._result


class CpuRunner:
    """Executes steps one after the other, on a thread of its own.

    shard, kv, tables, forward: what it computes with, for tests; while no step is submitted.
    """

    def __init__(self, config: EngineConfig, rank: int) -> None:
        if config.device != "cpu":
            raise ConfigError(f"--device {config.device} is not available (available: cpu, cuda)")
        self._num_threads, self._cores = config.num_threads, rank_cores(rank, config.tp_size)
        self.num_pages = config.num_pages
        with _keep_to(self._cores):  # the threads that it starts, not the caller's
            torch.set_num_threads(self._num_threads)
            comm = cpu_communicator(rank, config.tp_size, config.init_method)
            kernels = CpuOps(config.num_threads) if config.cpu_kernels else None
            self.shard = ModelShard(config, torch.device("cpu"), comm, kernels or TorchOps())
        self.kv = self.shard.create_kv(config.num_pages)
        self.forward = _create_forward(self.shard, self.kv, kernels)
        self.tables = TokenTables(config.max_running_requests, config.max_seq_len, config.page_size)
        self._queue: queue.SimpleQueue[CpuHandle | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="minisgl-engine", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> CpuHandle:
        handle = CpuHandle(plan, masks)
        self._queue.put(handle)
        return handle

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP keeps its number of threads per thread
        if self._cores:
            os.sched_setaffinity(0, self._cores)
        with torch.inference_mode():
            while (handle := self._queue.get()) is not None:
                try:
                    fault("step")
                    handle.finish(self._execute(handle.plan, handle.masks))
                except Exception as error:
                    logger.exception("step %d failed", handle.plan.step_id)
                    handle.finish(error)
        self.shard.comm.close()

    def _execute(self, plan: StepPlan, masks: Masks | None) -> StepResult:
        """What a plan yields; its ids are input of the plans after it."""
        self.tables.apply(plan)
        self.shard.copy_pages(plan, self.kv)
        if not plan.reqs:
            return StepResult(plan.step_id, [])
        batch = self.tables.build(plan)
        logits = self.forward(batch)
        # Every rank takes part: each has a share of the logits.
        wanted = self.tables.logprob_rules.prompt(plan.reqs, batch.index.offsets)
        prompts = (
            None if wanted is None else gather_logprobs(wanted, self.forward.logits, None, self.shard.device).result()
        )
        if not len(batch.sampling):
            return StepResult(plan.step_id, [], None, prompts)
        if (planted := fault("logits")) is not None:
            logits[int(planted.removeprefix("nan "))] = float("nan")
        ids = self._sample(logits, batch, plan, masks)
        self.tables.store_sampled(batch.index, ids)
        token_ids: list[tuple[int, ...]] = list(zip(ids.tolist()))  # each request samples one
        return StepResult(plan.step_id, token_ids, self._logprobs(logits, batch, ids), prompts)

    def _sample(self, logits: Tensor, batch: Batch, plan: StepPlan, masks: Masks | None) -> Tensor:
        """Rank 0 decides, so that rounding cannot make ranks differ."""
        comm, columns, index = self.shard.comm, batch.sampling, batch.index
        ids = torch.empty(len(columns), dtype=torch.int32)
        if comm.rank > 0:
            return comm.broadcast(ids)
        steps = self.tables.logit_rules.steps(index.sample_rows, index.sample_positions, plan.masked, masks)
        if not steps:
            return comm.broadcast(self.shard.ops.sample(logits, columns, ids))
        plain = np.setdiff1d(np.arange(len(ids)), np.concatenate([step.samples for step in steps]))
        if len(plain):
            ids[plain] = self._draw(logits[plain], columns, plain)
        for step in steps:
            changed = apply_rules(logits, step, torch.from_numpy(self.tables.token_ids))
            ids[step.samples] = self._draw(changed, columns, step.samples)
            ids[step.samples[step.absent]] = NOT_READY
        return comm.broadcast(ids)

    def _draw(self, logits: Tensor, columns: SamplingColumns, index: IntArray) -> Tensor:
        """Ids of some of a step's samples. logits: [len(index), vocab]."""
        ids = torch.empty(len(index), dtype=torch.int32)
        return self.shard.ops.sample(logits, columns.select(torch.from_numpy(index)), ids)

    def _logprobs(self, logits: Tensor, batch: Batch, ids: Tensor) -> dict[int, TokenLogprobs] | None:
        step = self.tables.logprob_rules.sampled(batch.index.sample_rows)
        if step is None or self.shard.comm.rank > 0:
            return None
        return gather_logprobs(step, lambda index: logits[index], ids[step.index], logits.device).result()


def _create_forward(shard: ModelShard, kv: KVPool, kernels: CpuOps | None) -> Forward:
    config = shard.config
    if kernels is None or (config.prefill_backend, config.decode_backend) != ("cpu", "cpu"):
        return LayerByLayer(shard, kv, shard.create_attention())
    if shard.comm.size == 1 and (specs := shard.model.cpu_specs()) is not None:
        return WholeStep(shard, kv, kernels, specs)
    return LayerByLayer(shard, kv, cast(Backend, CpuBackend(kernels)))
