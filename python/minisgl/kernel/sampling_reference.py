"""Sampling in plain torch without a look at the host: what `csrc/src/sampling.cu` must agree with.

The semantics are those of `engine/sample.py`, for parameters that lie on the device: one sort of each row settles all
filters. Nothing depends on values, so that a CUDA graph can hold it; without nvcc this is what a GPU samples with.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

# A row takes about fifty bytes per token of the vocabulary while it is sorted and summed.
ROWS_AT_ONCE = 32


def sample_reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    out: Tensor,
    token_ids: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Write to `out` [b] int32 a token for each row of `logits` [b, vocab]; -1 where its largest logit is not finite.

    temperature (0: greedy), top_p (1: off), min_p (0: off): [b] float32; top_k: [b] int32 (0: off); seed: [b] int64,
    the bits of a uint64; position: [b] int64, of the token to be sampled. With token_ids [num_rows, max_len] int32 and
    rows [b] int32, the token also goes to token_ids[rows[i], position[i]], 0 in place of -1.
    """
    for first in range(0, len(logits), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        ids = _sample(
            logits[part], temperature[part], top_k[part], top_p[part], min_p[part], uniform(seed[part], position[part])
        )
        out[part] = ids.to(torch.int32)
    if token_ids is not None:
        assert rows is not None
        token_ids.index_put_((rows.long(), position), out.clamp(min=0))
    return out


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """[b] int64 each → [b] float64 in [0, 1): splitmix64 (Steele et al., OOPSLA 2014), 52 bits of it."""
    return _shift_right(_mix(_mix(seed) ^ position), 12).double() * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    """Products wrap as those of unsigned integers do; the constants are given as signed ones."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ _shift_right(x, shift)) * factor
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & (2 ** (64 - shift) - 1)


def _sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, numbers: Tensor
) -> Tensor:
    best, greedy = logits.max(dim=-1)  # a NaN counts as the largest
    finite = best.isfinite()
    scale = temperature.where(temperature > 0, 1.0)
    weights = (logits.float() - best.float()[:, None]).div_(scale[:, None]).exp_()
    weights = weights.where(finite[:, None], 1.0)
    cdf = kept_weights(logits, weights, top_k, top_p, min_p).cumsum(-1, dtype=torch.float64)
    target = numbers[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    return ids.where(temperature > 0, greedy).where(finite, -1)


def kept_weights(logits: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`weights` [b, vocab], zero where the filters drop the token. Of equal logits the lower index counts as larger."""
    vocab_size = logits.shape[1]
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    top = weights.gather(1, order)
    limit_k = top_k.long().where(top_k > 0, vocab_size)[:, None]
    top = top.where(torch.arange(vocab_size, device=logits.device) < limit_k, 0)
    mass = top.cumsum(-1, dtype=torch.float64)
    in_top_p = (mass - top < top_p.double()[:, None] * mass[:, -1:]) | (top_p >= 1)[:, None]  # mass before the token
    in_top_p[:, 0] = True  # a top-p too small for its float32 is 0
    in_min_p = top >= min_p[:, None] * top[:, :1]
    return torch.zeros_like(weights).scatter_(1, order, top.where(in_top_p & in_min_p, 0))
