"""One rank's engine: executes plans in order while the host plans the next ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minisgl.config.runtime import EngineConfig
from minisgl.core import Masks, StepPlan
from minisgl.engine.cpu import CpuHandle, CpuRunner
from minisgl.errors import EngineError

if TYPE_CHECKING:
    from minisgl.engine.cuda import CudaHandle, CudaRunner


class Engine:
    """The `core.Executor` of one rank. A failed step does not stop later ones.

    num_pages: of the KV cache, the same on every rank: the configuration's, or as many as fit the memory.
    runner: its device's; None once it is closed.

    Raises: ConfigError when the model cannot be loaded, or the configuration does not fit the device.
    """

    def __init__(self, config: EngineConfig, rank: int = 0) -> None:
        self.runner: CpuRunner | CudaRunner | None
        if config.device == "cuda":
            from minisgl.engine.cuda import CudaRunner

            self.runner = CudaRunner(config, rank)
        else:
            self.runner = CpuRunner(config, rank)
        self.num_pages = self.runner.num_pages

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> CpuHandle | CudaHandle:
        """Queue a plan; returns at once. Raises: EngineError after `close`."""
        if self.runner is None:
            raise EngineError("the engine is closed")
        return self.runner.submit(plan, masks)

    def close(self) -> None:
        """Finish what was submitted, leave the other ranks, free the memory. Idempotent."""
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.close()
