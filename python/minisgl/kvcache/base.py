"""What the planner asks of a prefix cache.

A cache owns pages; requests own the rest. A request holds one *handle*: a locked position in the cache whose path from
the root spells the request's first tokens. Locked paths are never evicted, so a request may keep pointing at the pages
that it found there. Where it computed a prefix that someone else cached at the same time, it keeps its own pages until
it ends: `path_pages` tells which of a request's pages are the cache's.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]


class Match(NamedTuple):
    """The longest cached prefix, in whole pages; `handle` is not locked yet."""

    handle: Any
    pages: list[int]


class PrefixCache(Protocol):
    """Token counts are whole pages everywhere; trailing partial pages are ignored."""

    @property
    def num_pages(self) -> int:
        """Pages that the cache owns."""
        ...

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` could give back now."""
        ...

    def match(self, token_ids: TokenIds) -> Match: ...

    def match_len(self, token_ids: TokenIds) -> int:
        """Tokens that `match` would find, without touching anything."""
        ...

    def lock(self, handle: Any) -> None: ...

    def unlock(self, handle: Any) -> None: ...

    def insert(self, handle: Any, token_ids: TokenIds, pages: list[int]) -> Any:
        """Move a request's lock to the end of all its whole pages, adding those that are not cached yet.

        `token_ids` and `pages` are the request's from its first token on; `handle` is its lock so far. Pages added
        become the cache's. Returns the new handle, locked in place of the old one.
        """
        ...

    def path_pages(self, handle: Any) -> list[int]:
        """The cache's pages from the root to `handle`."""
        ...

    def evict(self, count: int) -> list[int]:
        """Give up at least `count` pages if that many are evictable, least recently used first."""
        ...

    def discard(self, handle: Any) -> list[int]:
        """Give up what only this (unlocked) handle's path leads to: its KV must not be used again."""
        ...

    def owned_pages(self) -> list[int]:
        """Every page that the cache owns, by walking it. Raises: AssertionError if the structure is broken."""
        ...
