"""Memory of every rank mapped into every rank (CUDA IPC), and the collectives over it of `csrc/src/all_reduce.cu`."""

import json
import logging
from datetime import timedelta
from typing import Any, Protocol

import torch

from minisgl.env import env_bool
from minisgl.errors import ConfigError
from minisgl.kernel.cuda import tensor_at
from minisgl.kernel.jit import load_kernel

logger = logging.getLogger(__name__)

# Bytes up to which one trip to every peer beats two trips with less traffic: (size - 1) * n bytes leave each GPU
# against 2 * (size - 1) / size * n (benchmark/kernels/all_reduce.py measures the crossover).
ONE_SHOT_BYTES = {2: 4 << 20, 4: 256 << 10, 8: 128 << 10}
TWO_SHOT_BYTES = 8 << 20  # above, NCCL
# One-shot takes `size * n` bytes of a half, two-shot `2 * n`, both rounded up to packets per rank.
HALF_BYTES = 2 * TWO_SHOT_BYTES + (64 << 10)
BROADCAST_BYTES = 64 << 10
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32)
SECONDS_TO_LEAVE = 2.0


class Meeting(Protocol):
    """How ranks agree before they can reach one another's memory."""

    rank: int
    size: int
    timeout: timedelta

    def exchange(self, name: str, text: str) -> list[str]: ...
    def after_rank_0(self, name: str) -> None: ...
    def all_left(self, name: str, seconds: float) -> bool: ...


