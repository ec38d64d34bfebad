"""Log-probabilities on their way to the client: packed numbers from the scheduler, tokens with bytes from the
detokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from minisgl.core import TokenLogprobs

LEAST = -9999.0  # for what is less, or no number: JSON has no infinities, and this is OpenAI's


class PackedLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`TokenLogprobs` as little-endian bytes."""

    chosen: bytes  # [n] float32
    top_ids: bytes  # [n, k] int32
    top: bytes  # [n, k] float32


class TopLogprob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One of the most probable tokens at a position. `token`: the bytes that it stands for."""

    token_id: int
    token: bytes
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A token of a prompt or an output. `logprob` is None for a prompt's first token, which nothing precedes."""

    token_id: int
    token: bytes
    logprob: float | None
    top: list[TopLogprob]


def pack_logprobs(parts: Sequence[TokenLogprobs]) -> PackedLogprobs:
    """Of all parts, one after the other."""
    chosen, top_ids, top = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return PackedLogprobs(
        chosen.astype("<f4").tobytes(), top_ids.astype("<i4").tobytes(), _bounded(top).astype("<f4").tobytes()
    )


def unpack_logprobs(packed: PackedLogprobs) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each token its log-probability, and (id, log-probability) of the most probable ones."""
    chosen = _bounded(np.frombuffer(packed.chosen, "<f4"))
    top_ids = np.frombuffer(packed.top_ids, "<i4").reshape(len(chosen), -1)
    top = np.frombuffer(packed.top, "<f4").reshape(len(chosen), -1)
    return [
        (logprob, list(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(chosen.tolist(), top_ids.tolist(), top.tolist(), strict=True)
    ]


def _bounded(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.where(logprobs > LEAST, logprobs, np.float32(LEAST))
