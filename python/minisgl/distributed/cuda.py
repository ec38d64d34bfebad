"""Collectives between GPUs of one host: peer memory for the messages of decode steps, NCCL for larger ones."""

import time
from typing import Any

import torch
import torch.distributed as dist

from minisgl.distributed.comm import Communicator, Rendezvous
from minisgl.errors import EngineError
from minisgl.kernel import pynccl
from minisgl.kernel.peer_memory import BROADCAST_BYTES, open_peer_memory

SECONDS_TO_FINISH = 10.0  # more than any step takes whose ranks are all there


class TorchNccl:
    """What `PyNccl` does, by torch's NCCL process group: one of its own, not the default one."""

    def __init__(self, meeting: Rendezvous, device: torch.device) -> None:
        pynccl.avoid_multicast()
        nccl: Any = getattr(dist, "ProcessGroupNCCL")  # noqa: B009 (absent from a CPU build of torch)
        options = nccl.Options()
        options._timeout = meeting.timeout
        store = dist.PrefixStore("nccl", meeting.store)  # type: ignore[attr-defined]
        self._group = nccl(store, meeting.rank, meeting.size, options)
        self._group.eager_connect_single_device(device)

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if out is not x:
            out.copy_(x)
        self._group.allreduce([out]).wait()

    def gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._group._allgather_base(out, x).wait()

    def broadcast(self, x: torch.Tensor) -> None:
        self._group.broadcast(x, 0).wait()

    def close(self) -> None:
        self._group.abort()  # waits for nobody
        del self._group


class CudaCommunicator(Communicator):
    """GPU ranks of one host, one process each, rank r on GPU r. Runs on the current stream; everything can be captured.

    use_pynccl: our binding of NCCL rather than torch's process group. gather_bytes: of the largest result of `gather`
    that shall go through peer memory, which rank 0 sets aside. Ranks wait for one another as long as
    `meeting.timeout` says, at start and in kernels over peer memory, which then fail.

    Raises: ConfigError when the ranks do not find one another; EngineError with NCCL's words."""

    def __init__(self, meeting: Rendezvous, use_pynccl: bool = True, gather_bytes: int = 0) -> None:
        super().__init__(meeting)
        self._device = torch.device("cuda", self.rank)
        torch.cuda.set_device(self._device)
        meeting.exchange("start", "")  # NCCL itself would wait for ever for a rank that never comes
        self.nccl: TorchNccl | pynccl.PyNccl
        if use_pynccl:
            texts = meeting.exchange("nccl", pynccl.unique_id().hex() if self.rank == 0 else "")
            self.nccl = pynccl.PyNccl(self.rank, self.size, bytes.fromhex(texts[0]))
        else:
            self.nccl = TorchNccl(meeting, self._device)
        self._warm_up()
        self.peers = open_peer_memory(meeting, self._device, gather_bytes)

    def _warm_up(self) -> None:
        """Let NCCL connect and allocate now, for small and large messages, rather than inside a capture."""
        for n in (1024, 1 << 20, 16 << 20):
            x = torch.ones(n, dtype=torch.bfloat16, device=self._device)
            self.nccl.all_reduce(x, x)
            if not bool((x == self.size).all()):
                raise EngineError(f"NCCL summed {n} ones of {self.size} ranks to something else")
        out = torch.empty(self.size, n, dtype=torch.bfloat16, device=self._device)
        self.nccl.gather(x, out)
        self.nccl.broadcast(x)
        torch.cuda.synchronize(self._device)
        del x, out
        torch.cuda.empty_cache()  # a quarter of a GiB, which would look like the model's

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        x = x.contiguous()
        out = x if out is None else out
        if self.peers is not None and self.peers.takes(x) and self.peers.takes(out):
            self.peers.all_reduce(x, out)
        elif x.numel():
            self.nccl.all_reduce(x, out)
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if self.peers is not None and self.peers.takes_rows(x):
            return self.peers.gather(x)
        parts = x.new_empty((self.size, *x.shape))
        if x.numel():
            self.nccl.gather(x, parts)
        return parts.movedim(0, -2).reshape(len(x), self.size * x.shape[1])

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        words = x.view(torch.int32) if x.dtype in (torch.int32, torch.int64) and x.is_contiguous() else None
        if self.peers is not None and words is not None and self.peers.takes(words, BROADCAST_BYTES):
            self.peers.broadcast(words)
        elif x.numel():
            self.nccl.broadcast(x)
        return x

    def close(self) -> None:
        """Leave. Waits for others a few seconds at most: they may be gone already.

        Raises: RuntimeError when the device has failed; EngineError when it still waits for a rank that is gone."""
        torch.cuda.set_device(self._device)
        has_finished = self._finished()
        if has_finished and self.peers is not None:
            self.peers.close()
            self.peers = None
        self.nccl.close()  # what waits in it ends
        if not has_finished and not self._finished():
            raise EngineError("it waits for a rank that is gone")

    def _finished(self) -> bool:
        """Whether the current stream has come to its end within a few seconds."""
        event, deadline = torch.cuda.current_stream().record_event(), time.monotonic() + SECONDS_TO_FINISH
        while not event.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True
