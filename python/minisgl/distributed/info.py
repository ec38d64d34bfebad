"""Which of the tensor-parallel ranks this process is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DistributedInfo:
    """Rank `rank` of `size`.

    init_method: the rendezvous, "file://PATH" of a file that does not exist yet; unused for one rank.
    """

    rank: int = 0
    size: int = 1
    init_method: str = ""
