"""Collectives between tensor-parallel ranks. A `Communicator` is an object that layers are given, never a global."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from minisgl.distributed.info import DistributedInfo
from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)

# Ranks wait this long for one another inside a step; a rank that died is noticed at once by its closed connection.
TIMEOUT = timedelta(minutes=5)


class Communicator(Protocol):
    """Collectives over all ranks; every rank calls the same ones in the same order, from one thread."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; may work in place and return `x`."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., n] on every rank → [..., size * n], ranks in order along the last dimension."""
        ...

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, written in place on the other ranks."""
        ...

    def close(self) -> None: ...


class NullCommunicator:
    """One rank: nothing to do."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def close(self) -> None:
        pass


class GlooCommunicator:
    """CPU ranks over TCP. It owns its process group; torch's default group is left alone."""

    def __init__(self, info: DistributedInfo) -> None:
        self.rank, self.size = info.rank, info.size
        address = urlsplit(info.init_method)
        if address.scheme != "tcp" or not address.hostname or not address.port:
            raise ConfigError(f"init_method {info.init_method!r}: expected tcp://HOST:PORT")
        gloo: Any = dist.ProcessGroupGloo  # its stubs are incomplete
        store_type: Any = dist.TCPStore  # type: ignore[attr-defined]
        self._store = store_type(address.hostname, address.port, info.size, info.rank == 0, TIMEOUT)
        options = gloo._Options()
        options._timeout = TIMEOUT
        options._devices = [gloo.create_device(hostname=address.hostname)]
        self._group = gloo(self._store, info.rank, info.size, options)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._group.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self._group.broadcast(x, 0).wait()
        return x

    def close(self) -> None:
        """Leave together: rank 0 keeps the rendezvous alive until all are here, or one is gone."""
        try:
            self._group.barrier().wait()
        except RuntimeError as error:
            logger.warning("rank %d leaves alone: %s", self.rank, error)
        del self._group, self._store


def create_communicator(info: DistributedInfo, device: str) -> Communicator:
    """Raises: ConfigError for a device without collectives."""
    if info.size == 1:
        return NullCommunicator()
    if device != "cpu":
        raise ConfigError(f"tensor parallelism on {device!r} is not available (available: cpu)")
    return GlooCommunicator(info)
