"""Where drafts come from: guesses of a request's next tokens, which the next step verifies."""

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from minisgl.core import Req
from minisgl.kvcache.radix import RadixNode, path_up

TokenIds = npt.NDArray[np.int32]
MIN_MATCH, MAX_MATCH = 2, 16  # tokens that have to come again, and how many are looked at
_MOST_PLACES = 1024  # where the last tokens came before, that are looked at: a text may consist of one token
_MOST_CHILDREN = 32  # of a node, that are looked at for one that begins with less than a page


class Drafter(Protocol):
    """A function of the calls made, the same on every rank: no clock, no randomness. It must be quick."""

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        """At most `most` tokens that may follow those of `req` that are known and `num_pending` (0 or 1) more that are
        sampled by a step in flight. What it raises switches it off for the request."""


class Lookup:
    """What followed a request's last tokens when they came before ("prompt lookup"): of the places where most of them
    did, the last. A draft is shorter than what came again: a few tokens say little of the next ones. A search looks at
    all tokens, at some gigabytes per second; there is one where the last two came before."""

    def __init__(self, req: Req) -> None:
        size = len(req.prefix)
        self._ids, self._size = np.empty(2 * len(req.tokens) + 64, np.int32), max(1, size - 1)
        self._ids[:size] = req.prefix  # which are the first of its tokens, as an array already
        first = req.prefix[: self._size].astype(np.int64)
        self._pairs = dict.fromkeys((first[:-1] << 32 | first[1:]).tolist())
        self._repeats = False  # whether the last two came before

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        ids = self._take_in(req.tokens)
        ends, length = find_repeated(ids, ids[:-1]) if self._repeats else ((), 0)
        return ids[ends[-1] + num_pending : ends[-1] + min(num_pending + most, length - 1)].tolist() if length else ()

    def _take_in(self, tokens: list[int]) -> TokenIds:
        """All of them as an array, which has room for more."""
        known, pairs = self._size, self._pairs
        self._size = size = len(tokens)
        if size > len(self._ids):
            self._ids = np.concatenate((self._ids[:known], np.empty(size, np.int32)))
        self._ids[known:size] = tokens[known:]
        for i in range(known, size):
            pair = tokens[i - 1] << 32 | tokens[i]
            self._repeats = pair in pairs
            pairs[pair] = None
        return self._ids[:size]


class Prediction:
    """What a client expects of a request (OpenAI's `prediction`). Where the output follows it, its next tokens are the
    draft. It is expected to begin with it; after a difference, the place is looked for from which the last tokens come:
    where most of them do, and the next one behind the last place."""

    def __init__(self, text: Sequence[int], num_seen: int) -> None:
        """num_seen: of a request's tokens so many come before the text."""
        self._text, self._place, self._num_seen = np.array(text, np.int32), 0, num_seen
        self._length = MAX_MATCH  # so many of the last tokens are before the place

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        new, place = req.tokens[self._num_seen :], self._place
        self._num_seen += len(new)
        self._place, self._length = place + len(new), self._length + len(new)
        if self._text[place : self._place].tolist() != new or not self._length:
            self._seek(req, place)
        num = min(num_pending + most, max(0, self._length - 1))
        return self._text[self._place + num_pending : self._place + num].tolist()

    def _seek(self, req: Req, place: int) -> None:
        """Find where the output goes on, which has left the text behind this place. Nowhere: a length of 0."""
        last = np.array(req.tokens[max(req.prompt_len, len(req.tokens) - MAX_MATCH) :], np.int32)
        ends, self._length = find_repeated(last, self._text)
        self._place = int(next((end for end in ends if end > place), ends[-1])) if self._length else place


class TreePath(Prediction):
    """What other requests of the namespace had behind the same tokens, as the prefix cache's tree has it: of several
    the newest. It holds no pages, and text that is evicted meanwhile is still a guess. Where it was wrong, drafts begin
    again with one token, so that other drafters have their turn."""

    def __init__(self, page_size: int) -> None:
        super().__init__((), 0)
        self._page_size, self._again = page_size, 0  # so many tokens are there to be before another search
        self._end: RadixNode | None = None  # where the text ends

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        super().propose(req, 0, 0)  # takes in what is new
        end = self._place + num_pending + most + 1  # so many tokens may be new when it is asked again
        while self._end and len(self._text) < end and (edge := self._child(self._end, req, self._text[:0])):
            self._text, self._end = np.concatenate((self._text, edge.key)), edge
        return super().propose(req, num_pending, most)

    def _seek(self, req: Req, place: int) -> None:  # noqa: ARG002
        """Go down from the request's handle; once for each eighth that the tokens behind it have become more."""
        self._length, self._text, self._place, self._end = 0, self._text[:0], 0, None
        if len(req.tokens) < self._again:
            return
        length, node = 1 if self._again else MAX_MATCH, req.handle
        rest = np.array(req.tokens[sum(len(one.key) for one in path_up(node)) :], np.int32)
        self._again = len(req.tokens) + len(rest) // 8 + 1
        while (edge := self._child(node, req, rest)) and np.array_equal(edge.key[: len(rest)], rest[: len(edge.key)]):
            if len(rest) < len(edge.key):
                self._text, self._place, self._end, self._length = edge.key, len(rest), edge, length
                break
            node, rest = edge, rest[len(edge.key) :]

    def _child(self, node: RadixNode, req: Req, rest: TokenIds) -> RadixNode | None:
        """The one that begins with these tokens, or with the first page of them; of several the newest."""
        size, namespace = self._page_size, b"" if node.parent else req.namespace
        first = rest[:size].tobytes()
        if len(rest) >= size:
            return node.children.get(first + namespace)
        newest = islice(reversed(node.children.items()), _MOST_CHILDREN)
        fitting = (one for name, one in newest if name.startswith(first) and name[size * rest.itemsize :] == namespace)
        return next(fitting, None)


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
