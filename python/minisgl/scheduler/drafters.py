"""Where drafts come from: guesses of a request's next tokens, which the next step verifies."""

from collections.abc import Sequence
from itertools import islice, pairwise, takewhile
from operator import eq
from typing import Protocol

import numpy as np

from minisgl.core import Req
from minisgl.kvcache.radix import RadixNode, TokenIds, path_up

MIN_MATCH, MAX_MATCH = 2, 16  # tokens that have to come again, and how many are looked at
QUOTED = 8  # tokens: who has repeated so many goes on to quote; and how far behind its place one token is looked for
_MOST_PLACES, _MOST_CHILDREN = 1024, 32  # that are looked at: of the last tokens; of a node's, for less than a page


class Drafter(Protocol):
    """A function of the calls made, the same on every rank: no clock, no randomness. It must be quick."""

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        """Guess up to `most` tokens behind those known and `num_pending` (0, 1) in flight. An error switches it off."""


class Prediction:
    """Follows a text that a client expects behind a request's first `num_seen` tokens (OpenAI's `prediction`). After a
    difference, it goes on where most of the last tokens come again; right behind the last place one is enough."""

    def __init__(self, text: Sequence[int] | TokenIds, num_seen: int) -> None:
        self._text, self._place, self._begin, self._num_seen = np.array(text, np.int32), 0, num_seen, num_seen
        self._length = self.longest = MAX_MATCH  # so many of the last tokens are before the place; the most so far
        self._repeats = True  # whether it may be that the last two are in the text

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        new, self._num_seen = req.tokens[self._num_seen :], len(req.tokens)
        num = int(sum(takewhile(bool, map(eq, new, self._text[self._place :])))) if self._length else -1
        self._place, self._length = self._place + max(0, num), self._length + num if num == len(new) else 0
        if not self._length and (self._repeats or self.longest >= QUOTED):
            self._seek(req)
        self.longest = max(self.longest, self._length)
        num = min(most, most if self.longest >= QUOTED else 2 * self._length - 3 - num_pending) if self._length else 0
        return self._text[self._place + num_pending :][:num].tolist() if num > 0 else []

    def _seek(self, req: Req) -> None:
        """Find the place at which the text goes on as the output, which has left it. There is none: a length of 0."""
        num = MAX_MATCH if self._repeats else 1
        last = np.array(req.tokens[max(self._begin, len(req.tokens) - num) :], np.int32)
        behind = self._place if self.longest >= QUOTED else len(self._text)
        ends, self._length = find_repeated(last, self._text, behind)
        self._place = next((end for end in ends if end > behind), ends[-1]) if ends else self._place


class Lookup(Prediction):
    """What followed a request's last tokens when they came before ("prompt lookup"): the longest match, of these the
    newest. Drafts grow with it, from one token on; after a match of `QUOTED` tokens the text is a prediction."""

    def __init__(self, req: Req) -> None:
        super().__init__(first := req.prefix[: max(1, len(req.prefix) - 1)], len(first))  # of its tokens
        self._begin = self._length = self.longest = 0
        self._ids, self._pairs = self._text, {*(first[:-1].astype(np.int64) << 32 | first[1:]).tolist()}

    def propose(self, req: Req, num_pending: int, most: int) -> Sequence[int]:
        begin, num = self._num_seen, len(req.tokens)
        self._ids = self._ids if num <= len(self._ids) else np.resize(self._ids, 2 * num)
        self._ids[begin:num], self._text = req.tokens[begin:], self._ids[:num]
        for pair in (a << 32 | b for a, b in pairwise(req.tokens[begin - 1 :])):
            self._repeats = pair in self._pairs
            self._pairs.add(pair)
        return super().propose(req, num_pending, most)


class TreePath(Prediction):
    """What other requests of the namespace had behind the same tokens, as the prefix tree has it: of several the
    newest. It holds no pages, and evicted text is still a guess. After a wrong one, drafts begin with one token."""

    def __init__(self, page_size: int) -> None:
        super().__init__((), 0)
        self._page_size, self._again = page_size, 0  # how many tokens there have to be for another search

    def _seek(self, req: Req) -> None:
        """Go down from the request's handle; once for each eighth that the tokens behind it have become more."""
        self._length = self.longest = 1 if self._again else MAX_MATCH
        self._text, self._place = self._text[:0], 0
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
        first, namespace = rest[: self._page_size].tobytes(), b"" if node.parent else req.namespace
        if len(first) == (size := self._page_size * rest.itemsize):
            return node.children.get(first + namespace)
        last = islice(reversed(node.children.items()), _MOST_CHILDREN)
        return next((x for key, x in last if key.startswith(first) and key[size:] == namespace), None)


def find_repeated(ids: TokenIds, text: TokenIds, near: int) -> tuple[Sequence[int], int]:
    """The longest suffix of `ids` (not empty) in `text`, before its end → the positions behind it, ascending, and its
    length, up to `MAX_MATCH`. One token counts only up to `QUOTED` behind `near`. [], 0: there is none."""
    if len(ids) >= MIN_MATCH:
        ends, back = np.flatnonzero(text[:-1] == ids[-1]) + 1, np.arange(1, min(MAX_MATCH, len(ids)) + 1)
        places = ends[(ends > 1) & (text[ends - 2] == ids[-2])][-_MOST_PLACES:, None]
        same = (places >= back) & (text[np.maximum(places - back, 0)] == ids[-back])
        if (longest := int((lengths := same.cumprod(1).sum(1)).max(initial=0))) >= MIN_MATCH:
            return places[lengths == longest, 0].tolist(), longest
    ends = np.flatnonzero(text[near : min(near + QUOTED, len(text) - 1)] == ids[-1]) + near + 1
    return ends.tolist(), len(ends[:1])
