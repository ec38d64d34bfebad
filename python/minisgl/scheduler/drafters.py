"""Where drafts come from: guesses of a request's next tokens, which the next step verifies."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from minisgl.core import Req

TokenIds = npt.NDArray[np.int32]
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

    def of(self, req: Req) -> TokenIds:
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
        ends, length = find_repeated(ids, ids[:-1]) if text.repeats else ((), 0)
        return ids[ends[-1] + num_pending : ends[-1] + min(num_pending + most, length - 1)].tolist() if length else ()

    def forget(self, uid: int) -> None:
        self._texts.pop(uid, None)


class Prediction:
    """What a client expects of a request (OpenAI's `prediction`). Where the output follows it, its next tokens are the
    draft. It is expected to begin with it; after a difference, the place is looked for from which the last tokens come:
    where most of them do, and the next one behind the last place."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids, self._place, self._num_seen = np.array(ids, np.int32), 0, 0
        self._length = MAX_MATCH  # of the output's last tokens so many are before the place

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        new, place = req.tokens[req.prompt_len + self._num_seen :], self._place
        self._num_seen += len(new)
        self._place, self._length = place + len(new), self._length + len(new)
        if self._ids[place : self._place].tolist() != new or not self._length:
            last = np.array(req.tokens[max(req.prompt_len, len(req.tokens) - MAX_MATCH) :], np.int32)
            ends, self._length = find_repeated(last, self._ids)
            self._place = int(next((end for end in ends if end > place), ends[-1])) if self._length else place
        num = min(num_pending + most, max(0, self._length - 1))
        return self._ids[self._place + num_pending : self._place + num].tolist()


def find_repeated(ids: TokenIds, text: TokenIds) -> tuple[Sequence[int], int]:
    """Where in a text the longest end of `ids` that it has ends, in ascending order, and how long that is, as far as
    `MAX_MATCH`; nowhere, and 0: it has none."""
    if min(len(ids), len(text)) < MIN_MATCH:
        return (), 0
    ends = np.flatnonzero((text[1:] == ids[-1]) & (text[:-1] == ids[-2]))[-_MOST_PLACES:] + MIN_MATCH
    if not len(ends):
        return (), 0
    back = np.arange(MIN_MATCH + 1, min(MAX_MATCH, len(ids), len(text)) + 1)
    places = ends[:, None] - back  # index -1 and below it is the end of the text
    same = (text[places] == ids[-back]) & (places >= 0)
    lengths = np.logical_and.accumulate(same, axis=1).sum(axis=1)
    longest = lengths.max()
    return ends[lengths == longest].tolist(), int(longest) + MIN_MATCH
