"""One rank's engine: executes plans in order, on a thread of its own, so that the host plans while the device works."""

from __future__ import annotations

import logging
import queue
import threading
import time

import torch

from minisgl.attention.base import StepContext
from minisgl.attention.registry import create_backend
from minisgl.config.runtime import EngineConfig
from minisgl.core import StepPlan, StepResult
from minisgl.distributed.comm import create_communicator
from minisgl.distributed.info import DistributedInfo
from minisgl.engine.batch import Batch, Tables
from minisgl.engine.device import create_device
from minisgl.engine.sample import sample
from minisgl.errors import EngineError
from minisgl.kernel.ops import create_ops
from minisgl.kvcache.pool import KVPool
from minisgl.layers.base import LayerEnv
from minisgl.layers.rope import RotaryEmbedding
from minisgl.models.registry import build_model
from minisgl.models.weights import fill_random, load_weights

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Handle:
    """A submitted step; see `scheduler.executor.StepHandle`."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self._done = threading.Event()
        self._token_ids: list[int] = []
        self._error: BaseException | None = None

    def finish(self, token_ids: list[int], error: BaseException | None = None) -> None:
        self._token_ids, self._error = token_ids, error
        self._done.set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._done.wait(timeout)

    def result(self) -> StepResult:
        self._done.wait()
        if self._error is not None:
            raise EngineError(f"step {self.plan.step_id} failed: {self._error}") from self._error
        return StepResult(self.plan.step_id, self._token_ids)


class Runner:
    """Model, KV cache and tables of one rank; computes one step at a time, in the thread that calls it.

    Raises: ConfigError when the model cannot be loaded or does not fit the configuration.
    """

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self.device = create_device(config.device, config.num_threads)
        device, dtype = self.device.torch_device, DTYPES[config.dtype]
        info = DistributedInfo(rank, config.tp_size, config.init_method)
        self.comm = create_communicator(info, config.device)
        model = config.model
        with torch.inference_mode():
            self._model = build_model(LayerEnv(self.comm, create_ops(config.device), dtype, device), model)
            self._load(rank)
            num_slots = config.num_pages * config.page_size
            self._kv = KVPool(model, num_slots, config.tp_size, dtype, device)
            self._rope = RotaryEmbedding(model.rope, model.head_dim, device)
        windows = [model.sliding_window(layer) for layer in range(model.num_layers)]
        kv_bytes = model.num_local_kv_heads(config.tp_size) * model.head_dim * dtype.itemsize
        self._backend = create_backend(config.prefill_backend, config.decode_backend, windows, kv_bytes, dtype, device)
        self._tables = Tables(config.max_running_requests, config.max_seq_len, config.page_size)

    def _load(self, rank: int) -> None:
        start = time.perf_counter()
        if self._config.dummy_weight:
            fill_random(self._model.weights(), self._config.seed)
        else:
            load_weights(self._model.weights(), self._config.model_path, show_progress=rank == 0)
        self._model.pack()
        logger.info("weights ready after %.1f s", time.perf_counter() - start)

    def execute(self, plan: StepPlan) -> list[int]:
        """The sampled ids of a plan, which are input of the plans after it."""
        self._tables.apply(plan)
        if not plan.reqs:
            return []
        batch = self._tables.build(plan)
        logits = self.forward(batch)
        if not len(batch.sampling.position):
            return []
        ids = self._sample(logits, batch)
        token_ids = self.device.to_host(ids)
        self._tables.store_sampled(batch.sampled_at, token_ids)
        return token_ids

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits of the tokens that sample: [n, vocab_size]."""
        metadata = self._backend.prepare(batch.attention)
        step = StepContext(batch.slots, self._rope(batch.positions), self._kv, self._backend, metadata)
        logits: torch.Tensor = self._model(batch.input_ids, step, batch.logit_tokens)
        return logits

    def _sample(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Rank 0 decides, so that rounding cannot make ranks differ."""
        if self.comm.rank == 0:
            ids = sample(logits, batch.sampling)
        else:
            ids = torch.empty(len(batch.sampling.position), dtype=torch.int64, device=logits.device)
        return self.comm.broadcast(ids)


class Engine:
    """`scheduler.executor.Executor` over a `Runner` in a worker thread. A failed step does not stop later ones.

    Raises: ConfigError when the model cannot be loaded.
    """

    def __init__(self, config: EngineConfig, rank: int = 0) -> None:
        self._runner: Runner | None = Runner(config, rank)
        self._queue: queue.SimpleQueue[Handle | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(self._runner,), name="minisgl-engine", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> Handle:
        """Queue a plan; returns at once. Raises: EngineError after `close`."""
        if self._runner is None:
            raise EngineError("the engine is closed")
        handle = Handle(plan)
        self._queue.put(handle)
        return handle

    def close(self) -> None:
        """Finish what was submitted, leave the other ranks, free the memory. Idempotent."""
        if self._runner is None:
            return
        self._runner = None
        self._queue.put(None)
        self._thread.join()

    def _work(self, runner: Runner) -> None:
        runner.device.enter_thread()
        with torch.inference_mode():
            while (handle := self._queue.get()) is not None:
                try:
                    handle.finish(runner.execute(handle.plan))
                except Exception as error:
                    logger.exception("step %d failed", handle.plan.step_id)
                    handle.finish([], error)
        runner.comm.close()
