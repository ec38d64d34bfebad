"""What every device's runner has: the model of one rank with its weights, the tables of the running requests, and how a
batch becomes logits on a CPU: layer by layer in torch's terms, or all at once in C++."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from minisgl.attention.base import IntArray, StepContext
from minisgl.attention.cpu import CpuBackend
from minisgl.attention.create import Backend, create_backend
from minisgl.config.model import ModelConfig
from minisgl.config.runtime import EngineConfig
from minisgl.core import NOT_READY, Masks, StepPlan, StepResult, TokenLogprobs
from minisgl.distributed.create import create_communicator
from minisgl.engine.batch import Batch, Tables, by_request, copy_pages
from minisgl.engine.logprobs import gather_logprobs
from minisgl.engine.rules import apply_rules
from minisgl.errors import ConfigError
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.sampling import SamplingColumns
from minisgl.kvcache.pool import KVPool
from minisgl.layers.base import CpuSpec, LayerEnv
from minisgl.layers.formats import FORMATS
from minisgl.layers.rope import RotaryEmbedding
from minisgl.models.checkpoint import Checkpoint, fill_random, load_weights
from minisgl.models.decoder import DecoderModel
from minisgl.utils.faults import fault
from minisgl.utils.math import div_ceil

Tensor = torch.Tensor


class Forward(Protocol):
    """One step at a time."""

    def __call__(self, batch: Batch) -> Tensor:
        """The logits of the tokens that sample: [n, vocab_size], valid until the next step."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Those of any tokens of the last step. tokens: [n] int64 → [n, vocab_size]."""


