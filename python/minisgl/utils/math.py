"""Small mathematics."""

from __future__ import annotations

from bisect import bisect_left

import msgspec


def div_ceil(a: int, b: int) -> int:
    return -(-a // b)


def align_down(a: int, b: int) -> int:
    return a // b * b


class Histogram(msgspec.Struct, forbid_unknown_fields=True):
    """`counts[i]`: values of at most `bounds[i]` and above the bound before; the last count has no bound."""

    bounds: tuple[float, ...]
    counts: list[int] = []
    total: float = 0.0  # all values added up

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times
