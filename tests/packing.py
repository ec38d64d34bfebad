"""Packed log-probabilities, as an engine gives them."""

import struct
from collections.abc import Sequence
from itertools import chain

Top = Sequence[tuple[int, float]]


def pack_logprobs(tokens: Sequence[tuple[float, Top]]) -> bytes:
    """Of tokens: their own, and (id, log-probability) of the most probable ones."""
    return b"".join([struct.pack("f" + "if" * len(top), one, *chain.from_iterable(top)) for one, top in tokens])
