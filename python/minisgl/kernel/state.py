"""What layers with recurrent states compute, in plain torch: the reference of kernels for them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor

_CHUNK = 64  # tokens
_NORM_EPS = 1e-6  # of queries and keys


class StateSequences(NamedTuple):
    """A step's sequences, on the device: int32 on a GPU, int64 on a CPU. Sequence i has the tokens [cu_q[i],
    cu_q[i + 1]) of the step, at least one, and goes on from the state in slot `slots[i]`.

    slots: [n], each once, but that of padding, which any number of sequences may have: what becomes of it, and what
    these compute, is of no interest. cu_q: [n + 1]. tried: [n], so many of a sequence's last tokens are a draft: the
    state does not take them in, and the slot keeps them. held: [n], so many of those that it has kept come before the
    sequence, since they held. Both None: there is neither.
    """

    slots: Tensor
    cu_q: Tensor
    held: Tensor | None = None
    tried: Tensor | None = None


class DeltaWeights(NamedTuple):
    """Of a gated delta net, this rank's: heads of queries and keys Hk, of values Hv; their sizes Dk and Dv.

    conv: [2 * Hk * Dk + Hv * Dv, width], of queries, keys and values in this order; a_log, dt_bias: [Hv] float32; norm:
    [Dv], of each head's output, with eps.
    """

    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


class DeltaState(NamedTuple):
    """conv: [num_slots, 2 * Hk * Dk + Hv * Dv, width - 1], what the convolution has last seen, the newest last, in the
    type of activations; memory: [num_slots, Hv, Dk, Dv] float32; kept: [num_slots, draft_len, features], of tokens that
    were tried, what `gated_delta_net` was given: qkvz, then ba."""

    conv: Tensor
    memory: Tensor
    kept: Tensor = torch.empty(0, 0)


class StateOps:
    """What layers with states compute."""

    def gated_delta_net(
        self, qkvz: Tensor, ba: Tensor, weights: DeltaWeights, state: DeltaState, seqs: StateSequences
    ) -> Tensor:
        """Gated DeltaNet (arXiv 2412.06464) between its projections, as in Qwen3-Next: a short convolution with SiLU of
        queries, keys and values, the gated delta rule, a norm of each head's output, and its gate. Computed in float32.

        qkvz: [num_tokens, 2 * Hk * Dk + 2 * Hv * Dv], queries, keys, values and gates; ba: [num_tokens, 2 * Hv], b, of
        how much is learnt of a token, then a, of how much is forgotten. `state` is brought up to date in place.
        → [num_tokens, Hv * Dv], in the type of qkvz.

        Where each sequence has one token, and none is a draft, nothing is asked of the device: it can be captured.
        """

        def compute(x: Tensor, slots: Tensor, *state: Tensor) -> Tensor:
            return torch.cat([_delta_net(part, weights, DeltaState(*state), slots) for part in x.split(_CHUNK, 1)], 1)

        return _by_sequence(torch.cat((qkvz, ba), -1), state, seqs, compute)

    def short_conv(
        self, gated: Tensor, weight: Tensor, bias: Tensor | None, state: Sequence[Tensor], seqs: StateSequences
    ) -> Tensor:
        """A convolution over time between two gates, as in LFM2: g' * (conv(g * x) + bias), in float32.

        gated: [num_tokens, 3 * channels], of g, g' and x; weight: [channels, width]; bias: [channels]; state: what was
        seen, [num_slots, channels, width - 1], which is brought up to date, and what is kept of drafts, [num_slots,
        draft_len, 3 * channels]. → [num_tokens, channels], in the type of `gated`.
        """

        def compute(gated: Tensor, slots: Tensor, seen: Tensor) -> Tensor:
            before, behind, x = gated.float().chunk(3, -1)
            mixed = causal_conv(before * x, weight, seen, slots)
            return (behind * (mixed if bias is None else mixed + bias)).to(gated.dtype)

        return _by_sequence(gated, state, seqs, compute)


def causal_conv(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor) -> Tensor:
    """Depthwise convolution over time with what came before, in float32.

    x: [n, num_tokens, channels], tokens of as many sequences; weight: [channels, width]; state: [num_slots, channels,
    width - 1], which is brought up to date; slots: [n] int64 → [n, num_tokens, channels].
    """
    width = weight.shape[1]
    seen = torch.cat((state[slots].to(x.dtype), x.transpose(1, 2)), -1)
    state[slots] = seen[..., seen.shape[-1] - width + 1 :].to(state.dtype)
    return (seen.float().unfold(-1, width, 1) * weight.float()[:, None]).sum(-1).transpose(1, 2)


def _by_sequence(x: Tensor, state: Sequence[Tensor], seqs: StateSequences, compute: Callable[..., Tensor]) -> Tensor:
    """x: [num_tokens, features]; state: what is kept of drafts comes last; compute: for n sequences of as many tokens,
    [n, num_tokens, features], whose slots these are of the states before it, which are brought up to date."""
    *parts, kept = state
    slots, num, tried = seqs.slots.long(), len(seqs.slots), seqs.tried
    if len(x) == num and seqs.held is None:
        return compute(x[:, None], slots, *parts)[:, 0]
    held, begins, out = [0] * num if seqs.held is None else seqs.held.tolist(), seqs.cu_q.tolist(), list[Tensor]()
    nums = [0] * num if tried is None else tried.clamp(max=kept.shape[1]).tolist()  # nobody's may have more
    for slot, begin, end, num_held, num_tried in zip(slots[:, None], begins, begins[1:], held, nums, strict=False):
        if num_held:
            compute(kept[slot, :num_held], slot, *parts)
        out.append(compute(x[None, begin : end - num_tried], slot, *parts))
        if num_tried:
            kept[slot, :num_tried] = x[None, end - num_tried : end]
            out.append(compute(x[None, end - num_tried : end], slot * 0, *(part[slot] for part in parts)))
    return torch.cat(out, 1)[0]


def _delta_net(x: Tensor, weights: DeltaWeights, state: DeltaState, slots: Tensor) -> Tensor:
    """x: a chunk of n sequences, qkvz and ba, [n, num_tokens, features]; slots: [n] → [n, num_tokens, Hv * Dv]."""
    _, num_v, k_dim, v_dim = state.memory.shape
    num_channels, qkvz, ba = len(weights.conv), x[..., : -2 * num_v], x[..., -2 * num_v :]
    num_k = (num_channels - num_v * v_dim) // (2 * k_dim)
    mixed = F.silu(causal_conv(qkvz[..., :num_channels], weights.conv, state.conv, slots))
    parts = zip(mixed.split((num_k * k_dim, num_k * k_dim, num_v * v_dim), -1), (k_dim, k_dim, v_dim), strict=True)
    q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part, dim in parts)  # [n, heads, num_tokens, dim]
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS) for x in (q, k))
    q, k = (x.repeat_interleave(num_v // num_k, 1) for x in (q * k_dim**-0.5, k))
    b, a = ba.float().transpose(1, 2).chunk(2, 1)  # [n, Hv, num_tokens]
    log_decay = -weights.a_log.exp()[:, None] * F.softplus(a + weights.dt_bias[:, None])
    out, state.memory[slots] = delta_rule(q, k, v, b.sigmoid(), log_decay, state.memory[slots])
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.float()
    gate = qkvz[..., num_channels:].float()
    return (out.transpose(1, 2).flatten(2) * F.silu(gate)).to(qkvz.dtype)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule for a chunk of tokens at once (arXiv 2412.06464, section 3.3), all in float32.

    Token by token it is: memory *= exp(log_decay); memory += k ⊗ beta * (v - kᵀ memory); output = qᵀ memory. What all
    tokens of a chunk add follows from a triangular system, since each sees what those before it have added.

    q, k: [n, heads, num_tokens, Dk]; v: [n, heads, num_tokens, Dv]; beta, log_decay: [n, heads, num_tokens]; memory:
    [n, heads, Dk, Dv] → outputs [n, heads, num_tokens, Dv], and the memory after them.
    """
    since_start = log_decay.cumsum(-1)
    between = (since_start[..., :, None] - since_start[..., None, :]).tril().exp().tril()  # from token j to token i
    decayed = since_start.exp()[..., None]
    overlap = beta[..., None] * (k @ k.transpose(-1, -2)) * between
    wanted = beta[..., None] * (v - decayed * (k @ memory))
    is_one = q.shape[2] == 1  # which adds what it wants, and must not ask the device
    added = wanted if is_one else torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    out = decayed * (q @ memory) + ((q @ k.transpose(-1, -2)) * between) @ added
    until_end = (since_start[..., -1:] - since_start).exp()[..., None]
    return out, decayed[..., -1:, :] * memory + (k * until_end).transpose(-1, -2) @ added
