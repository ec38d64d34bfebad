"""What a rank holds of a weight [out, in]."""

import numpy as np


def part(name: str, weight: np.ndarray, rank: int, size: int) -> np.ndarray:
    axis = 1 if name in ("o_proj", "down_proj") else 0
    return np.split(weight, size, axis)[rank]
