"""Linear layers, sharded over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minisgl.errors import ConfigError
from minisgl.layers.base import Layer, LayerEnv, MatrixLayer, Tensor, WeightSlot
from minisgl.utils.math import div_ceil


class Linear(MatrixLayer):
    """y = x Wᵀ + b with `weight`: [out, in] of this rank. Subclasses say which rows or columns those are."""

    def __init__(self, env: LayerEnv, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(env, out_features, in_features)
        self.bias = env.vector(out_features) if bias else None

    def _packed_weight(self) -> Any:
        return self._ops.pack_weight(self.weight)


class ReplicatedLinear(Linear):
    """Every rank holds all of it (a router), and exactly: small errors would choose other experts."""

    def _packed_weight(self) -> Any:
        return self._ops.pack_weight(self.weight, exact=True)

    def forward(self, x: Tensor) -> Tensor:
        return self._ops.linear(x, self.matrix, self.bias)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from column_slots(prefix, self.weight, self.bias, self.weight.shape[0], 0)


class ColumnLinear(Linear):
    """Several linears on the same input, in one matrix; each is split by output rows.

    parts: by name, the rows in the checkpoint, how many of them this rank holds, and the first of those. The output is
    this rank's share of the first, then of the second, …
    """

    def __init__(self, env: LayerEnv, in_features: int, parts: dict[str, tuple[int, int, int]], bias: bool) -> None:
        super().__init__(env, in_features, sum(share for _, share, _ in parts.values()), bias)
        self._parts = parts

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        begin = 0
        for name, (total, share, first) in self._parts.items():
            rows = slice(begin, begin + share)
            bias = None if self.bias is None else self.bias[rows]
            yield from column_slots(f"{prefix}{name}.", self.weight[rows], bias, total, first)
            begin += share


class GateUpLinear(ColumnLinear):
    """Gate and up projection of a gated MLP, for `norm_gate_up`."""

    def __init__(self, env: LayerEnv, in_features: int, inner: int, bias: bool) -> None:
        share = env.share(inner, "features of gate_proj")
        rows = (inner, share, env.comm.rank * share)
        super().__init__(env, in_features, {"gate_proj": rows, "up_proj": rows}, bias)

    def _packed_weight(self) -> Any:
        return self._ops.pack_weight(self.weight, pair=True)


class QKVLinear(ColumnLinear):
    """Query, key and value projections in one matrix, split by heads.

    Where there are fewer KV heads than ranks, each KV head is replicated on the ranks that hold its query heads.
    """

    def __init__(
        self, env: LayerEnv, hidden_size: int, num_qo_heads: int, num_kv_heads: int, head_dim: int, bias: bool
    ) -> None:
        tp_size, rank = env.comm.size, env.comm.rank
        num_qo, num_kv = env.share(num_qo_heads, "attention heads"), max(1, num_kv_heads // tp_size)
        if num_kv_heads % tp_size and tp_size % num_kv_heads:
            raise ConfigError(f"--tensor-parallel-size {tp_size} does not fit the model's {num_kv_heads} KV heads")
        q = (num_qo_heads * head_dim, num_qo * head_dim, rank * num_qo * head_dim)
        kv = (num_kv_heads * head_dim, num_kv * head_dim, rank * num_kv_heads // tp_size * head_dim)
        super().__init__(env, hidden_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias)
        self.num_qo_heads, self.num_kv_heads = num_qo, num_kv


class RowLinear(Linear):
    """Split by input columns; the sum over ranks is the result, and rank 0 adds the bias, once."""

    def __init__(self, env: LayerEnv, in_features: int, out_features: int, bias: bool, what: str) -> None:
        self._in_features = in_features
        super().__init__(env, env.share(in_features, what), out_features, bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + y, in place of `residual`: rank 0 adds it, and the bias, to its part of the sum over ranks."""
        if self._comm.rank == 0:
            part = self._ops.linear_add(x, self.matrix, residual, self.bias)
        else:
            part = self._ops.linear(x, self.matrix)
        return self._comm.all_reduce(part)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        rows, cols = self.weight.shape
        first = self._comm.rank * cols
        yield WeightSlot(f"{prefix}weight", (rows, self._in_features), self.weight, (0, rows), (first, first + cols))
        if self.bias is not None:
            yield WeightSlot(f"{prefix}bias", (rows,), self.bias, (0, rows))


def column_slots(prefix: str, weight: Tensor, bias: Tensor | None, total: int, first: int) -> Iterator[WeightSlot]:
    """Rows [first, first + len(weight)) of a linear with `total` output features."""
    rows = (first, first + weight.shape[0])
    yield WeightSlot(f"{prefix}weight", (total, weight.shape[1]), weight, rows)
    if bias is not None:
        yield WeightSlot(f"{prefix}bias", (total,), bias, rows)


class VocabParallelEmbedding(MatrixLayer):
    """Rank r holds rows [r * share, (r + 1) * share) of the table; the last rank's share is padded."""

    def __init__(self, env: LayerEnv, vocab_size: int, hidden_size: int) -> None:
        share = div_ceil(vocab_size, env.comm.size)
        super().__init__(env, share, hidden_size)
        self._vocab_size, self._first = vocab_size, env.comm.rank * share

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [num_tokens] int64 → [num_tokens, hidden]."""
        return self._comm.all_reduce(self._ops.embedding(ids, self.matrix, self._first))

    def _packed_weight(self) -> Any:
        return self._ops.pack_table(self.weight)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        share, hidden = self.weight.shape
        end = max(self._first, min(self._first + share, self._vocab_size))
        self.weight[end - self._first :] = 0  # what is padding
        rows = (self._first, end)
        yield WeightSlot(f"{prefix}weight", (self._vocab_size, hidden), self.weight[: end - self._first], rows)


class LMHead(Layer):
    """Hidden states to logits, on the rows that sample. `tied`: the embedding, whose table then serves both."""

    def __init__(
        self, env: LayerEnv, vocab_size: int, hidden_size: int, eps: float, tied: VocabParallelEmbedding | None
    ) -> None:
        super().__init__()
        self._ops, self._comm, self._vocab_size, self._eps = env.ops, env.comm, vocab_size, eps
        self._table = (tied or VocabParallelEmbedding(env, vocab_size, hidden_size),)  # no module of this one's own
        self._tied = tied is not None

    @property
    def matrix(self) -> Any:
        return self._table[0].matrix

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """x: [n, hidden], the residual stream; norm: [hidden] → [n, vocab_size], on rank 0, which samples."""
        logits = self._comm.gather(self._ops.norm_linear(x, norm, self._eps, self.matrix))
        return logits[:, : self._vocab_size]

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        if not self._tied:
            yield from self._table[0].weights(prefix)

    def pack(self) -> None:
        if not self._tied:
            self._table[0].pack()
