"""No prefix cache: nothing is found, nothing is kept (`--cache-type naive`)."""

from __future__ import annotations

from minisgl.kvcache.base import Match, TokenIds


class NaiveCache:
    """A `PrefixCache` that owns no page."""

    num_pages = 0
    num_evictable = 0

    def match(self, token_ids: TokenIds) -> Match:  # noqa: ARG002
        return Match(None, [])

    def match_len(self, token_ids: TokenIds) -> int:  # noqa: ARG002
        return 0

    def lock(self, handle: None) -> None:
        pass

    def unlock(self, handle: None) -> None:
        pass

    def insert(self, handle: None, token_ids: TokenIds, pages: list[int]) -> None:
        pass

    def path_pages(self, handle: None) -> list[int]:  # noqa: ARG002
        return []

    def evict(self, count: int) -> list[int]:  # noqa: ARG002
        return []

    def discard(self, handle: None) -> list[int]:  # noqa: ARG002
        return []

    def owned_pages(self) -> list[int]:
        return []
