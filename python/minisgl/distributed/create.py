"""The communicator that fits the device."""

from __future__ import annotations

import torch

from minisgl.distributed.comm import Communicator, GlooCommunicator, Rendezvous


def create_communicator(
    rank: int, size: int, rendezvous: str, device: str, use_pynccl: bool = True, gather_bytes: int = 0
) -> Communicator:
    """Of rank `rank` of `size`, on "cpu" or "cuda" (rank r on GPU r). rendezvous: a URL; unused for one rank.

    use_pynccl: our binding of NCCL rather than torch's process group. gather_bytes: of the largest result of `gather`
    that shall go through peer memory, which rank 0 sets aside.

    Raises: ConfigError where the ranks do not find one another.
    """
    if size == 1:
        return Communicator()
    meeting = Rendezvous(rank, size, rendezvous)
    if device == "cpu":
        return GlooCommunicator(meeting)
    from minisgl.distributed.cuda import CudaCommunicator  # CPU ranks need none of it

    return CudaCommunicator(meeting, torch.device("cuda", rank), use_pynccl, gather_bytes)
