"""What differs between devices outside of kernels: threads and memory. A CUDA device adds streams, events, pinning."""

from __future__ import annotations

from typing import Protocol

import torch

from minisgl.errors import ConfigError


class Device(Protocol):
    """The device of one rank."""

    torch_device: torch.device

    def enter_thread(self) -> None:
        """Called first by the thread that will execute steps."""
        ...

    def to_host(self, ids: torch.Tensor) -> list[int]:
        """Wait for a step's ids and bring them to the host."""
        ...


class CpuDevice:
    """A share of the CPU: `num_threads` of it."""

    def __init__(self, num_threads: int) -> None:
        self.torch_device = torch.device("cpu")
        self._num_threads = num_threads
        torch.set_num_threads(num_threads)

    def enter_thread(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP keeps the number per thread

    def to_host(self, ids: torch.Tensor) -> list[int]:
        result: list[int] = ids.tolist()
        return result


def create_device(name: str, num_threads: int) -> Device:
    """Raises: ConfigError for a device that this build does not know."""
    if name != "cpu":
        raise ConfigError(f"--device {name} is not available (available: cpu)")
    return CpuDevice(num_threads)
