"""Linear layers, sharded over tensor-parallel ranks (Megatron-LM, arXiv 1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from minisgl.errors import ConfigError
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, MatrixLayer, Tensor
from minisgl.layers.formats import DENSE, Shard, WeightSlot
from minisgl.utils.math import div_ceil


class Linear(MatrixLayer):
    """y = x Wᵀ + b with W: [out, in] of this rank. Subclasses say which rows or columns those are."""

    def __init__(
        self, env: LayerEnv, in_features: int, out_features: int, bias: bool, activation: str | None = None
    ) -> None:
        super().__init__(env, out_features, in_features, activation)
        self.bias = env.vector(out_features) if bias else None

    def _slots(self, prefix: str, shard: Shard) -> Iterator[WeightSlot]:
        """Of the checkpoint's linear layer `prefix`, whose bias is sharded as the rows of its weight are."""
        yield from self._format.slots(prefix, self._tensors, shard)
        if self.bias is not None:
            begin, end = shard.rows
            target = self.bias[shard.at : shard.at + end - begin]
            yield WeightSlot(f"{prefix}bias", shard.shape[:1], target, shard.rows)


class ReplicatedLinear(Linear):
    """Every rank holds all of it (a router), and exactly: small errors would choose other experts."""

    def __init__(self, env: LayerEnv, in_features: int, out_features: int) -> None:
        super().__init__(replace(env, format=DENSE), in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.apply(x, self.bias)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self._slots(prefix, Shard((self._num_rows, self._num_cols), (0, self._num_rows)))


class ColumnLinear(Linear):
    """Several linears on the same input, in one matrix; each is split by output rows.

    parts: by name, the rows in the checkpoint, how many of them this rank holds, and the first of those. The output is
    this rank's share of the first, then of the second, …
    """

    def __init__(
        self,
        env: LayerEnv,
        in_features: int,
        parts: dict[str, tuple[int, int, int]],
        bias: bool,
        activation: str | None = None,
    ) -> None:
        num_rows = sum(share for _, share, _ in parts.values())
        super().__init__(env, in_features, num_rows, bias, activation)
        self._parts = parts

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        at = 0
        for name, (total, share, first) in self._parts.items():
            shard = Shard((total, self._num_cols), (first, first + share), at=at)
            yield from self._slots(f"{prefix}{name}.", shard)
            at += share


class GateUpLinear(ColumnLinear):
    """Gate and up projection of a gated MLP, and what makes one of them: activation(gate) * up."""

    def __init__(self, env: LayerEnv, in_features: int, inner: int, bias: bool, activation: str) -> None:
        share = env.share(inner, "features of gate_proj")
        rows = (inner, share, env.comm.rank * share)
        super().__init__(env, in_features, {"gate_proj": rows, "up_proj": rows}, bias, activation)

    def forward(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        return self.matrix.gate_up(x, norm, eps, self.bias)

    def cpu_spec(self) -> CpuSpec | None:
        return super().cpu_spec() if self._activation == "silu" else None


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

    def forward(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        return self.matrix.norm_apply(x, norm, eps, self.bias)


class RowLinear(Linear):
    """Split by input columns; the sum over ranks is the result, and rank 0 adds the bias, once."""

    def __init__(self, env: LayerEnv, in_features: int, out_features: int, bias: bool, what: str) -> None:
        super().__init__(env, env.share(in_features, what), out_features, bias)
        self._in_features = in_features

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + y, in place of `residual`: rank 0 adds it, and the bias, to its part of the sum over ranks."""
        if self._comm.rank > 0:
            return self._comm.all_reduce(self.matrix.apply(x))
        return self._comm.all_reduce(self.matrix.apply_add(x, residual, self.bias))

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        first = self._comm.rank * self._num_cols
        shape, cols = (self._num_rows, self._in_features), (first, first + self._num_cols)
        yield from self._slots(prefix, Shard(shape, (0, self._num_rows), cols))


class VocabParallelEmbedding(MatrixLayer):
    """Rank r holds rows [r * share, (r + 1) * share) of the table; the last rank's share is padded."""

    def __init__(self, env: LayerEnv, vocab_size: int, hidden_size: int) -> None:
        share = div_ceil(vocab_size, env.comm.size)
        super().__init__(env, share, hidden_size)
        self._vocab_size, self._first = vocab_size, env.comm.rank * share

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [num_tokens] int64 → [num_tokens, hidden]."""
        return self._comm.all_reduce(self.matrix.rows(ids, self._first))

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        end = max(self._first, min(self._first + self._num_rows, self._vocab_size))
        for tensor in self._tensors.values():
            tensor[end - self._first :] = 0  # what is padding
        shard = Shard((self._vocab_size, self._num_cols), (self._first, end))
        yield from self._format.slots(prefix, self._tensors, shard)


class LMHead(Layer):
    """Hidden states to logits, on the rows that sample. `tied`: the embedding, whose table then serves both."""

    def __init__(
        self, env: LayerEnv, vocab_size: int, hidden_size: int, eps: float, tied: VocabParallelEmbedding | None
    ) -> None:
        super().__init__()
        self._comm, self._vocab_size, self._eps = env.comm, vocab_size, eps
        self._table = (tied or VocabParallelEmbedding(env, vocab_size, hidden_size),)  # no module of this one's own
        self._tied = tied is not None

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """x: [n, hidden], the residual stream; norm: [hidden] → [n, vocab_size], on rank 0, which samples."""
        logits = self._comm.gather(self._table[0].matrix.norm_apply(x, norm, self._eps))
        return logits[:, : self._vocab_size]

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        if not self._tied:
            yield from self._table[0].weights(prefix)

    def pack(self) -> None:
        if not self._tied:
            self._table[0].pack()

    def cpu_spec(self) -> CpuSpec | None:
        return self._table[0].cpu_spec()
