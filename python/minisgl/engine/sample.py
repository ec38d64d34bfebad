"""Logits to token ids.

Filters apply in the field's usual order: temperature, top-k, top-p (of what top-k left), min-p (relative to the most
probable token). One uniform number per token, a function of the request's seed and the token's position, picks
from the filtered distribution by inverting its CDF. A row's token depends on that row alone: not on the batch,
on retraction, or on the number of ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from minisgl.attention.base import IntArray
from minisgl.engine.batch import SamplingBatch

Tensor = torch.Tensor

# Filtered rows look at this many candidates first, and at the whole vocabulary only when those do not settle it.
NUM_CANDIDATES = 128


def uniform(seed: npt.NDArray[np.uint64], position: IntArray) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position): splitmix64 (Steele et al., OOPSLA 2014), 52 bits of it."""
    bits: npt.NDArray[np.uint64] = _mix(_mix(seed) ^ position.astype(np.uint64)) >> np.uint64(12)
    return bits.astype(np.float64) * 2.0**-52


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """logits: [n, vocab] → ids [n] int64; -1 where a row's largest logit is not finite."""
    best, ids = logits.max(dim=-1)  # a NaN counts as the largest
    finite = best.isfinite()
    if not params.all_greedy:
        index = np.flatnonzero((params.temperature > 0) & finite.cpu().numpy())
        if len(index):
            ids[torch.from_numpy(index)] = _sample_random(logits, best, index, params.select(index))
    return ids.where(finite, -1)


def _sample_random(logits: Tensor, best: Tensor, index: IntArray, params: SamplingBatch) -> Tensor:
    """Ids of the rows `index` of `logits`, which all have a temperature."""
    numbers = torch.from_numpy(uniform(params.seed, params.position))
    rows = torch.from_numpy(index)
    scale = torch.from_numpy(params.temperature)[:, None]
    weights = logits[rows].float().sub_(best[rows].float()[:, None]).div_(scale).exp_()  # unnormalised, at most 1
    filtered = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    ids = torch.empty(len(index), dtype=torch.int64)
    plain = torch.from_numpy(np.flatnonzero(~filtered))
    if len(plain):
        ids[plain] = _invert_cdf(weights[plain], numbers[plain])
    some = np.flatnonzero(filtered)
    if len(some):
        chosen = torch.from_numpy(some)
        ids[chosen] = _sample_filtered(weights[chosen], numbers[chosen], params.select(some))
    return ids


def _sample_filtered(weights: Tensor, numbers: Tensor, params: SamplingBatch) -> Tensor:
    """Rows with a filter: over the most probable candidates, or over all tokens where those are too few."""
    total = weights.sum(-1, dtype=torch.float64)
    top, tokens = weights.topk(min(NUM_CANDIDATES, weights.shape[1]), dim=-1)
    kept, settled = _filter(top, total, params, weights.shape[1])
    ids = tokens.gather(1, _invert_cdf(kept, numbers)[:, None])[:, 0]
    unsettled = np.flatnonzero(~settled.numpy())
    for first in range(0, len(unsettled), 32):  # a sort of the vocabulary takes twelve bytes per token
        rows = unsettled[first : first + 32]
        chosen = torch.from_numpy(rows)
        top, tokens = weights[chosen].sort(dim=-1, descending=True, stable=True)
        kept, _ = _filter(top, total[chosen], params.select(rows), weights.shape[1])
        ids[chosen] = tokens.gather(1, _invert_cdf(kept, numbers[chosen])[:, None])[:, 0]
    return ids


def _filter(top: Tensor, total: Tensor, params: SamplingBatch, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Zero what the filters drop of `top`: [n, k], each row's k largest weights in descending order, of sum `total`.

    → the weights that are left, and whether each row is settled: nothing beyond its k candidates would be kept.
    """
    num = top.shape[1]
    top_k = torch.from_numpy(np.where(params.top_k > 0, np.minimum(params.top_k, vocab_size), vocab_size))
    in_top_k = torch.arange(num) < top_k[:, None]
    top = top.where(in_top_k, 0)
    mass = top.cumsum(-1, dtype=torch.float64)
    # The mass that top-p is a share of: what top-k left. Exact when all of it is among the candidates.
    after_top_k = torch.where(top_k <= num, mass[:, -1], total)
    limit = (torch.from_numpy(params.top_p).double() * after_top_k)[:, None]
    in_top_p = (mass - top < limit) | torch.from_numpy(params.top_p >= 1)[:, None]  # mass before the token
    in_top_p[:, 0] = True  # a top-p too small for its float32 is 0
    in_min_p = top >= torch.from_numpy(params.min_p)[:, None] * top[:, :1]
    covered = (top_k == vocab_size) & torch.from_numpy(params.top_p < 1) & (mass[:, -1] >= limit[:, 0])
    settled = (top_k <= num) | covered | ~in_min_p[:, -1] | torch.tensor(num == vocab_size)
    return top.where(in_top_p & in_min_p, 0), settled


def _invert_cdf(weights: Tensor, numbers: Tensor) -> Tensor:
    """weights: [n, k], not normalised; numbers: [n] in [0, 1) → the index that each number falls on: [n] int64."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    target = numbers[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)
