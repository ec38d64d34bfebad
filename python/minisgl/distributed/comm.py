"""How tensor-parallel ranks meet, and their collectives. Layers are given a `Communicator`; it is never a global."""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minisgl.errors import ConfigError

# Ranks wait this long for one another; a rank may be compiling kernels, or reading a checkpoint, meanwhile.
TIMEOUT = timedelta(minutes=5)


class Rendezvous:
    """Exchange of short texts between all ranks; every rank calls the same methods with the same names in order.

    url: "file://PATH" of a file that does not exist before."""

    def __init__(self, rank: int, size: int, url: str, timeout: timedelta = TIMEOUT) -> None:
        path = url.removeprefix("file://")
        assert path != url, f"{url!r} is not a file:// rendezvous"
        self.rank, self.size, self.timeout = rank, size, timeout
        self.store = dist.FileStore(path, size)  # type: ignore[attr-defined]
        self._num_calls = 0

    def exchange(self, name: str, text: str) -> list[str]:
        """Every rank's `text`, in order of ranks; returns when all have called it.

        Raises: ConfigError naming the ranks that did not come in time."""
        keys = self._tell(name, text)
        self._wait_for(keys, name)
        return [self.store.get(key).decode()[1:] for key in keys]

    def after_rank_0(self, name: str) -> None:
        """Rank 0 passes at once; the others wait until it has called this. Raises: ConfigError after a while."""
        self._wait_for(self._tell(name)[:1], name)

    def all_left(self, name: str, seconds: float) -> bool:
        """Whether all ranks call this within a few seconds of this one."""
        return self._wait(self._tell(name), seconds)

    def _tell(self, name: str, text: str = "") -> list[str]:
        """Leave this rank's text. Returns the keys of all ranks' texts."""
        self._num_calls += 1
        keys = [f"minisgl/{self._num_calls}/{name}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], f"={text}")  # never empty
        return keys

    def _wait_for(self, keys: list[str], name: str) -> None:
        if not self._wait(keys, seconds := self.timeout.total_seconds()):
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not self.store.check([key]))
            waited = f"rank {self.rank} waited {seconds:.0f} s for rank {missing} at {name!r}"
            raise ConfigError(f"{waited}: that rank's log says why it did not come")

    def _wait(self, keys: list[str], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True


class Communicator:
    """Collectives over all ranks; every rank calls the same ones in the same order, from one thread.

    This one is for a single rank, which has nothing to do; where there are more, and meet, subclasses compute."""

    def __init__(self, meeting: Rendezvous | None = None) -> None:
        self._meeting = meeting
        self.rank, self.size = (meeting.rank, meeting.size) if meeting else (0, 1)

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
        return min(map(int, self._meeting.exchange("minimum", str(value)))) if self._meeting else value

    def close(self) -> None:
        """Leave."""


class GlooCommunicator(Communicator):
    """CPU ranks of one machine. It owns its process group; torch's default group is left alone.

    Raises: ConfigError where the ranks do not find one another."""

    def __init__(self, meeting: Rendezvous) -> None:
        super().__init__(meeting)
        gloo: Any = dist.ProcessGroupGloo  # its stubs are incomplete
        options = gloo._Options()
        options._timeout = meeting.timeout
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self._group = gloo(meeting.store, self.rank, self.size, options)

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

    def close(self) -> None:
        """Leave. Waits for nobody: the other ranks may be gone already."""
        self._meeting = None
        del self._group
