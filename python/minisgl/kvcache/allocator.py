"""Which of some pages are free."""

from minisgl.errors import IntegrityError, require


class PageAllocator:
    """Hands out page ids 0 … num_pages - 1. One that is freed twice, or handed out twice, is an IntegrityError."""

    def __init__(self, num_pages: int) -> None:
        self.free_list = list(range(num_pages - 1, -1, -1))
        self.flags = bytearray(b"\1") * num_pages

    @property
    def num_free(self) -> int:
        return len(self.free_list)

    def allocate(self, count: int) -> list[int]:
        """`count` pages; the caller has checked that there are as many."""
        require(0 <= count <= len(self.free_list), f"{count} pages wanted, {len(self.free_list)} free")
        pages = [self.free_list.pop() for _ in range(count)]
        self._mark(pages, 0)
        return pages

    def free(self, pages: list[int]) -> None:
        self._mark(pages, 1)
        self.free_list += reversed(pages)

    def check(self) -> list[int]:
        """The free pages. Raises: IntegrityError when their flags say otherwise."""
        fits = sum(self.flags) == len(self.free_list) and all(map(self.flags.__getitem__, self.free_list))
        require(fits, "wrong flags")
        return list(self.free_list)

    def _mark(self, pages: list[int], is_free: int) -> None:
        flags, end = self.flags, len(self.flags)
        for page in pages:
            if not 0 <= page < end or flags[page] == is_free:
                raise IntegrityError(f"page {page} is {'freed' if is_free else 'handed out'} twice, or there is none")
            flags[page] = is_free
