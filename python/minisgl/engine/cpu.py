"""The runner of a CPU: a thread executes the steps, layer by layer in torch's terms, or all layers at once in C++."""

import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from functools import partial
from typing import cast

import numpy as np
import torch

from minisgl.attention.cpu import CpuBackend
from minisgl.attention.create import Backend
from minisgl.config.runtime import EngineConfig
from minisgl.core import ID_PENDING, MASK_PENDING, Masks, StepPlan, StepResult
from minisgl.distributed.comm import Communicator, GlooCommunicator, Rendezvous
from minisgl.engine.draft import add_drafter
from minisgl.engine.logprobs import LogprobStep
from minisgl.engine.pooling import Computed
from minisgl.engine.shard import ModelShard
from minisgl.engine.step import LayerByLayer, StepRunner
from minisgl.engine.tables import Batch, RowTables, StepIndex, StepTensors
from minisgl.errors import ConfigError, EngineError
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.masks import Words, tell
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.sampling import SamplingColumns
from minisgl.kvcache.pool import KVPool
from minisgl.layers.base import CpuSpec
from minisgl.layers.rope import AngleTables

Tensor = torch.Tensor
logger = logging.getLogger(__name__)
_MASK_SECONDS = 1.0  # a step waits for masks, when its layers are computed


