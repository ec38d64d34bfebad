"""A radix tree over token ids that shares KV pages between requests with a common prefix.

The idea is RadixAttention's (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024,
section 3), here at page granularity: an edge spells a whole number of pages, and children differ in their first page.
"""

from __future__ import annotations

import heapq

import numpy as np

from minisgl.kvcache.base import Match, TokenIds
from minisgl.utils.math import align_down


class RadixNode:
    """An edge of the tree with the node at its end. `pages[i]` holds the KV of the i-th page of `key`.

    num_locks: requests whose handle is here or below. stamp: when it was last used, in ticks of the tree's own clock.
    """

    __slots__ = ("children", "key", "num_locks", "pages", "parent", "stamp")

    def __init__(self, key: TokenIds, pages: list[int], parent: RadixNode | None, stamp: int) -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.children: dict[bytes, RadixNode] = {}
        self.num_locks = 0
        self.stamp = stamp


class RadixCache:
    """A `PrefixCache`. Evicts unlocked leaves, least recently used first. Every operation is deterministic."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._clock = 0
        self._root = RadixNode(np.empty(0, np.int32), [], None, 0)
        self._root.num_locks = 1
        self._num_pages = 0
        self._num_evictable = 0
        # Candidates for eviction as (stamp, serial, node); entries go stale when the node is used, locked or gains
        # children, and are checked when popped.
        self._heap: list[tuple[int, int, RadixNode]] = []
        self._serial = 0

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_evictable(self) -> int:
        return self._num_evictable

    def match(self, token_ids: TokenIds) -> Match:
        node, pages = self._root, list[int]()
        position, end = 0, align_down(len(token_ids), self._page_size)
        self._clock += 1
        while position < end:
            child = node.children.get(self._child_key(token_ids, position))
            if child is None:
                break
            shared = self._shared_len(child.key, token_ids[position:end])
            if shared < len(child.key):
                child = self._split(child, shared)
            child.stamp = self._clock
            pages += child.pages
            position += shared
            node = child
        if node.num_locks == 0 and not node.children:
            self._push(node)
        return Match(node, pages)

    def match_len(self, token_ids: TokenIds) -> int:
        node, position = self._root, 0
        end = align_down(len(token_ids), self._page_size)
        while position < end:
            child = node.children.get(self._child_key(token_ids, position))
            if child is None:
                break
            shared = self._shared_len(child.key, token_ids[position:end])
            position += shared
            if shared < len(child.key):
                break
            node = child
        return position

    def lock(self, handle: RadixNode) -> None:
        node: RadixNode | None = handle
        while node is not None:
            if node.num_locks == 0:
                self._num_evictable -= len(node.pages)
            node.num_locks += 1
            node = node.parent

    def unlock(self, handle: RadixNode) -> None:
        node: RadixNode | None = handle
        while node is not None:
            node.num_locks -= 1
            assert node.num_locks >= 0, "a handle was unlocked twice"
            if node.num_locks == 0:
                self._num_evictable += len(node.pages)
                if not node.children:
                    self._push(node)
            node = node.parent

    def insert(self, handle: RadixNode, token_ids: TokenIds, pages: list[int]) -> RadixNode:
        end = align_down(len(token_ids), self._page_size)
        position = self._depth(handle)
        if end <= position:
            return handle
        self._clock += 1
        node = handle
        while position < end:
            child = node.children.get(self._child_key(token_ids, position))
            if child is None:
                # A copy: the caller's array may be a view of something much longer.
                key = np.array(token_ids[position:end], np.int32)
                first, last = position // self._page_size, end // self._page_size
                child = RadixNode(key, pages[first:last], node, self._clock)
                node.children[self._child_key(key, 0)] = child
                self._num_pages += last - first
                self._num_evictable += last - first
            else:
                shared = self._shared_len(child.key, token_ids[position:end])
                if shared < len(child.key):
                    child = self._split(child, shared)
                child.stamp = self._clock
            position += len(child.key)
            node = child
        self.lock(node)
        self.unlock(handle)
        return node

    def path_pages(self, handle: RadixNode) -> list[int]:
        edges: list[list[int]] = []
        node: RadixNode | None = handle
        while node is not None:
            edges.append(node.pages)
            node = node.parent
        return [page for pages in reversed(edges) for page in pages]

    def evict(self, count: int) -> list[int]:
        freed: list[int] = []
        while len(freed) < count and self._heap:
            entry = heapq.heappop(self._heap)
            if self._is_candidate(entry):
                freed += self._remove(entry[2])
        return freed

    def discard(self, handle: RadixNode) -> list[int]:
        freed: list[int] = []
        node = handle
        while self._is_evictable_leaf(node):
            parent = node.parent
            assert parent is not None
            freed += self._remove(node)
            node = parent
        return freed

    def owned_pages(self) -> list[int]:
        owned: list[int] = []
        evictable = 0
        stack = [self._root]
        while stack:
            node = stack.pop()
            assert len(node.key) == len(node.pages) * self._page_size, "an edge and its pages differ in length"
            assert node.num_locks >= max((child.num_locks for child in node.children.values()), default=0)
            for key, child in node.children.items():
                assert child.parent is node, "a child does not know its parent"
                assert key == self._child_key(child.key, 0), "a child is filed under another key"
                stack.append(child)
            owned += node.pages
            evictable += len(node.pages) if node.num_locks == 0 else 0
        assert len(owned) == self._num_pages, f"{len(owned)} pages in the tree, {self._num_pages} counted"
        assert evictable == self._num_evictable, f"{evictable} evictable, {self._num_evictable} counted"
        return owned

    def _child_key(self, token_ids: TokenIds, position: int) -> bytes:
        return token_ids[position : position + self._page_size].tobytes()

    def _shared_len(self, a: TokenIds, b: TokenIds) -> int:
        length = min(len(a), len(b))
        differs = a[:length] != b[:length]
        first = int(differs.argmax()) if length else 0
        shared = first if length and differs[first] else length
        return align_down(shared, self._page_size)

    def _depth(self, handle: RadixNode) -> int:
        depth = 0
        node: RadixNode | None = handle
        while node is not None:
            depth += len(node.key)
            node = node.parent
        return depth

    def _split(self, node: RadixNode, length: int) -> RadixNode:
        """Cut the edge after `length` tokens. The lower half stays the same object, so handles keep their meaning."""
        parent = node.parent
        assert parent is not None
        num_pages = length // self._page_size
        upper = RadixNode(node.key[:length], node.pages[:num_pages], parent, node.stamp)
        upper.num_locks = node.num_locks
        parent.children[self._child_key(node.key, 0)] = upper
        node.key, node.pages, node.parent = node.key[length:], node.pages[num_pages:], upper
        upper.children[self._child_key(node.key, 0)] = node
        return upper

    def _is_candidate(self, entry: tuple[int, int, RadixNode]) -> bool:
        stamp, _, node = entry
        return stamp == node.stamp and self._is_evictable_leaf(node)

    def _is_evictable_leaf(self, node: RadixNode) -> bool:
        return node.num_locks == 0 and not node.children and node.parent is not None

    def _push(self, node: RadixNode) -> None:
        if node.parent is None:
            return
        if len(self._heap) > 64 + 4 * self._num_pages:  # mostly stale: a popular prefix leaves one entry per use
            self._heap = [entry for entry in self._heap if self._is_candidate(entry)]
            heapq.heapify(self._heap)
        self._serial += 1
        heapq.heappush(self._heap, (node.stamp, self._serial, node))

    def _remove(self, leaf: RadixNode) -> list[int]:
        parent = leaf.parent
        assert parent is not None
        del parent.children[self._child_key(leaf.key, 0)]
        leaf.parent = None
        self._num_pages -= len(leaf.pages)
        self._num_evictable -= len(leaf.pages)
        if self._is_evictable_leaf(parent):
            self._push(parent)
        return leaf.pages