class LayerByLayer:
    """The readable path: the model's own modules, one after the other."""

    def __init__(self, model: DecoderModel, rope: RotaryEmbedding, kv: KVPool, backend: Backend) -> None:
        self._model, self._rope, self._kv, self._backend = model, rope, kv, backend
        self._hidden: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        metadata = self._backend.prepare(batch.attention, captured=False)
        step = StepContext(batch.slots, self._rope(batch.positions), self._kv, self._backend, metadata)
        self._hidden = self._model.hidden(batch.input_ids, step)
        return self._model.logits(self._hidden, batch.logit_tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        return self._model.logits(self._hidden, tokens)


class WholeStep:
    """One call for all layers of one rank, which share their threads without returning to Python. specs: of `model`."""

    def __init__(
        self,
        config: ModelConfig,
        model: DecoderModel,
        specs: list[CpuSpec],
        rope: RotaryEmbedding,
        kv: KVPool,
        ops: CpuOps,
        max_seq_len: int,
    ) -> None:
        embedding, *layers, head = specs
        self._module, self._backend = ops.module, CpuBackend(ops)
        self._vocab_size, self._keep = config.vocab_size, (model, kv, ops)
        self._rotation = rope(torch.arange(max_seq_len + 1))
        self._logits = torch.empty(0, self._vocab_size)
        self._handle: int = self._module.create_model(
            ops.workers,
            config.num_qo_heads,
            config.rms_norm_eps,
            embedding.matrices[0][0],
            head.matrices[0][0],
            model.norm,
            kv.keys,
            kv.values,
        )
        weakref.finalize(self, self._module.destroy_model, self._handle)
        for spec in layers:
            matrices = (value for matrix in spec.matrices for value in matrix)
            self._module.add_layer(self._handle, *matrices, *spec.norms, spec.window or 0)

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


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelShard:
    """The model of one rank, loaded, and what it computes with.

    Raises: ConfigError when the model cannot be loaded or does not fit the configuration.
    """

    def __init__(self, config: EngineConfig, rank: int, device: torch.device) -> None:
        self.config, self.device, self.dtype = config, device, DTYPES[config.dtype]
        rows = config.max_running_requests if config.device == "cuda" else 0
        vocab_size = div_ceil(config.model.vocab_size, config.tp_size) * config.tp_size
        logit_bytes = rows * vocab_size * self.dtype.itemsize
        self.comm = create_communicator(
            rank, config.tp_size, config.init_method, config.device, config.use_pynccl, logit_bytes
        )
        self.cpu_ops = CpuOps(config.num_threads) if config.cpu_kernels else None
        self.ops: TorchOps = self.cpu_ops or _create_ops(device, self.dtype, config.moe_backend)
        start = time.perf_counter()
        with torch.inference_mode():
            env = LayerEnv(self.comm, self.ops, self.dtype, device, FORMATS[config.quantization])
            checkpoint = None if config.dummy_weight else Checkpoint(config.model_path)
            self.model = DecoderModel(env, checkpoint.untied(config.model) if checkpoint else config.model)
            if checkpoint:
                load_weights(self.model.parts(), checkpoint, show_progress=rank == 0)
            else:
                fill_random(self.model.parts(), config.seed)
            self.rope = RotaryEmbedding(config.model.ropes[0], config.model.head_dim, device)
        logger.info("weights ready after %.1f s", time.perf_counter() - start)

    def create_kv(self, num_pages: int) -> KVPool:
        num_slots = num_pages * self.config.page_size
        kv_dtype = DTYPES[self.config.kv_cache_dtype]
        return KVPool(self.config.model, num_slots, self.config.tp_size, kv_dtype, self.device)

    def create_forward(self, kv: KVPool) -> Forward:
        """How a CPU computes a step."""
        config = self.config
        is_whole = config.tp_size == 1 and config.decode_backend == "cpu"
        if is_whole and self.cpu_ops is not None and (specs := self.model.cpu_specs()) is not None:
            return WholeStep(config.model, self.model, specs, self.rope, kv, self.cpu_ops, config.max_seq_len)
        return LayerByLayer(self.model, self.rope, kv, self.create_attention())

    def create_attention(self) -> Backend:
        """It computes in the type of its cache, which on a CPU need not be that of the weights."""
        return create_backend(self.config, DTYPES[self.config.kv_cache_dtype], self.device, self.ops)


def _create_ops(device: torch.device, dtype: torch.dtype, moe_backend: str) -> TorchOps:
    if device.type == "cpu":
        return TorchOps()
    from minisgl.kernel.cuda import create_cuda_ops

    return create_cuda_ops(device, dtype, moe_backend)


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
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Runner:
    """The reference runner: one step at a time, in the thread that calls it, on the CPU."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        if config.device != "cpu":
            raise ConfigError(f"--device {config.device} is not available (available: cpu, cuda)")
        self._num_threads = config.num_threads
        self._cores = rank_cores(rank, config.tp_size)
        self.num_pages = config.num_pages
        with _keep_to(self._cores):  # the threads that it starts, not the caller's
            torch.set_num_threads(self._num_threads)
            self._shard = ModelShard(config, rank, torch.device("cpu"))
        self._kv = self._shard.create_kv(config.num_pages)
        self.forward = self._shard.create_forward(self._kv)
        self._tables = Tables(config.max_running_requests, config.max_seq_len, config.page_size)

    def enter_thread(self) -> None:
        """Called first by the thread that executes steps: OpenMP keeps its number of threads per thread."""
        torch.set_num_threads(self._num_threads)
        if self._cores:
            os.sched_setaffinity(0, self._cores)

    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        """What a plan yields; its ids are input of the plans after it."""
        self._tables.apply(plan)
        copy_pages(plan, self._kv, self._tables.page_size, self._shard.device)
        if not plan.reqs:
            return StepResult(plan.step_id, [])
        batch = self._tables.build(plan)
        logits = self.forward(batch)
        prompts = self._prompt_logprobs(plan, batch)
        if not len(batch.sampling):
            return StepResult(plan.step_id, [], None, prompts)
        if (planted := fault("logits")) is not None:
            logits[int(planted.removeprefix("nan "))] = float("nan")
        ids = self._sample(logits, batch, plan, masks)
        self._tables.store_sampled(batch.sampled_at, ids)
        return StepResult(plan.step_id, by_request(ids), self._logprobs(logits, batch, ids), prompts)

    def _sample(self, logits: torch.Tensor, batch: Batch, plan: StepPlan, masks: Masks | None) -> torch.Tensor:
        """Rank 0 decides, so that rounding cannot make ranks differ."""
        comm, ops, columns = self._shard.comm, self._shard.ops, batch.sampling
        ids = torch.empty(len(columns), dtype=torch.int32)
        if comm.rank > 0:
            return comm.broadcast(ids)
        steps = self._tables.logit_rules.steps(*batch.sampled_at, plan.masked, masks)
        if not steps:
            return comm.broadcast(ops.sample(logits, columns, ids))
        plain = np.setdiff1d(np.arange(len(ids)), np.concatenate([step.samples for step in steps]))
        if len(plain):
            ids[plain] = self._draw(logits[plain], columns, plain)
        for step in steps:
            changed = apply_rules(logits, step, torch.from_numpy(self._tables.token_ids))
            ids[step.samples] = self._draw(changed, columns, step.samples)
            ids[step.samples[step.absent]] = NOT_READY
        return comm.broadcast(ids)

    def _draw(self, logits: torch.Tensor, columns: SamplingColumns, index: IntArray) -> torch.Tensor:
        """Ids of some of a step's samples. logits: [len(index), vocab]."""
        ids = torch.empty(len(index), dtype=torch.int32)
        return self._shard.ops.sample(logits, columns.select(torch.from_numpy(index)), ids)

    def _logprobs(self, logits: torch.Tensor, batch: Batch, ids: torch.Tensor) -> dict[int, TokenLogprobs] | None:
        step = self._tables.logprob_rules.sampled(batch.sampled_at[0])
        if step is None or self._shard.comm.rank > 0:
            return None
        return gather_logprobs(step, lambda index: logits[index], ids[step.index], logits.device).result()

    def _prompt_logprobs(self, plan: StepPlan, batch: Batch) -> dict[int, TokenLogprobs] | None:
        """Every rank takes part: each has a share of the logits."""
        step = self._tables.logprob_rules.prompt(plan.reqs, batch.attention.offsets)
        if step is None:
            return None
        return gather_logprobs(step, self.forward.logits, None, self._shard.device).result()

    def close(self) -> None:
        self._shard.comm.close()
