"""How tensor-parallel ranks meet, and their collectives. Layers are given a `Communicator`; it is never a global."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minisgl.errors import ConfigError

# Ranks wait this long for one another; a rank may be compiling kernels, or reading a checkpoint, meanwhile.
TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class DistributedInfo:
    """This process is rank `rank` of `size`.

    init_method: the rendezvous, "file://PATH" of a file that does not exist yet; unused for one rank.
    """

    rank: int = 0
    size: int = 1
    init_method: str = ""


class Rendezvous:
    """Exchange of short texts between all ranks; every rank calls the same methods with the same names in order."""

    def __init__(self, info: DistributedInfo, timeout: timedelta = TIMEOUT) -> None:
        path = info.init_method.removeprefix("file://")
        assert path != info.init_method, f"{info.init_method!r} is not a file:// rendezvous"
        self.rank, self.size, self.timeout = info.rank, info.size, timeout
        self.store = dist.FileStore(path, info.size)  # type: ignore[attr-defined]
        self._num_calls = 0

    def exchange(self, name: str, text: str) -> list[str]:
        """Every rank's `text`, in order of ranks; returns when all have called it.

        Raises: ConfigError naming the ranks that did not come in time.
        """
        keys = self._keys(name)
        self.store.set(keys[self.rank], f"={text}")  # never empty
        if not self._wait(keys, self.timeout.total_seconds()):
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not self.store.check([key]))
            raise ConfigError(
                f"{self._waited()} for rank {missing} at {name!r}: that rank's log says why it did not come"
            )
        return [self.store.get(key).decode()[1:] for key in keys]

    def after_rank_0(self, name: str) -> None:
        """Rank 0 passes at once; the others wait until it has called this. Raises: as `exchange`."""
        key = self._keys(name)[0]
        if self.rank == 0:
            self.store.set(key, "=")
        elif not self._wait([key], self.timeout.total_seconds()):
            raise ConfigError(f"{self._waited()} for rank 0 at {name!r}: its log says why it did not come")

    def all_left(self, name: str, seconds: float) -> bool:
        """Whether all ranks call this within a few seconds of this one."""
        keys = self._keys(name)
        self.store.set(keys[self.rank], "=")
        return self._wait(keys, seconds)

    def minimum(self, value: int) -> int:
        return min(int(text) for text in self.exchange("minimum", str(value)))

    def _waited(self) -> str:
        return f"rank {self.rank} waited {self.timeout.total_seconds():.0f} s"

    def _keys(self, name: str) -> list[str]:
        self._num_calls += 1
        return [f"minisgl/{self._num_calls}/{name}/{rank}" for rank in range(self.size)]

    def _wait(self, keys: list[str], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True


class Communicator:
    """Collectives over all ranks; every rank calls the same ones in the same order, from one thread.

    This one is for a single rank, which has nothing to do; where there are more, subclasses compute.
    """

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum over ranks, in `out`, which is like x; without it, may work in place and return `x`."""
        return x if out is None else out.copy_(x)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, n] on every rank → [rows, size * n] on rank 0, ranks in order along the last dimension; elsewhere
        the result has no more than its shape. It is valid until the next `gather`."""
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, written in place on the other ranks."""
        return x

    def all_reduce_min(self, value: int) -> int:
        """The smallest `value` of all ranks, by way of the host: for start-up, not for steps."""
        return value

    def close(self) -> None:
        """Leave."""


class GlooCommunicator(Communicator):
    """CPU ranks of one machine. It owns its process group; torch's default group is left alone."""

    def __init__(self, info: DistributedInfo) -> None:
        self.rank, self.size = info.rank, info.size
        self._meeting = Rendezvous(info)
        gloo: Any = dist.ProcessGroupGloo  # its stubs are incomplete
        options = gloo._Options()
        options._timeout = TIMEOUT
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self._group = gloo(self._meeting.store, info.rank, info.size, options)

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        out = x if out is None else out.copy_(x)
        self._group.allreduce([out]).wait()
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self._group.broadcast(x, 0).wait()
        return x

    def all_reduce_min(self, value: int) -> int:
        return self._meeting.minimum(value)

    def close(self) -> None:
        """Leave. Waits for nobody: the other ranks may be gone already."""
        del self._group, self._meeting


def create_communicator(
    info: DistributedInfo, device: str, use_pynccl: bool = True, gather_bytes: int = 0
) -> Communicator:
    """For ranks on "cpu" or "cuda" (rank r on GPU r).

    use_pynccl: our binding of NCCL rather than torch's process group. gather_bytes: of the largest result of `gather`
    that shall go through peer memory, which rank 0 sets aside.

    Raises: ConfigError where the ranks do not find one another.
    """
    if info.size == 1:
        return Communicator()
    if device == "cpu":
        return GlooCommunicator(info)
    from minisgl.distributed.cuda import CudaCommunicator  # CPU ranks need none of it

    return CudaCommunicator(info, torch.device("cuda", info.rank), use_pynccl, gather_bytes)
