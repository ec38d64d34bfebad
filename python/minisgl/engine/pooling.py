"""Vectors and scores of prompts, from hidden states."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minisgl.attention.base import IntArray, StepContext, Tensor, to_device
from minisgl.core import Admission, ScheduledReq
from minisgl.engine.shard import ModelShard


class Computed(NamedTuple):
    """What the layers of a step came to, until the next one. tokens: [n] int64, of the step's.

    logits: tokens (None: those that sample) → [n, vocab_size], until the next call. hidden: tokens → [n, hidden], the
    residual stream behind the last layer; where there is a context, None is all.
    """

    logits: Callable[[Tensor | None], Tensor]
    hidden: Callable[[Tensor | None], Tensor]
    input_ids: Tensor  # of all tokens
    context: StepContext | None = None  # if they were computed one after the other


class PooledRows:
    """Which running requests want a vector, by row of the engine's tables, and the sums of hidden states so far."""

    def __init__(self) -> None:
        self.wanted: dict[int, tuple[str, int]] = {}  # of which kind, and tokens of the prompt
        self._sums: dict[int, Tensor] = {}  # float32

    def apply(self, admissions: Iterable[Admission]) -> None:
        """Remember what newly admitted requests want, and forget who had their rows before."""
        for row, _, params, prompt_len, _ in admissions:
            self._sums.pop(row, None)
            self.wanted.pop(row, None)
            if params.pooling:
                self.wanted[row] = params.pooling, prompt_len

    def take(
        self, reqs: Sequence[ScheduledReq], offsets: IntArray, computed: Computed, shard: ModelShard
    ) -> dict[int, Tensor]:
        """The vectors of prompts that end in this step, on their way to the host: float32, by index into `reqs`. The
        tokens of reqs[i] begin at offsets[i]. Of a mean, each chunk of a prompt has a part."""
        found = dict[int, Tensor]()
        for i, req in enumerate(reqs) if self.wanted else ():
            kind, prompt_len = self.wanted.get(req.row, ("", 0))
            is_last, end = req.start + req.num_new == prompt_len, int(offsets[i + 1])
            begin = int(offsets[i]) if kind == "mean" else end - 1
            if not kind or not (is_last or kind == "mean"):
                continue
            hidden = computed.hidden(to_device(np.arange(begin, end), shard.device))
            total = shard.model.pooled(hidden, kind).sum(0) + self._sums.pop(req.row, 0.0)
            if is_last:  # rank 0's, so that all find the same whether it is finite
                vector = shard.comm.broadcast(total / (prompt_len if kind == "mean" else 1))
                found[i] = vector.to("cpu", non_blocking=True)
            else:
                self._sums[req.row] = total
        return found


def pooled_bytes(vectors: Mapping[int, Tensor]) -> dict[int, bytes]:
    """What was on its way; b"" where a number is not finite."""
    return {i: vector.numpy().tobytes() if bool(vector.isfinite().all()) else b"" for i, vector in vectors.items()}
