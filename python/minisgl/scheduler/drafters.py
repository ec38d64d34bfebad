"""Where drafts come from: guesses of a request's next tokens, which the next step verifies."""

from array import array
from collections.abc import Sequence
from itertools import islice, pairwise
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
        """At most `most` ids behind those known and `num_pending` (0, 1) in flight. What it raises switches it off."""


class Lookup:
    """What followed a request's last tokens when they came before ("prompt lookup"): of the places where most of them
    did, the last. A draft is shorter than what came again. All tokens are searched where the last two came before."""

    def __init__(self, req: Req) -> None:
        first = req.prefix[: max(1, len(req.prefix) - 1)].astype(np.int64)  # of its tokens
        self._ids = array("i", first.astype(np.int32).tobytes())
        self._pairs, self._repeats = {*(first[:-1] << 32 | first[1:]).tolist()}, False  # whether the last two are in it

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        self._ids.extend(new := req.tokens[len(self._ids) :])
        for pair in (a << 32 | b for a, b in pairwise(self._ids[-len(new) - 1 :])):
            self._repeats = pair in self._pairs
            self._pairs.add(pair)
        ids = np.frombuffer(self._ids, np.int32)
        ends, length = find_repeated(ids, ids[:-1]) if self._repeats else ((), 0)
        return ids[ends[-1] + num_pending : ends[-1] + min(num_pending + most, length - 1)].tolist() if length else ()


class Prediction:
    """What a client expects behind a request's first `num_seen` tokens (OpenAI's `prediction`). After a difference, the
    place is looked for where most of the last tokens are, next behind the last place."""

    def __init__(self, text: Sequence[int], num_seen: int) -> None:
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
    """What other requests of the namespace had behind the same tokens, as the prefix tree has it: of several the
    newest. It holds no pages, and evicted text is still a guess. Where it was wrong, drafts begin with one token."""

    def __init__(self, page_size: int) -> None:
        super().__init__((), 0)
        self._page_size, self._again = page_size, 0  # so many tokens are there to be before another search

    def _seek(self, req: Req, place: int) -> None:  # noqa: ARG002
        """Go down from the request's handle; once for each eighth that the tokens behind it have become more."""
        self._length, self._text, self._place = 1 if self._again else MAX_MATCH, self._text[:0], 0
        if len(req.tokens) < self._again:
            return
        node, behind = req.handle, [self._text]
        rest = np.array(req.tokens[sum(len(one.key) for one in path_up(node)) :], np.int32)
        self._again = len(req.tokens) + len(rest) // 8 + 1
        while (edge := self._child(node, req, rest)) and np.array_equal(edge.key[: len(rest)], rest[: len(edge.key)]):
            behind.append(edge.key[len(rest) :])
            node, rest = edge, rest[len(edge.key) :]
        self._text = np.concatenate(behind)

    def _child(self, node: RadixNode, req: Req, rest: TokenIds) -> RadixNode | None:
        """The one that begins with these tokens, or with the first page of them; of several the newest."""
        size, namespace = self._page_size, b"" if node.parent else req.namespace
        first = rest[:size].tobytes()
        if len(rest) >= size:
            return node.children.get(first + namespace)
        last = islice(reversed(node.children.items()), _MOST_CHILDREN)
        return next((x for key, x in last if key.startswith(first) and key[size * rest.itemsize :] == namespace), None)


def find_repeated(ids: TokenIds, text: TokenIds) -> tuple[Sequence[int], int]:
    """Where a text has the longest end of `ids`: ends, ascending, and its length, up to `MAX_MATCH`; (), 0: none."""
    if min(len(ids), len(text)) < MIN_MATCH:
        return (), 0
    ends, longest = np.flatnonzero((text[1:] == ids[-1]) & (text[:-1] == ids[-2]))[-_MOST_PLACES:] + MIN_MATCH, 0
    for length in range(MIN_MATCH, min(MAX_MATCH, len(ids)) + 1):
        places = ends[ends >= length]
        if not len(places := places[text[places - length] == ids[-length]]):
            break
        ends, longest = places, length
    return ends.tolist() if longest else (), longest