class CpuTables:
    """What steps on a CPU read, beside what every engine's host remembers (`host`)."""

    def __init__(self, config: EngineConfig) -> None:
        self.padding_row = num_rows = config.max_running_requests  # of nobody's requests
        self.places: Tensor | None = None
        self.fresh = torch.ones(1, dtype=torch.int32)  # nobody looks
        self.masks: tuple[Tensor | None, ...] = (None,) * 3  # words, states and samples
        self.host = RowTables(num_rows + 1, config.max_seq_len, config.page_size, config.window)
        self.host.window_pages[-1], self.host.pages[-1] = config.num_window_pages, config.num_pages
        self.page_table, self.window_table = map(torch.from_numpy, (self.host.pages, self.host.window_pages))
        self._ids = np.zeros((num_rows + 1, config.max_seq_len + 2), np.int32)  # memory is used later
        self.token_ids = torch.from_numpy(self._ids)

    def send(self, plan: StepPlan, index: StepIndex, masks: Masks | None = None) -> None:
        """Its numbers are read where they are, and so are masks, as far as they are there when the head begins."""
        self.masks = (None,) * 3
        if isinstance(masks, Asked):
            self.masks = masks.board(self.host.logprob_rules.sampled(index.sample_rows))
        for admission in plan.admissions:
            self._ids[admission.row, : len(admission.token_ids)] = admission.token_ids
        for row, position, ids in plan.drafts:
            self._ids[row, position : position + len(ids)] = ids

    def tensors(self, index: StepIndex) -> StepTensors:
        sampling = SamplingColumns(torch.from_numpy(self.host.sampling(index)))
        return StepTensors(sampling, *map(torch.from_numpy, index.numbers))

    def inputs(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Ids and slots of a step's tokens."""
        at, windowed = (batch.tensors.token_rows.numpy(), batch.tensors.positions.numpy()), batch.attention.windowed
        ids, slots = self._ids[at].astype(np.int64), torch.from_numpy(batch.attention.slots_of(*at))
        return torch.from_numpy(ids), [slots, slots if windowed is None else torch.from_numpy(windowed.slots_of(*at))]


class WholeStep:
    """One call for all layers of one rank, which share their threads without returning to Python. specs: of them."""

    def __init__(self, shard: ModelShard, kv: KVPool, tables: CpuTables, ops: CpuOps, specs: list[CpuSpec]) -> None:
        embedding, *layers, head = specs
        config, self._model = shard.config.model, shard.model
        self._module, self._backend, self._tables = ops.module, CpuBackend(ops), tables
        self._vocab_size, self._hidden_size, self._keep = config.vocab_size, config.hidden_size, (kv, ops)
        self._logits, self.begins = torch.empty(0, self._vocab_size), lambda: None
        numbers = config.rms_norm_eps, config.embedding_scale, embedding.matrices[0][0], head.matrices[0][0]
        self.handle: int = self._module.create_model(ops.workers, *numbers, shard.model.norm)
        weakref.finalize(self, self._module.destroy_model, self.handle)
        self._angles = AngleTables(shard.ropes, partial(self._module.set_rotation, self.handle))
        for index, layer in enumerate(layers):
            layer.build(self._module, self.handle, index, kv)

    def __call__(self, batch: Batch) -> Computed:
        input_ids, slots = self._tables.inputs(batch)
        num_logits = len(input_ids) if batch.logit_tokens is None else len(batch.logit_tokens)
        if num_logits > len(self._logits):  # kept, since new memory costs a fault for each page
            self._logits = torch.empty(num_logits, self._vocab_size)
        self._angles.reach(int((batch.index.seq_lens + batch.index.next_draft_lens).max()))
        logits, tables = self._logits[:num_logits], self._tables
        sequences, pages, page_size = self._backend.prepare(batch.attention)
        numbers = input_ids, batch.tensors.positions, *slots, sequences, pages, tables.window_table, page_size
        self.begins()
        self._module.forward(self.handle, *numbers, batch.logit_tokens, logits, batch.tensors.drafted, *tables.masks)
        self._model.capped(logits)
        more = partial(self._rows, "more_logits", width=self._vocab_size)
        hidden = partial(self._rows, "hidden_rows", width=self._hidden_size)
        return Computed(lambda ids: logits if ids is None else self._model.capped(more(ids)), hidden, input_ids)

    def _rows(self, function: str, tokens: Tensor, width: int) -> Tensor:
        rows = torch.empty(len(tokens), width)
        self._module[function](self.handle, tokens, rows)
        return rows


def rank_cores(rank: int, tp_size: int) -> list[int]:
    """The cores that a rank's threads keep to, so that ranks do not get into each other's way; []: all. Few cores are
    left to the scheduler of the system, which knows what else has to run on them."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    num = len(cores)
    return [] if tp_size == 1 or num < 4 * tp_size else cores[rank * num // tp_size : (rank + 1) * num // tp_size]


def create_steps(config: EngineConfig, rank: int) -> StepRunner:
    """What computes the steps of a rank. Raises: ConfigError when the model cannot be loaded."""
    size, url = config.tp_size, config.init_method
    comm = GlooCommunicator(Rendezvous(rank, size, url)) if size > 1 else Communicator()
    kernels = CpuOps(config.num_threads) if config.cpu_kernels else None
    shard = ModelShard(config, torch.device("cpu"), comm, kernels or TorchOps())
    kv, tables = shard.create_kv(config.num_pages + 1, config.num_window_pages + 1), CpuTables(config)
    own = kernels if {config.prefill_backend, config.decode_backend} == {"cpu"} else None
    backend = shard.create_attention() if own is None else cast(Backend, CpuBackend(own))
    layers = LayerByLayer(
        shard, kv, backend, lambda batch: (*tables.inputs(batch), [r(batch.tensors.positions) for r in shard.ropes])
    )
    forward: LayerByLayer | WholeStep = layers
    if own is not None and comm.size == 1 and (specs := shard.model.cpu_specs()) is not None:
        forward = WholeStep(shard, kv, tables, own, specs)
    steps = StepRunner(shard, kv, tables, forward)
    add_drafter(steps, layers, own, forward.handle if isinstance(forward, WholeStep) else 0)
    return steps


class Asked:
    """`core.Masks` from when a step is submitted: those before it run meanwhile, and tell their tokens."""

    def __init__(self, masks: Masks, masked: tuple[int, ...]) -> None:
        self.shape, self._masked, states = masks.shape, np.array(masked), np.zeros(len(masked), np.int32)
        self._board = np.empty(self.shape, np.int32), states, np.full(len(masked), ID_PENDING, np.int32)
        masks(*self._board)

    def board(self, told: LogprobStep | None) -> tuple[Tensor, ...]:
        """Words, states, and of each mask its sample; -1 where log-probabilities are told, for which all logits are
        wanted."""
        masked = self._masked
        samples = masked if told is None else np.where(np.isin(masked, told.index), -1, masked)
        return (*map(torch.from_numpy, (*self._board[:2], samples)),)

    def __call__(self, words: Words, states: Words, ids: Words | None) -> None:  # noqa: ARG002
        deadline = time.monotonic() + _MASK_SECONDS
        while MASK_PENDING in self._board[1].tolist() and time.monotonic() < deadline:
            time.sleep(2e-5)
        states[:], words[:] = self._board[1].copy(), self._board[0]  # states first: what is ready is whole

    def tell(self, ids: Tensor) -> None:
        self._board[2][:] = ids.numpy().take(self._masked)
        tell()


class CpuHandle(futures.Future[StepResult]):
    """A step in the runner's thread (a `core.StepHandle`)."""

    def wait(self, timeout: float | None = None) -> bool:
        with suppress(futures.TimeoutError):
            self.exception(timeout)  # one lock, where `futures.wait` would make an event for each call
        return self.done()


class CpuRunner:
    """Executes steps one after the other, on a thread of its own. steps: what it computes with, for tests."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        if config.device != "cpu":
            raise ConfigError(f"--device {config.device} is not available (available: cpu, cuda)")
        self.num_pages, self.num_window_pages = config.num_pages, config.num_window_pages
        self._queue: queue.SimpleQueue[tuple[CpuHandle, StepPlan, Asked | None] | None] = queue.SimpleQueue()
        self._ended: Callable[[], None] = lambda: None  # tells of the last step
        loaded: futures.Future[StepRunner] = futures.Future()
        task = partial(self._work, config, rank, loaded)
        self._thread = threading.Thread(target=task, name="minisgl-engine", daemon=True)
        self._thread.start()
        self.steps = loaded.result()

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> CpuHandle:
        handle = CpuHandle()
        self._queue.put((handle, plan, None if masks is None else Asked(masks, plan.masked)))
        return handle

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self, config: EngineConfig, rank: int, loaded: futures.Future[StepRunner]) -> None:
        """Load the model, too: the threads that start then are as many as this one's, and keep to its cores."""
        torch.set_num_threads(config.num_threads)
        if cores := rank_cores(rank, config.tp_size):
            os.sched_setaffinity(0, cores)
        with torch.inference_mode():
            try:
                steps = create_steps(config, rank)
            except BaseException as error:
                loaded.set_exception(error)
                return
            loaded.set_result(steps)
            if isinstance(steps.forward, WholeStep):
                steps.forward.begins = self._tell
            while (item := self._queue.get()) is not None:
                self._tell(_execute(steps, *item))
                if self._queue.empty() or not isinstance(steps.forward, WholeStep):
                    self._tell()
            self._tell()
        steps.shard.comm.close()

    def _tell(self, ended: Callable[[], None] = lambda: None) -> None:
        """Of a step, as the next one's layers begin: planners' Python would hold up what comes between."""
        before, self._ended = self._ended, ended
        before()


def _execute(steps: StepRunner, handle: CpuHandle, plan: StepPlan, masks: Asked | None) -> Callable[[], None]:
    try:
        launched = steps.launch(plan, masks)
        if masks is not None:
            masks.tell(launched.ids)
        return partial(handle.set_result, launched.result(plan))
    except Exception as error:
        logger.exception("step %d failed", plan.step_id)
        failed = EngineError(f"step {plan.step_id} failed: {error}")
        failed.__cause__ = error
        return partial(handle.set_exception, failed)
