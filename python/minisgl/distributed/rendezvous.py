"""What ranks tell one another from the host, through the file that they were told to meet at."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

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
