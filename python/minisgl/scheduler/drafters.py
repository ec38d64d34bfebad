"""Where drafts come from: guesses of a request's next tokens, which the next step verifies."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from minisgl.core import Req

MIN_MATCH, MAX_MATCH = 2, 16  # tokens that have to come again, and how many are looked at
_MOST_PLACES = 1024  # where the last tokens came before, that are looked at: a text may consist of one token


class Drafter(Protocol):
    """A function of the calls made, the same on every rank: no clock, no randomness. It must be quick."""

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        """At most `most` tokens that may follow those of `req` that are known and `num_pending` (0 or 1) more that are
        sampled by a step in flight. What it raises switches it off for the request."""

    def forget(self, uid: int) -> None:
        """A request has ended, which it may never have seen."""


class _Text:
    """The tokens of one request in an array that has room for more. repeats: whether the last two came before."""

    def __init__(self, req: Req) -> None:
        size = len(req.prefix)
        self._ids, self._size = np.empty(2 * len(req.tokens) + 64, np.int32), max(1, size - 1)
        self._ids[:size] = req.prefix  # which are the first of its tokens, as an array already
        first = req.prefix[: self._size].astype(np.int64)
        self._pairs = dict.fromkeys((first[:-1] << 32 | first[1:]).tolist())
        self.repeats = False

    def of(self, req: Req) -> npt.NDArray[np.int32]:
        tokens, known, pairs = req.tokens, self._size, self._pairs
        self._size = size = len(tokens)
        if size > len(self._ids):
            self._ids = np.concatenate((self._ids[:known], np.empty(size, np.int32)))
        self._ids[known:size] = tokens[known:]
        for i in range(known, size):
            pair = tokens[i - 1] << 32 | tokens[i]
            self.repeats = pair in pairs
            pairs[pair] = None
        return self._ids[:size]


class NgramDrafter:
    """What followed the last tokens when they came before, in the prompt or the output ("prompt lookup"): of the places
    where most of them did, the last. A draft is shorter than what came again: a few tokens say little of the next ones.
    A search looks at all tokens, at some gigabytes per second; there is one where the last two came before."""

    def __init__(self) -> None:
        self._texts: dict[int, _Text] = {}

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        if (text := self._texts.get(req.uid)) is None:
            text = self._texts[req.uid] = _Text(req)
        ids = text.of(req)
        end, length = find_repeated(ids) if text.repeats else (0, 0)
        return ids[end + num_pending : end + min(num_pending + most, length - 1)].tolist() if end else ()

    def forget(self, uid: int) -> None:
        self._texts.pop(uid, None)


class ToldDrafter:
    """What the engine has told with the last step's result, which is of use as long as no other step is in flight."""

    def __init__(self) -> None:
        self.drafts: dict[int, Sequence[int]] = {}  # by uid

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        draft = self.drafts.pop(req.uid, ())
        return () if num_pending else draft[:most]

    def forget(self, uid: int) -> None:
        self.drafts.pop(uid, None)


def find_repeated(ids: npt.NDArray[np.int32]) -> tuple[int, int]:
    """Where the longest suffix of `ids` that also occurs earlier ends there, the last time, and how long it is, as far
    as `MAX_MATCH`; (0, 0): nowhere."""
    size = len(ids)
    if size <= MIN_MATCH:
        return 0, 0
    ends = np.flatnonzero((ids[1:-1] == ids[-1]) & (ids[:-2] == ids[-2]))[-_MOST_PLACES:] + MIN_MATCH
    if not len(ends):
        return 0, 0
    back = np.arange(MIN_MATCH + 1, min(MAX_MATCH, size) + 1)
    places = ends[:, None] - back  # index -1 and below it is the end of the text
    same = (ids[places] == ids[size - back]) & (places >= 0)
    lengths = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    longest = lengths.max()
    return int(ends[np.flatnonzero(lengths == longest)[-1]]), int(longest) + MIN_MATCH
