"""Is an output what the model had to choose? Hugging Face's fp32 logits on the CPU, and exact bounds for rounding.

Where sums are taken in another order, as beside another batch, logits move by rounding, and a choice between two tokens
that lie closer than that may fall either way: a near-tie. With every logit of a row known to within `eps` (a shift
common to the row does not matter), bounds follow for everything that sampling computes from it:

- an arg max has a logit within 2 eps of the largest;
- order, and with it top-k, is certain where logits differ by more than 2 eps;
- a weight exp(logit / T) lies within a factor exp(± eps / T), so the odds of a part of the mass against the rest within
  the square of it. That bounds a CDF, which moves by at most eps / (2 T), and the mass that top-p compares.

A token is explained where the uniform number lies between the lowest bound of its interval of the CDF and the highest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from minisgl import SamplingParams
from minisgl.kernel.sampling import uniform
from tests.models import hf_logits

Tensor = torch.Tensor

# In logits, for tiny models in fp32 (logits of spread 1.5): rounding of the reference and of the engine together. That
# of Hugging Face is 1.0e-5 at most over 300,000 logits, against double precision and sequences of other lengths; the
# rest is room for an engine that is worse. At temperature 0.8 a CDF then moves by at most 1.25e-4.
EPS = 2e-4


def check_answer(path: Path, prompt: Sequence[int], ids: Sequence[int], params: SamplingParams) -> int:
    """The number of near-ties of an output: tokens that exact arithmetic on the reference's logits would not choose.

    Raises: AssertionError if any token is not explained.
    """
    logits = hf_logits(path, [*prompt, *ids[:-1]])[len(prompt) - 1 :]
    tokens = torch.tensor(ids)
    sure = explained(logits, tokens, params, len(prompt), eps=0.0)
    wrong = (~explained(logits, tokens, params, len(prompt))).nonzero()[:, 0].tolist()
    assert not wrong, f"tokens {wrong} of {list(ids)} are not what {params} chooses after {list(prompt)}"
    return int((~sure).sum())


def explained(logits: Tensor, tokens: Tensor, params: SamplingParams, first: int, eps: float = EPS) -> Tensor:
    """[n] bool: whether logits within `eps` of `logits` [n, vocab] give `tokens` [n] at positions `first` and on."""
    x = logits.double()
    own = x.gather(1, tokens[:, None])
    best = x.max(dim=1, keepdim=True).values
    if params.temperature == 0:
        return (own >= best - 2 * eps)[:, 0]
    assert params.seed is not None
    weights = ((x - best) / params.temperature).exp()
    core, broad = kept_bounds(x, weights, params, eps)
    index = torch.arange(x.shape[1])
    ahead, maybe = index < tokens[:, None], index <= tokens[:, None]  # of the token; or the token itself
    grow = math.exp(eps / params.temperature)
    position = first + torch.arange(len(x))
    number = uniform(torch.full_like(position, params.seed), position)
    low = _share(_sum(weights, core & ahead), _sum(weights, broad & ~ahead), 1 / grow)
    high = _share(_sum(weights, broad & maybe), _sum(weights, core & ~maybe), grow)
    return broad.gather(1, tokens[:, None])[:, 0] & (low <= number) & (number <= high)


def kept_bounds(x: Tensor, weights: Tensor, params: SamplingParams, eps: float) -> tuple[Tensor, Tensor]:
    """[n, vocab] bool each: tokens that the filters keep whatever the logits within `eps`, and that they may keep."""
    core = broad = torch.ones_like(x, dtype=torch.bool)
    grow = math.exp(eps / params.temperature)
    if 0 < params.top_k < x.shape[1]:
        top = x.topk(params.top_k + 1, dim=1).values
        core, broad = x > top[:, -1:] + 2 * eps, x >= top[:, -2:-1] - 2 * eps
    if params.top_p < 1:
        sure, possible = weights * core, weights * broad
        before = _mass(x, sure, x + 2 * eps, inclusive=False)
        after = possible.sum(1, keepdim=True) - _mass(x, possible, x + 2 * eps, inclusive=False)
        least = _share(before, after, 1 / grow)
        before = _mass(x, possible, x - 2 * eps, inclusive=True) - weights
        after = sure.sum(1, keepdim=True) - _mass(x, sure, x - 2 * eps, inclusive=True) + weights
        most = _share(before, after, grow)
        core, broad = core & (most < params.top_p), broad & (least < params.top_p)
    return core & (weights >= params.min_p * grow**2), broad & (weights * grow**2 >= params.min_p)


def _share(part: Tensor, rest: Tensor, grow: float) -> Tensor:
    """part / (part + rest) once `part` has grown by the factor and `rest` has shrunk by it."""
    return part * grow / (part * grow + rest / grow)


def _sum(weights: Tensor, mask: Tensor) -> Tensor:
    return weights.where(mask, 0).sum(dim=1)


def _mass(x: Tensor, weights: Tensor, limits: Tensor, inclusive: bool) -> Tensor:
    """[n, vocab]: for each limit, the weights of those tokens of its row whose logit is above it (or equals it)."""
    values, order = x.sort(dim=1)
    sums = torch.nn.functional.pad(weights.gather(1, order).cumsum(1), (1, 0))
    return sums[:, -1:] - sums.gather(1, torch.searchsorted(values, limits, right=not inclusive))