class PeerMemory:
    """One rank's part. All methods run on the current stream and can be captured.

    regions: address of each rank's region in this process; gathered: of rank 0's buffer for `gather`, 0 for none.
    """

    def __init__(
        self, module: Any, meeting: Meeting, regions: list[int], gathered: int, gather_bytes: int, device: torch.device
    ) -> None:
        self.rank, self.size = meeting.rank, meeting.size
        self._module, self._meeting, self._regions, self._gathered = module, meeting, regions, gathered
        timeout, addresses = int(meeting.timeout.total_seconds() * 1e9), torch.tensor(regions, dtype=torch.int64)
        self._group = module.create_group(self.rank, addresses, HALF_BYTES, gathered, gather_bytes, timeout)
        self._gather_bytes = gather_bytes
        is_kept = gathered and self.rank == 0
        self._buffer = tensor_at(gathered, (gather_bytes,), torch.uint8, device) if is_kept else None

    def takes(self, x: torch.Tensor, max_bytes: int = TWO_SHOT_BYTES) -> bool:
        """Whether `all_reduce` and `broadcast` can work on x, which is contiguous."""
        fits = 0 < x.nbytes <= max_bytes and x.dtype in DTYPES
        return fits and x.data_ptr() % 16 == 0 and (x.nbytes % 16 == 0 or x.dtype == torch.int32)

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor, two_shot: bool | None = None, max_blocks: int = 0) -> None:
        """out = sum of x over ranks, the same bits on every rank; `out` may be x.

        two_shot: by size where it is None; max_blocks: 0 for as many as pay.
        """
        if two_shot is None:
            two_shot = x.nbytes > ONE_SHOT_BYTES[self.size]
        self._module.all_reduce(self._group, x, out, two_shot, max_blocks)

    def broadcast(self, x: torch.Tensor) -> None:
        """x: int32, ids and other numbers above -2^31 + 2^16: rank 0's, in place."""
        self._module.broadcast(self._group, x)

    def takes_rows(self, x: torch.Tensor) -> bool:
        """Whether `gather` can work on x: [rows, n], contiguous."""
        fits = 0 < x.nbytes * self.size <= self._gather_bytes
        return fits and x.ndim == 2 and x.shape[1] * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, n] → [rows, size * n], valid on rank 0 until the next call."""
        self._module.gather(self._group, x)
        shape = x.shape[0], x.shape[1] * self.size
        if self._buffer is None:
            return x.new_empty(1).expand(shape)
        return self._buffer[: x.nbytes * self.size].view(x.dtype).view(shape)

    def close(self) -> None:
        """Unmap the peers' memory. Our own is freed if the peers have unmapped it; if they are gone, exiting does.

        All kernels have finished: then no peer writes here any more, since each needed what the peers sent.
        """
        self._buffer = None
        self._module.destroy_group(self._group)
        foreign = [address for rank, address in enumerate(self._regions) if rank != self.rank]
        for address in foreign + ([self._gathered] if self.rank and self._gathered else []):
            self._module.close_handle(address)
        if self._meeting.all_left("peer memory closed", SECONDS_TO_LEAVE):
            self._module.release(self._regions[self.rank])
            if self.rank == 0 and self._gathered:
                self._module.release(self._gathered)


def open_peer_memory(meeting: Meeting, device: torch.device, gather_bytes: int) -> PeerMemory | None:
    """The ranks' common memory, tested; None on every rank, with a warning, where one of them cannot take part.

    `device` is current.
    """
    problem, module, own, handles = _unsupported(meeting, device), None, {}, {}
    if meeting.rank:
        meeting.after_rank_0("compiling all_reduce")  # and then load what it compiled
    if not problem:
        try:
            module = load_kernel("all_reduce", torch.cuda.get_device_capability(device))
            own = _allocate(module, gather_bytes if meeting.rank == 0 else 0)
            handles = {name: _export(module, address) for name, address in own.items()}
        except (ConfigError, RuntimeError, OSError) as error:
            problem = str(error)
    if meeting.rank == 0:
        meeting.after_rank_0("compiling all_reduce")
    if (texts := _agree(meeting, problem, json.dumps(handles))) is None:
        return None
    regions, gathered = [0] * meeting.size, own.get("gathered", 0)
    try:
        for rank, theirs in enumerate(json.loads(text) for text in texts):
            regions[rank] = own["region"] if rank == meeting.rank else _import(module, theirs["region"])
            if rank == 0 and meeting.rank and "gathered" in theirs:
                gathered = _import(module, theirs["gathered"])
    except RuntimeError as error:
        problem = str(error)
    if _agree(meeting, problem) is None:
        return None  # 32 MiB stay allocated: such a machine is rare, and NCCL goes on
    peers = PeerMemory(module, meeting, regions, gathered, gather_bytes if gathered else 0, device)
    return peers if _agree(meeting, _wrong_sums(peers, device)) is not None else None


def _unsupported(meeting: Meeting, device: torch.device) -> str:
    if not env_bool("MINISGL_PEER_MEMORY", True):
        return "MINISGL_PEER_MEMORY=0"
    if meeting.size not in ONE_SHOT_BYTES:
        return f"made for {', '.join(map(str, ONE_SHOT_BYTES))} ranks"
    for peer in range(meeting.size):
        if peer != device.index and not torch.cuda.can_device_access_peer(device.index, peer):
            return f"GPU {device.index} cannot access the memory of GPU {peer}"
    return ""


def _allocate(module: Any, gather_bytes: int) -> dict[str, int]:
    own = {"region": module.allocate(module.region_bytes(HALF_BYTES))}
    module.prepare_region(own["region"], HALF_BYTES)
    if gather_bytes:
        own["gathered"] = module.allocate(gather_bytes)
    return own


def _export(module: Any, address: int) -> str:
    handle = torch.zeros(64, dtype=torch.uint8)
    module.export_handle(address, handle)
    return bytes(handle.tolist()).hex()


def _import(module: Any, text: str) -> int:
    address: int = module.import_handle(torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8))
    return address


def _agree(meeting: Meeting, problem: str, text: str = "") -> list[str] | None:
    """Every rank's `text`, or None on every rank where one has a problem."""
    answers = [json.loads(answer) for answer in meeting.exchange("peer memory", json.dumps([problem, text]))]
    problems = [f"rank {rank}: {answer[0]}" for rank, answer in enumerate(answers) if answer[0]]
    if problems:
        if meeting.rank == 0:
            logger.warning("no collectives over peer memory, NCCL does it all (%s)", "; ".join(problems))
        return None
    return [answer[1] for answer in answers]


def _wrong_sums(peers: PeerMemory, device: torch.device) -> str:
    """A word about it where small whole numbers do not add up."""
    try:
        for two_shot in (False, True):
            for n in (8, 5000):
                pattern = torch.arange(n, device=device) % 7
                x = (pattern + peers.rank).to(torch.bfloat16)
                peers.all_reduce(x, x, two_shot)
                expected = pattern * peers.size + peers.size * (peers.size - 1) // 2
                if not torch.equal(x, expected.to(torch.bfloat16)):
                    return f"{'two' if two_shot else 'one'}-shot all-reduce of {n} elements gave a wrong sum"
    except RuntimeError as error:
        return str(error)
    return ""
