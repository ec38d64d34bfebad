"""How much faster, when the machine is noisy."""

from statistics import median


def speedup(before: list[float], after: list[float]) -> float:
    return median(b / a for b, a in zip(before, after, strict=True))
