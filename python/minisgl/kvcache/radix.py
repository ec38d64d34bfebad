"""A radix tree over token ids that shares KV pages between requests with a common prefix.

The idea is RadixAttention's (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024,
section 3), here at page granularity: an edge spells a whole number of pages, and children differ in their first page.

The cache owns pages; requests own the rest. A request holds one *handle*: a locked position in the tree whose path from
the root spells the request's first tokens. Locked paths are never evicted, so a request may keep pointing at the pages
that it found there. Where it computed a prefix that someone else cached at the same time, it keeps its own pages until
it ends: `path_pages` tells which of a request's pages are the cache's."""

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minisgl.errors import require
from minisgl.utils.math import align_down

TokenIds = npt.NDArray[np.int32]
# Pages that the cache has from now on: their tokens, the page before them, the namespace. Without tokens: no more.
Change = tuple[list[int], TokenIds | None, int | None, bytes]


class RadixNode:
    """An edge of the tree with the node at its end. `pages[i]` holds the KV of the i-th page of `key`.

    name: by which its parent has it. num_locks: requests whose handle is here or below. stamp: when it was last used,
    in ticks of the tree's own clock."""

    __slots__ = ("children", "key", "name", "num_locks", "pages", "parent", "stamp")  # no dataclass: dumps go too deep

    def __init__(self, name: bytes, key: TokenIds, pages: list[int], parent: "RadixNode | None", stamp: int) -> None:
        self.name, self.key, self.pages, self.parent, self.stamp = name, key, pages, parent, stamp
        self.children, self.num_locks = dict[bytes, RadixNode](), 0


class Match(NamedTuple):
    """The longest cached prefix, in whole pages; `handle` is not locked yet."""

    handle: RadixNode
    pages: list[int]


