"""Token embedding and LM head, split by vocabulary over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minisgl.layers.base import Layer, LayerEnv, MatrixLayer, Tensor, WeightSlot
from minisgl.utils.math import div_ceil


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
