"""Pages of layers whose windows slide: fewer than of the others, so each is lent to a page of these while it is needed,
and as long after that as there is room. They have the same tokens, and a request's page tables the same places.
"""

from collections.abc import Iterable, Sequence

from minisgl.errors import require
from minisgl.kvcache.allocator import PageAllocator
from minisgl.utils.math import align_down


class WindowPages:
    """Which of them are lent to which pages, and how many running requests need each.

    window: tokens that a position sees, itself included; 0: there are no such layers, and no such pages.
    """

    def __init__(self, num_pages: int, page_size: int, window: int) -> None:
        self.window, self._page_size = window, page_size
        self.allocator = PageAllocator(num_pages)
        self.lent: dict[int, int] = {}  # by page
        self.pages = [-1] * num_pages  # that have them; -1: none has
        self.num_users = [0] * num_pages
        self.unused: dict[int, None] = {}  # that are lent, and needed by no request; the one used least recently first

    @property
    def num_free(self) -> int:
        """Those to be had, unused ones included."""
        return self.allocator.num_free + len(self.unused)

    def first(self, position: int) -> int:
        """The first of a sequence's pages that are kept for this position, and to begin its page anew."""
        return max(0, align_down(position, self._page_size) - self.window + 1) // self._page_size

    def alive(self, pages: Sequence[int]) -> int:
        """How many of a sequence's pages can be gone on from: the most whose last position's window is there."""
        end = at = len(pages)
        while at > self.first(end * self._page_size):
            at -= 1
            end = end if pages[at] in self.lent else at
        return end

    def hold(self, pages: Sequence[int]) -> list[int]:
        """What a request needs from now on for these pages: what is lent to them, or new ones."""
        new = [page for page in pages if page not in self.lent]
        for _ in range(len(new) - self.allocator.num_free):
            self._take_back(self.pages[next(iter(self.unused))])
        for page, window_page in zip(new, self.allocator.allocate(len(new)), strict=True):
            self.lent[page], self.pages[window_page] = window_page, page
        held = [self.lent[page] for page in pages]
        for window_page in held:
            self.num_users[window_page] += 1
            self.unused.pop(window_page, None)
        return held

    def leave(self, held: Iterable[int]) -> None:
        """A request does not need these any more."""
        for window_page in held:
            self.num_users[window_page] -= 1
            if not self.num_users[window_page] and self.pages[window_page] >= 0:
                self.unused[window_page] = None
            elif not self.num_users[window_page]:
                self.allocator.free([window_page])

    def forget(self, pages: Iterable[int]) -> None:
        """These pages have other tokens from now on, or what is wrong."""
        for page in pages:
            if page in self.lent:
                self._take_back(page)

    def pass_on(self, pages: Iterable[int], same: Iterable[int]) -> None:
        """What is lent to pages becomes that of others, of the same tokens in their order, which have none."""
        for page, other in zip(pages, same, strict=False):
            if page != other and other not in self.lent and page in self.lent:
                self.lent[other] = window_page = self.lent.pop(page)
                self.pages[window_page] = other

    def check(self, held: Iterable[int], free_pages: Iterable[int]) -> None:
        """held: by requests; free_pages: that nothing is lent to. Raises: IntegrityError."""
        num_users, free = [0] * len(self.pages), self.allocator.check()
        for window_page in held:
            num_users[window_page] += 1
        require(num_users == self.num_users, "pages of windows are needed by other requests")
        lent = {window_page: page for page, window_page in self.lent.items()}
        require(self.pages == [lent.get(i, -1) for i in range(len(self.pages))], "pages of windows are lent twice")
        unused = {i for i in lent if not num_users[i]}
        require(unused == self.unused.keys() and self.lent.keys().isdisjoint(free_pages), "unused ones are others")
        lost = {i for i in range(len(self.pages)) if not num_users[i] and i not in lent}
        require(lost == {*free}, "pages of windows are lost, or free and in use")

    def _take_back(self, page: int) -> None:
        window_page = self.lent.pop(page)
        self.pages[window_page] = -1
        if not self.num_users[window_page]:
            del self.unused[window_page]
            self.allocator.free([window_page])