class PrefixCache:
    """Evicts unlocked leaves, least recently used first. Every operation is deterministic. Token counts are whole pages
    everywhere; trailing partial pages are ignored.

    namespace: a value that each request has once and for all; prefixes of one are not found in another. It is part of
    the names of the root's children, so that one in which nothing is cached costs nothing; all share the pages, and
    their eviction.
    keeps: without it nothing is kept, and so nothing is found."""

    def __init__(self, page_size: int, keeps: bool = True) -> None:
        self._page_size, self._keeps, self._clock = page_size, keeps, 0
        self._root = RadixNode(b"", np.empty(0, np.int32), [], None, 0)
        self._root.num_locks = 1
        self._num_pages = 0  # that the cache owns
        self.num_evictable = 0  # of those, what `evict` could give back now
        # Candidates for eviction: (stamp, serial, node); whether one was used, locked or has children is seen at pops.
        self.candidates: list[tuple[int, int, RadixNode]] = []
        self._serial = 0
        self.changes: deque[Change] = deque(maxlen=0)  # an observer may put a longer one here

    def match(self, namespace: bytes, token_ids: TokenIds) -> Match:
        self._clock += 1
        nodes = [self._root, *self._use(self._root, namespace, token_ids)]
        self._push(nodes[-1])
        return Match(nodes[-1], [page for node in nodes for page in node.pages])

    def match_len(self, namespace: bytes, token_ids: TokenIds) -> int:
        """Tokens that `match` would find, without touching anything."""
        return sum(shared for _, shared in self._walk(self._root, namespace, token_ids))

    def lock(self, handle: RadixNode) -> None:
        for node in path_up(handle):
            if node.num_locks == 0:
                self.num_evictable -= len(node.pages)
            node.num_locks += 1

    def unlock(self, handle: RadixNode) -> None:
        for node in path_up(handle):
            node.num_locks -= 1
            require(node.num_locks >= 0, "a handle was unlocked twice")
            if node.num_locks == 0:
                self.num_evictable += len(node.pages)
                self._push(node)

    def insert(self, namespace: bytes, handle: RadixNode, token_ids: TokenIds, pages: list[int]) -> RadixNode:
        """Move a request's lock to the end of all its whole pages, adding those that are not cached yet.

        `token_ids` and `pages` are the request's from its first token on; `handle` is its lock so far. Pages added
        become the cache's. Returns the new handle, locked in place of the old one."""
        position, end = sum(len(node.key) for node in path_up(handle)), align_down(len(token_ids), self._page_size)
        if end <= position or not self._keeps:
            return handle
        self._clock += 1
        node = handle
        for node in self._use(handle, namespace, token_ids[position:end]):
            position += len(node.key)
        if position < end:
            # A copy: the caller's array may be a view of something much longer.
            key = np.array(token_ids[position:end], np.int32)
            name, new = self._name(node, namespace, key), pages[position // self._page_size : end // self._page_size]
            leaf = RadixNode(name, key, new, node, self._clock)
            self.changes.append((new, key, node.pages[-1] if node.pages else None, namespace))
            node.children[name], node = leaf, leaf
            self._num_pages += len(new)
            self.num_evictable += len(new)
        self.lock(node)
        self.unlock(handle)
        return node

    def path_pages(self, handle: RadixNode) -> list[int]:
        """The cache's pages from the root to `handle`."""
        edges = [node.pages for node in path_up(handle)]
        return [page for pages in reversed(edges) for page in pages]

    def evict(self, count: int) -> list[int]:
        """Give up at least `count` pages if that many are evictable."""
        freed: list[int] = []
        while len(freed) < count and self.candidates:
            entry = heapq.heappop(self.candidates)
            if self._is_candidate(entry):
                freed += self._remove(entry[2])
        return freed

    def discard(self, handle: RadixNode) -> list[int]:
        """Give up what only this (unlocked) handle's path leads to: its KV must not be used again."""
        leaves = takewhile(self._is_evictable_leaf, [*path_up(handle)])  # a parent is one when its last child is gone
        return [page for leaf in leaves for page in self._remove(leaf)]

    def nodes(self) -> list[RadixNode]:
        """All of them, the root first; a little more than there can be where one is above itself."""
        nodes = [self._root]
        for node in nodes:  # they grow meanwhile
            nodes += node.children.values() if len(nodes) <= self._num_pages + 1 else ()
        return nodes

    def check(self, handles: Sequence[RadixNode]) -> list[int]:
        """Every page that the cache owns, by walking it. handles: all that are locked. Raises: IntegrityError."""
        candidates = {id(node) for stamp, _, node in self.candidates if stamp == node.stamp}
        nodes = self.nodes()
        require(len(nodes) <= self._num_pages + 1, "there are more nodes than pages in the cache")
        for node in nodes:
            require(len(node.key) == len(node.pages) * self._page_size, "an edge and its pages differ in length")
            require(node.num_locks or node.children or id(node) in candidates, "a node will never be evicted")
            for name, child in node.children.items():
                require(child.parent is node, "a child does not know its parent")
                first = self._first_page(child.key)
                fits = name.startswith(first) if node is self._root else name == first
                require(child.name == name and fits, "a child is filed under another name")
        known = {id(node) for node in nodes}
        require(all(id(handle) in known for handle in handles), "a request holds a node that is not in the cache")
        locks = Counter(id(node) for handle in (*handles, self._root) for node in path_up(handle))
        held = all(node.num_locks == locks[id(node)] for node in nodes)
        require(held, "a node is locked more or less than it is held")
        owned = [page for node in nodes for page in node.pages]
        require(len(owned) == self._num_pages, f"{len(owned)} pages in the cache, {self._num_pages} counted")
        evictable = sum(len(node.pages) for node in nodes if node.num_locks == 0)
        require(evictable == self.num_evictable, f"{evictable} evictable pages, {self.num_evictable} counted")
        return owned

    def spells(self, namespace: bytes, handle: RadixNode, token_ids: TokenIds) -> bool:
        """Whether the path to the handle is that of the first of these tokens."""
        *path, _ = path_up(handle)
        key = np.concatenate([node.key for node in reversed(path)] or [self._root.key])
        named = not path or path[-1].name == self._name(self._root, namespace, key)
        return named and np.array_equal(key, token_ids[: len(key)])

    def _first_page(self, token_ids: TokenIds) -> bytes:
        return token_ids[: self._page_size].tobytes()

    def _name(self, parent: RadixNode, namespace: bytes, token_ids: TokenIds) -> bytes:
        """The name of a child that begins so: its first page, below the root with the namespace; no child has b""."""
        first = self._first_page(token_ids)
        return first + namespace if first and parent is self._root else first

    def _walk(self, node: RadixNode, namespace: bytes, token_ids: TokenIds) -> Iterator[tuple[RadixNode, int]]:
        """The nodes below this one that spell these tokens, each with how many of its own do: all but of the last."""
        position, end, ends = 0, align_down(len(token_ids), self._page_size), False
        while not ends and (child := node.children.get(self._name(node, namespace, token_ids[position:end]))):
            shared = self._shared_len(child.key, token_ids[position:end])
            position, node, ends = position + shared, child, shared < len(child.key)
            yield child, shared

    def _use(self, node: RadixNode, namespace: bytes, token_ids: TokenIds) -> Iterator[RadixNode]:
        """The nodes below this one that spell these tokens and no others, used just now."""
        for child, shared in self._walk(node, namespace, token_ids):
            used = child if shared == len(child.key) else self._split(child, shared)
            used.stamp = self._clock
            yield used

    def _shared_len(self, a: TokenIds, b: TokenIds) -> int:
        length = min(len(a), len(b))
        differs = a[:length] != b[:length]
        first = int(differs.argmax())
        return align_down(first if differs[first] else length, self._page_size)

    def _split(self, node: RadixNode, length: int) -> RadixNode:
        """Cut the edge after `length` tokens. The lower half stays the same object, so handles keep their meaning."""
        parent = node.parent
        assert parent is not None
        num_pages = length // self._page_size
        upper = RadixNode(node.name, node.key[:length], node.pages[:num_pages], parent, node.stamp)
        upper.num_locks = node.num_locks
        parent.children[node.name] = upper
        node.key, node.pages, node.parent = node.key[length:], node.pages[num_pages:], upper
        node.name = self._first_page(node.key)
        upper.children[node.name] = node
        return upper

    def _is_candidate(self, entry: tuple[int, int, RadixNode]) -> bool:
        stamp, _, node = entry
        return stamp == node.stamp and self._is_evictable_leaf(node)

    def _is_evictable_leaf(self, node: RadixNode) -> bool:
        return node.num_locks == 0 and not node.children and node.parent is not None

    def _push(self, node: RadixNode) -> None:
        """Make it a candidate, if it can be evicted."""
        if not self._is_evictable_leaf(node):
            return
        if len(self.candidates) > 64 + 4 * self._num_pages:  # mostly stale: a popular prefix leaves one entry per use
            self.candidates = [entry for entry in self.candidates if self._is_candidate(entry)]
            heapq.heapify(self.candidates)
        self._serial += 1
        heapq.heappush(self.candidates, (node.stamp, self._serial, node))

    def _remove(self, leaf: RadixNode) -> list[int]:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.name]
        leaf.parent = None
        self.changes.append((leaf.pages, None, None, b""))
        self._num_pages -= len(leaf.pages)
        self.num_evictable -= len(leaf.pages)
        self._push(parent)
        return leaf.pages


def path_up(handle: RadixNode) -> Iterator[RadixNode]:
    """The nodes from here up to the root."""
    node: RadixNode | None = handle
    while node is not None:
        yield node
        node = node.parent
