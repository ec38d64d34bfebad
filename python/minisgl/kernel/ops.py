"""What layers and steps compute: the seam where C++ and CUDA kernels plug in.

There are two interfaces, `LayerOps` for layers and `StepOps` for engines. The body of each method is its reference, in
plain torch for any device and type: faster operations override what they are better at, and tests compare them with it.
All work on ragged batches: the first dimension of activations is `num_tokens`, whatever requests the tokens belong to.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minisgl.config.model import MoE
from minisgl.config.states import State
from minisgl.kernel.activations import ACTIVATIONS, route
from minisgl.kernel.packed import Packed
from minisgl.kernel.sampling import SamplingColumns, TokenStore, sample_reference
from minisgl.kernel.state import StateOps

Tensor = torch.Tensor
Tensors = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class RopeAngles:
    """Of a step's tokens. cos, sin: [num_tokens, 1, head_dim] float32, the first half of `sin` negated."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """x: [num_tokens, heads, head_dim]."""
        return (x * self.cos.to(x.dtype)).addcmul_(x.roll(x.shape[-1] // 2, -1), self.sin.to(x.dtype))


@dataclass(frozen=True, slots=True)
class KVSlots:
    """Where a step's keys and values go in one layer. k, v: [num_slots, num_kv_heads, head_dim], uint8 where they are
    e4m3, with the bytes of a scale behind them where they are int8; slots: [num_tokens] int64."""

    k: Tensor
    v: Tensor
    slots: Tensor

    def store(self, k: Tensor, v: Tensor) -> None:
        """k, v: [num_tokens, num_kv_heads, head_dim]."""
        for cache, x in ((self.k, k), (self.v, v)):
            cache.index_copy_(0, self.slots, narrowed(x, cache.dtype))


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., head_dim] as caches of a type hold them. What is too large for it becomes its largest."""
    if dtype == torch.int8:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return torch.cat(((x / scale.clamp(min=1e-37)).round().to(dtype), scale.view(dtype)), -1)
    limits = {torch.uint8: (torch.float8_e4m3fn, 448), torch.float16: (dtype, 65504)}
    kind, most = limits.get(dtype, (dtype, torch.inf))
    return x.clamp(-most, most).to(kind).view(dtype)


def widened(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """What `narrowed` has left, but for e4m3, as numbers of a type."""
    has_scales = kept.dtype == torch.int8
    return (kept[..., :-4] * kept[..., -4:].contiguous().view(torch.float32) if has_scales else kept).to(dtype)


@dataclass(frozen=True, slots=True)
class PagedSequences:
    """int32 on the device. page_table: [rows, max pages]; rows, seq_lens: [n]; cu_q: [n + 1], offsets of the sequences'
    tokens in q. seq_lens counts this step's tokens too, which come last. fresh: [1], at least so many of a sequence's
    newest tokens are all that a captured step writes; None: there are no captured steps."""

    page_table: Tensor
    rows: Tensor
    seq_lens: Tensor
    cu_q: Tensor
    page_size: int  # tokens
    fresh: Tensor | None = None


# All experts' weights [num_experts, out, in]; or the type of activations, and each expert's parts, one below the other.
Stacked = Tensor | tuple[torch.dtype, Iterable[Sequence[Packed | Tensor]]]
Biases = tuple[Tensor, Tensor] | None  # of all experts: [num_experts, 2 * n], gate's first, and [num_experts, hidden]
Routed = Tensor | tuple[Tensor, Tensor]  # a router's logits [num_tokens, num_experts], or what `route` makes of them
# (x [num_tokens, hidden], Routed, and perhaps a residual, which becomes its sum with the result) → [num_tokens, hidden]
Experts = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Around:
    """What is computed with a product, at once where a kernel can. bias: [out]; norm, eps: of x, which is normalised
    first; residual: [num_tokens, out], which becomes its sum with the product, rounded once; gated: activation(gate) *
    up, the weight's first half being gate's rows; apart: another such product is not next."""

    bias: Tensor | None = None
    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False
    apart: bool = False

    def num_out(self, rows: int) -> int:
        """Columns of the result. rows: of the weight."""
        return rows // 2 if self.gated else rows

    def target(self, x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """Where the result goes. rows: of the weight."""
        return x.new_empty(len(x), self.num_out(rows), dtype=dtype) if self.residual is None else self.residual


ALONE = Around()


class Matrix(ABC):
    """A weight [out, in] as something to multiply with. `plain` and `taken` (or `rows`) have to be written; `fused` is
    for kernels that save passes over memory."""

    cpu_handle: int | None = None  # by which the CPU engine that computes whole steps knows it; None: it cannot use it

    def __init__(self, ops: "LayerOps", num_out: int, activation: str | None) -> None:
        """activation: of gate and up, a name in `ACTIVATIONS`; None for a matrix that is not used for them."""
        self._ops, self._num_out, self._activation = ops, num_out, activation

    @abstractmethod
    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias, whatever the shape."""

    def taken(self, ids: Tensor) -> Tensor:
        """`rows` of ids that are all there, in memory of its own. A matrix has its own way to one of the two."""
        return self.rows(ids)

    def rows(self, ids: Tensor, first: int = 0) -> Tensor:
        """Rows of a table of embeddings: ids [num_tokens] int64 → [num_tokens, in].

        first: the id of the table's first row. Ids outside the table belong to other ranks, and give zeros.
        """
        local = ids - first
        is_outside = (local < 0) | (local >= self._num_out)
        return self.taken(local.masked_fill(is_outside, 0)).masked_fill_(is_outside[:, None], 0)

    def fused(self, x: Tensor, around: Around) -> Tensor | None:  # noqa: ARG002
        """All of it at once, a residual being contiguous; None: no kernel takes this."""
        return None

    def norm_and_apply(self, x: Tensor, norm: Tensor, around: Around, spec: MoE | None = None) -> tuple[Tensor, Any]:  # noqa: ARG002
        """`rms_norm(x, norm, around.eps)`, and `apply` of it; of a router of `spec`'s experts, `Routed`."""
        normed = self._ops.rms_norm(x, norm, around.eps)
        return normed, self.apply(normed, Around(around.bias))

    def apply(self, x: Tensor, around: Around = ALONE) -> Tensor:
        """x: [num_tokens, in] → x Wᵀ: [num_tokens, out], of gate and up [num_tokens, out / 2]; with what is around it,
        by one kernel, or what surrounds the product by one of its own, from the outside in."""
        residual, product = around.residual, Around(around.bias)
        if (residual is None or residual.is_contiguous()) and (out := self.fused(x, around)) is not None:
            return out
        if around.norm is not None:
            x = self._ops.rms_norm(x, around.norm, around.eps)
            return self.apply(x, Around(around.bias, gated=around.gated))
        if around.gated:
            assert self._activation is not None
            return self._ops.act_and_mul(self.apply(x, product), self._activation)
        return self.plain(x, around.bias) if residual is None else residual.add_(self.apply(x, product))


class TorchMatrix(Matrix):
    """A weight as checkpoints have it."""

    def __init__(self, ops: "LayerOps", weight: Tensor, activation: str | None) -> None:
        super().__init__(ops, len(weight), activation)
        self.weight = weight

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def taken(self, ids: Tensor) -> Tensor:
        return self.weight.index_select(0, ids)


class LayerOps(StateOps):
    """What layers compute."""

    draft: Any = None  # on a GPU, the module of `draft.cu`
    late_from = 1 << 62  # tokens from which the norm ahead of attention better adds the bias of what follows it

    def vector_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of norms and biases, beside weights of type `dtype`."""
        return dtype

    def matrix(self, weight: Tensor, activation: str | None = None) -> Matrix:
        """weight: [out, in], of which a copy may be made in another layout. activation: of its `gate_up`."""
        return TorchMatrix(self, weight, activation)

    def int8_matrix(self, weight: Tensor, activation: str | None = None) -> Matrix:
        """weight: [out, in], rounded to 255 levels of each row's largest magnitude."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return self.matrix((weight / scale).round().mul_(scale).to(weight.dtype), activation)

    def packed_matrix(self, parts: Sequence[Packed], dtype: torch.dtype, activation: str | None = None) -> Matrix:
        """parts: of few bits, one below the other. dtype: of activations. activation: of its `gate_up`."""
        return self.matrix(torch.cat([part.dequantize() for part in parts]).to(dtype), activation)

    def experts(self, stacks: Sequence[Stacked | None], spec: MoE, biases: Biases) -> Experts | None:  # noqa: ARG002
        """stacks: gate and up, [num_experts, 2 * n, hidden]; and down, [num_experts, hidden, n]. None: there is no
        kernel for all of them, and matrices are made of each expert."""
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, late: Tensor | None = None) -> Tensor:
        """Root-mean-square norm (arXiv 1910.07467) of x: [..., n], in fp32; weight broadcasts. Then x += late."""
        scale = torch.rsqrt((wide := x.float()).square().mean(-1, keepdim=True).add_(eps))
        out = (wide * scale).to(x.dtype).mul_(weight)
        if late is not None:
            x += late
        return out

    def act_and_mul(self, gate_up: Tensor, activation: str = "silu") -> Tensor:
        """gate_up: [num_tokens, 2 * n] → activation(gate) * up, [num_tokens, n]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate, up)

    def norm_rope_store(self, qkv: Tensor, norm: Tensor | None, eps: float, rope: RopeAngles, cache: KVSlots) -> Tensor:
        """Norm of each query and key head (where there is a weight), rotate them, and store keys and values.

        qkv: [num_tokens, num_q + 2 * num_kv, head_dim], which may be overwritten, and part of wider rows; norm: [num_q
        + num_kv, head_dim]. The rotation pairs dimension i with i + head_dim / 2, as Hugging Face checkpoints do.
        → the queries: [num_tokens, num_q, head_dim], perhaps with another stride between tokens.
        """
        num_kv = cache.k.shape[1]
        num_q = qkv.shape[1] - 2 * num_kv
        qk = qkv[:, : num_q + num_kv]
        qk = rope.rotate(qk if norm is None else self.rms_norm(qk, norm, eps))
        cache.store(qk[:, num_q:], qkv[:, num_q + num_kv :])
        return qk[:, :num_q]


class StepOps:
    """What a step does beside its layers, with tables that lie on the device."""

    most_ruled = 0  # tokens of the largest vocabulary whose logits `sample` changes by `TokenStore.places`

    def step_inputs(
        self, rows: Tensor, positions: Tensor, token_ids: Tensor, page_tables: Tensors, page_size: int, angles: Tensors
    ) -> tuple[Tensor, list[Tensor], list[RopeAngles]]:
        """Ids of a step's tokens, slots by each table ([num_tokens] int64 all), and angles in each of theirs.

        rows, positions: [num_tokens] int32 into the tables token_ids: [rows, tokens] int32 and page_tables: [rows,
        pages] int32; angles: each [positions, 2 * head_dim] float32, cosines then sines.
        """
        rows, positions = rows.long(), positions.long()
        page, offset = positions // page_size, positions % page_size
        slots = [table[rows, page].long() * page_size + offset for table in page_tables]
        ropes = [RopeAngles(*table.index_select(0, positions)[:, None].chunk(2, -1)) for table in angles]
        return token_ids[rows, positions].long(), slots, ropes

    def scatter(self, table: Tensor, index: Tensor, values: Tensor) -> None:
        """table.flatten()[index] = values, all int32; no index comes twice."""
        table.view(-1).index_copy_(0, index.long(), values)

    def sample(self, logits: Tensor, columns: SamplingColumns, out: Tensor, store: TokenStore | None = None) -> Tensor:
        """Sample each row of `logits` [n, vocab] into `out` [n] int32, and into a table of tokens; -1 where a row's
        largest logit is not finite."""
        if not self.by_kernel("sample", logits, columns.words, out, *(store or (None,) * 2)[:2], *(None,) * 5):
            sample_reference(logits, columns, out)
            if store is not None:
                self.store_ids(store.token_ids, store.rows, columns["position"], out)
        return out

    def by_kernel(self, name: str, logits: Tensor, *others: Tensor | None) -> bool:  # noqa: ARG002
        """Whether a kernel has done it all at once. "sample": records, ids, tokens, rows, and what changes logits first
        (`engine.rules.StepRules`); "log_probabilities": what `logprobs` takes and gives."""
        return False

    def logprobs(self, logits: Tensor, rows: Tensor, targets: Tensor, num_top: int) -> Tensor:
        """logits: [m, vocab]; rows: [n] int64 of them; targets: [n] int32, negative ones count as 0 → log-probabilities
        of targets and the largest ones of each row: [n, 1 + 2 * min(num_top, vocab)] int32, as `core.Logprobs`."""
        num_top = min(num_top, logits.shape[1])
        words = torch.empty(len(rows), 1 + 2 * num_top, dtype=torch.int32, device=rows.device)
        if not self.by_kernel("log_probabilities", logits, rows, targets, words):
            logits, values = logits.index_select(0, rows).float(), words.view(torch.float32)
            total, (top, ids) = logits.logsumexp(-1, keepdim=True), logits.topk(num_top, dim=-1)
            values[:, :1] = logits.gather(1, targets[:, None].long().clamp(min=0)) - total
            words[:, 1::2], values[:, 2::2] = ids, top - total
        return words

    def store_ids(self, token_ids: Tensor, rows: Tensor, positions: Tensor, ids: Tensor) -> None:
        """Sampled ids become input of later steps: token_ids[rows, positions] = ids, [n]. A failed row (-1) gets some
        valid id, which nobody will see."""
        token_ids.index_put_((rows.long(), positions), ids.clamp(min=0))


class TorchOps(LayerOps, StepOps):
    """The reference of both."""

    def captures_chunks(self, kinds: Sequence[State]) -> bool:  # noqa: ARG002
        """Whether steps of several tokens of a sequence can be captured, where layers have such states."""
        return False


def loop_over_experts(
    x: Tensor, logits: Routed, residual: Tensor | None, stacks: Sequence[Sequence[Matrix]], spec: MoE, biases: Biases
) -> Tensor:
    """As `Experts`, those that were hit, one after the other. stacks: gate and up, and down, of each."""
    (gate_up, down), top_k = stacks, spec.num_experts_per_tok
    weights, experts = logits if isinstance(logits, tuple) else route(logits, top_k, spec.sums_to_1)
    order = experts.flatten().argsort(stable=True)  # (token, choice) pairs by expert
    tokens, weights = order // top_k, weights.to(x.dtype).flatten()[order, None]
    out, begin = torch.zeros_like(x), 0
    for expert, count in enumerate(experts.flatten().bincount(minlength=len(gate_up)).tolist()):
        if count:
            mine = tokens[begin : begin + count]
            first, second = (None, None) if biases is None else (biases[0][expert], biases[1][expert])
            hidden = gate_up[expert].apply(x[mine], Around(first, gated=True))
            out.index_add_(0, mine, down[expert].apply(hidden, Around(second)) * weights[begin : begin + count])
            begin += count
    return out if residual is None else residual.add_(out)
