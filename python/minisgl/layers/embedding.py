"""Token embedding and LM head, split by vocabulary over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from minisgl.layers.base import Layer, LayerEnv, Tensor, WeightSlot
from minisgl.utils.math import div_ceil


class VocabParallelEmbedding(Layer):
    """Rank r holds rows [r * share, (r + 1) * share) of the table; the last rank's share is padded."""

    def __init__(self, env: LayerEnv, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._ops, self._comm, self._vocab_size = env.ops, env.comm, vocab_size
        share = div_ceil(vocab_size, env.comm.size)
        self._first = env.comm.rank * share
        self.weight = env.empty(share, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [num_tokens] int64 → [num_tokens, hidden]."""
        return self._comm.all_reduce(self._ops.embedding(ids, self.weight, self._first))

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield vocab_slot(f"{prefix}weight", self.weight, self._vocab_size, self._first)


class LMHead(Layer):
    """Hidden states to logits, on the rows that sample. `tied` is the embedding's table, which then serves both."""

    def __init__(self, env: LayerEnv, vocab_size: int, hidden_size: int, eps: float, tied: nn.Parameter | None) -> None:
        super().__init__()
        self._ops, self._comm, self._vocab_size, self._eps = env.ops, env.comm, vocab_size, eps
        self._tied = tied is not None
        share = div_ceil(vocab_size, env.comm.size)
        self._first = env.comm.rank * share
        self.weight = env.empty(share, hidden_size) if tied is None else tied

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """x: [n, hidden], the residual stream; norm: [hidden] → [n, vocab_size], on rank 0, which samples."""
        logits = self._comm.gather(self._ops.norm_linear(x, norm, self._eps, self.weight))
        return logits[:, : self._vocab_size]

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        if not self._tied:
            yield vocab_slot(f"{prefix}weight", self.weight, self._vocab_size, self._first)


def vocab_slot(name: str, weight: Tensor, vocab_size: int, first: int) -> WeightSlot:
    """Rows from `first` on, as many as there are; what is padding becomes zero here."""
    share, hidden = weight.shape
    end = max(first, min(first + share, vocab_size))
    weight[end - first :] = 0
    return WeightSlot(name, (vocab_size, hidden), weight[: end - first], (first, end))
