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


class MergedColumnLinear(Linear):
    """Several linears on the same input, in one matrix; each is split by output rows.

    The output is this rank's share of the first, then of the second, …
    """

    def __init__(self, env: LayerEnv, in_features: int, out_features: dict[str, int], bias: bool) -> None:
        self._sizes = out_features
        self._shares = {name: env.share(size, f"features of {name}") for name, size in out_features.items()}
        super().__init__(env, in_features, sum(self._shares.values()), bias)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        begin = 0
        for name, share in self._shares.items():
            bias = None if self.bias is None else self.bias[begin : begin + share]
            weight = self.weight[begin : begin + share]
            yield from column_slots(f"{prefix}{name}.", weight, bias, self._sizes[name], self._comm.rank * share)
            begin += share


class GateUpLinear(MergedColumnLinear):
    """Gate and up projection of a gated MLP, for `norm_gate_up`."""

    def __init__(self, env: LayerEnv, in_features: int, inner: int, bias: bool) -> None:
        super().__init__(env, in_features, {"gate_proj": inner, "up_proj": inner}, bias)

    def _packed_weight(self) -> Any:
        return self._ops.pack_weight(self.weight, pair=True)


class QKVLinear(Linear):
    """Query, key and value projections in one matrix, split by heads.

    Where there are fewer KV heads than ranks, each KV head is replicated on the ranks that hold its query heads.
    """

    def __init__(
        self, env: LayerEnv, hidden_size: int, num_qo_heads: int, num_kv_heads: int, head_dim: int, bias: bool
    ) -> None:
        tp_size, rank = env.comm.size, env.comm.rank
        self.num_qo_heads = env.share(num_qo_heads, "attention heads")
        if num_kv_heads % tp_size and tp_size % num_kv_heads:
            raise ConfigError(f"--tensor-parallel-size {tp_size} does not fit the model's {num_kv_heads} KV heads")
        self.num_kv_heads = max(1, num_kv_heads // tp_size)
        self._parts = (  # name, heads in the checkpoint, local heads, first local head
            ("q_proj", num_qo_heads, self.num_qo_heads, rank * self.num_qo_heads),
            ("k_proj", num_kv_heads, self.num_kv_heads, rank * num_kv_heads // tp_size),
            ("v_proj", num_kv_heads, self.num_kv_heads, rank * num_kv_heads // tp_size),
        )
        self._head_dim = head_dim
        super().__init__(env, hidden_size, (self.num_qo_heads + 2 * self.num_kv_heads) * head_dim, bias)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        begin, dim = 0, self._head_dim
        for name, total, local, first in self._parts:
            end = begin + local * dim
            bias = None if self.bias is None else self.bias[begin:end]
            yield from column_slots(f"{prefix}{name}.", self.weight[begin:end], bias, total * dim, first * dim)
            begin = end


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
        yield vocab_slot(f"{prefix}weight", self.weight, self._vocab_size, self._first)


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


def vocab_slot(name: str, weight: Tensor, vocab_size: int, first: int) -> WeightSlot:
    """Rows from `first` on, as many as there are; what is padding becomes zero here."""
    share, hidden = weight.shape
    end = max(first, min(first + share, vocab_size))
    weight[end - first :] = 0
    return WeightSlot(name, (vocab_size, hidden), weight[: end - first], (first, end))
