"""One rank's engine: executes plans in order while the host plans the next ones."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

import torch

from minisgl.config.runtime import EngineConfig
from minisgl.core import Masks, StepPlan, StepResult
from minisgl.engine.runner import Runner
from minisgl.errors import EngineError
from minisgl.utils.faults import fault

if TYPE_CHECKING:
    from minisgl.engine.cuda import CudaRunner
    from minisgl.engine.device import CudaHandle

logger = logging.getLogger(__name__)


class Handle:
    """A step in the worker thread (a `core.StepHandle`)."""

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


class ThreadedRunner:
    """Runs a synchronous `Runner` on a thread of its own."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.num_pages = runner, runner.num_pages
        self._queue: queue.SimpleQueue[Handle | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="minisgl-engine", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> Handle:
        handle = Handle(plan, masks)
        self._queue.put(handle)
        return handle

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        self.runner.enter_thread()
        with torch.inference_mode():
            while (handle := self._queue.get()) is not None:
                try:
                    fault("step")
                    handle.finish(self.runner.execute(handle.plan, handle.masks))
                except Exception as error:
                    logger.exception("step %d failed", handle.plan.step_id)
                    handle.finish(error)
        self.runner.close()


class Engine:
    """The `core.Executor` of one rank. A failed step does not stop later ones.

    num_pages: of the KV cache, the same on every rank: the configuration's, or as many as fit the memory.

    Raises: ConfigError when the model cannot be loaded, or the configuration does not fit the device.
    """

    def __init__(self, config: EngineConfig, rank: int = 0) -> None:
        self._runner: ThreadedRunner | CudaRunner | None
        if config.device == "cuda":
            from minisgl.engine.cuda import CudaRunner

            self._runner = CudaRunner(config, rank)
        else:
            self._runner = ThreadedRunner(Runner(config, rank))
        self.num_pages = self._runner.num_pages

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> Handle | CudaHandle:
        """Queue a plan; returns at once. Raises: EngineError after `close`."""
        if self._runner is None:
            raise EngineError("the engine is closed")
        return self._runner.submit(plan, masks)

    def close(self) -> None:
        """Finish what was submitted, leave the other ranks, free the memory. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
