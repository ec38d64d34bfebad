"""One rank's engine: executes plans in order while the host plans the next ones."""

from typing import TYPE_CHECKING

from minisgl.config.runtime import EngineConfig
from minisgl.engine.cpu import CpuRunner

if TYPE_CHECKING:
    from minisgl.engine.cuda import CudaRunner


def create_engine(config: EngineConfig, rank: int = 0) -> "CpuRunner | CudaRunner":
    """The `core.Executor` of one rank. A failed step does not stop later ones.

    Raises: ConfigError when the model cannot be loaded, or the configuration does not fit the device."""
    if config.device == "cuda":
        from minisgl.engine.cuda import CudaRunner

        return CudaRunner(config, rank)
    return CpuRunner(config, rank)
