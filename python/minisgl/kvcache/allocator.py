"""The list of free KV pages."""

from __future__ import annotations


class PageAllocator:
    """Hands out page ids 0 … num_pages - 1. Freeing a page twice is caught by the planner's integrity check."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages; the caller has checked that there are as many."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        return pages

    def free(self, pages: list[int]) -> None:
        self._free += reversed(pages)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for integrity checks."""
        return list(self._free)
