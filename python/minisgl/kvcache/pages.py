"""Which pages are free, and who has which of them and which row of the engine's tables."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import PageUpdate, Req, StateCopy
from minisgl.errors import IntegrityError, require
from minisgl.kvcache.radix import Match, PrefixCache, RadixNode, TokenIds
from minisgl.utils.math import align_down, div_ceil

ZEROS, SOON = -1, -2  # in place of a snapshot's slot: the state before any token; the next plan is to take one


class PageAllocator:
    """Hands out page ids 0 … num_pages - 1. One that is freed twice, or handed out twice, is an IntegrityError."""

    def __init__(self, num_pages: int) -> None:
        self.free_list, self.flags = list(range(num_pages - 1, -1, -1)), bytearray(b"\1") * num_pages

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


class WindowPages:
    """Pages of layers whose windows slide: fewer than of the others, so each is lent to a page of these, with the same
    tokens, while a running request needs it, and as long after that as there is room.

    window: tokens that a position sees, itself included; 0: there are no such layers, and no such pages."""

    def __init__(self, num_pages: int, page_size: int, window: int) -> None:
        self.window, self._page_size, self.allocator = window, page_size, PageAllocator(num_pages)
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
            self.forget([self.pages[next(iter(self.unused))]])
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
            if (window_page := self.lent.pop(page, -1)) >= 0:
                self.pages[window_page] = -1
                if not self.num_users[window_page]:
                    del self.unused[window_page]
                    self.allocator.free([window_page])

    def pass_on(self, pages: Iterable[int], same: Iterable[int]) -> None:
        """What is lent to pages becomes that of others, of the same tokens in their order, which have none."""
        for page, other in zip(pages, same, strict=False):
            if page != other and other not in self.lent and page in self.lent:
                self.lent[other] = window_page = self.lent.pop(page)
                self.pages[window_page] = other

    def check(self, held: Iterable[int], free_pages: Iterable[int]) -> None:
        """held: by requests; free_pages: that nothing is lent to. Raises: IntegrityError."""
        users, lent, free = Counter(held), {one: page for page, one in self.lent.items()}, {*self.allocator.check()}
        for i, (page, count) in enumerate(zip(self.pages, self.num_users, strict=True)):
            fits = page == lent.get(i, -1) and count == users[i] and (i in self.unused) == (page >= 0 and not count)
            require(fits and (i in free) == (page < 0 and not count), f"page {i} of windows is lost, or used twice")
        require(self.lent.keys().isdisjoint(free_pages), "pages of windows are lent to free ones")


class Pages:
    """Owns all rows, all page ids and the prefix cache. updates, states: what the next plan is to tell. slots:
    of snapshots of states; if there are any, a cached prefix is of use only up to one. windows: of layers whose windows
    slide; if there are any, it is of use only up to where the window before has its pages."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.page_size = config.page_size
        self.rows = list(range(config.max_running_requests - 1, -1, -1))  # that are free
        self.allocator = PageAllocator(config.num_pages)
        self.windows = WindowPages(config.num_window_pages, config.page_size, config.window)
        is_naive = config.cache_type == "naive" or (config.has_states and not config.num_snapshots)
        self.cache = PrefixCache(config.page_size, keeps=not is_naive)
        self.updates: list[PageUpdate] = []
        self.states: list[StateCopy] = []
        self.slots = range(config.max_running_requests + 1, config.max_running_requests + 1 + config.num_snapshots)
        self.free_slots = [*self.slots]
        self.accepted: dict[int, int] = {}  # by slot: accepted draft tokens, which its state is still to take in
        self.snapshots: dict[int, int] = {}  # slots, by the cached page before; the one used least recently first

    @property
    def num_free(self) -> int:
        """Pages to be had, cached ones that nobody uses included."""
        return self.allocator.num_free + self.cache.num_evictable

    @property
    def num_used(self) -> int:
        """Pages that are not to be had; as great a share of them as is used of those of windows, if that is greater."""
        num, near = len(self.allocator.flags), self.windows
        return num - min(self.num_free, near.num_free * num // len(near.pages) if near.window else num)

    def missing(self, count: int, num_new: int) -> int:
        """How many pages are too few for `count`, where a request that has `num_new` of them computed at a time and
        others are to grow: those behind its window it gives back."""
        if not self.windows.window:
            return count - self.num_free
        near = num_new + div_ceil(self.windows.window, self.page_size) + 1
        return max(count - self.num_free, min(count, near) - self.windows.num_free)

    def make_room(self, count: int) -> bool:
        """Whether `count` pages are free, evicting cached ones where needed."""
        missing = count - self.allocator.num_free
        if missing > self.cache.num_evictable or (self.windows.window and count > self.windows.num_free):
            return False
        self.take_back(self.cache.evict(missing))
        return True

    def flush_unused(self) -> int:
        """Forget what is cached and in use by no running request. Returns the number of pages freed."""
        self.take_back(pages := self.cache.evict(self.cache.num_evictable))
        return len(pages)

    def take_back(self, pages: list[int]) -> None:
        """They are free, with what layers with windows have of them."""
        self.windows.forget(pages)
        self.forget(pages)
        self.allocator.free(pages)

    def forget(self, pages: list[int]) -> None:
        """Give up the snapshots after these pages."""
        slots = [self.snapshots.pop(page, SOON) for page in pages] if self.snapshots else []
        self.free_slots += [slot for slot in slots if slot != SOON]

    def match(self, namespace: bytes, token_ids: TokenIds) -> tuple[Match, int]:
        """The longest cached prefix that can be gone on from, and its snapshot's slot."""
        match, slot = self.cache.match(namespace, token_ids), ZEROS
        pages, num_found, num_left = match.pages, len(match.pages), -1
        while num_left != len(pages):  # what ends at an earlier snapshot has an earlier window
            num_left = len(pages)
            del pages[self.windows.alive(pages) :]
            while self.slots and pages and pages[-1] not in self.snapshots:
                pages.pop()
        if len(pages) < num_found:
            match = self.cache.match(namespace, token_ids[: len(pages) * self.page_size])
        if self.slots and pages:
            slot = self.snapshots[pages[-1]] = self.snapshots.pop(pages[-1])
        return match, slot

    def hold(self, req: Req, match: Match) -> None:
        """Keep a waiting request's match from being given to others: it begins, or there is `leave`."""
        self.cache.lock(match.handle)
        if self.windows.window:
            req.num_behind = self.windows.first(len(match.pages) * self.page_size)
            req.window_pages = [0] * req.num_behind + self.windows.hold(match.pages[req.num_behind :])

    def leave(self, req: Req, handle: RadixNode) -> None:
        """A request holds on to nothing any more."""
        self.cache.unlock(handle)
        self.windows.leave(req.window_pages[req.num_behind :])
        req.window_pages, req.num_behind = [], 0

    def advance(self, req: Req, position: int) -> None:
        """A request will compute nothing before this position again."""
        if (first := self.windows.first(position)) > req.num_behind:
            self.windows.leave(req.window_pages[req.num_behind : first])
            req.num_behind = first

    def share(self, req: Req, end: int) -> None:
        """From now on, even within this step, others find a request's first `end` tokens, or wait for the snapshot."""
        self._insert(req, req.prefix[:end])
        req.num_saved = end
        if self.slots:
            self.snapshots.setdefault(req.handle.pages[-1], SOON)

    def save(self, req: Req) -> None:
        """Have the next plan make a snapshot of a request's state, which is that at its handle's end."""
        slot: int | None = self.snapshots.pop(page := req.handle.pages[-1], SOON)
        if (slot := self.take_slot() if slot == SOON else slot) is not None:
            self.snapshots[page] = slot
            self.copy_state(req.row, slot)

    def copy_state(self, source: int, target: int) -> None:
        """Have the next plan make the state in a slot that of another one, or zeros."""
        self.states.append(StateCopy(source, target))
        self.accepted[target] = self.accepted.get(source, 0)

    def take_slot(self) -> int | None:
        """One that is free, or that of the snapshot used least recently; None: all are in use."""
        if not self.free_slots:
            self.forget([page for page, slot in self.snapshots.items() if slot != SOON][:1])
        return self.free_slots.pop() if self.free_slots else None

    def give(self, req: Req, pages: list[int]) -> None:
        """A request's next pages: found when it was to begin, or new ones."""
        if pages:
            begin = len(req.pages)
            if self.windows.window and len(req.window_pages) == begin:
                req.window_pages += self.windows.hold(pages)
            self.updates.append(PageUpdate(req.row, begin, tuple(pages), tuple(req.window_pages[begin:])))
            req.pages += pages

    def release(self, req: Req) -> None:
        """Take back the row and the pages of a request that no step in flight touches."""
        if not req.failed:
            # A step planned before the request's end was known may have computed tokens whose ids were dropped.
            known = min(req.num_computed, len(req.tokens))
            self._insert(req, np.asarray(req.tokens[:known], np.int32))
            if self.slots and 0 < known == req.num_computed and known % self.page_size == 0 <= req.num_saved:
                self.save(req)
        self.take_back(self.private(req))
        self.leave(req, req.handle)
        if req.failed:
            self.windows.forget(path := self.cache.path_pages(req.handle))
            self.forget(path)
            self.take_back(self.cache.discard(req.handle))
        self.rows.append(req.row)
        req.handle, req.pages, req.row, req.num_computed, req.num_saved = None, [], -1, 0, 0

    def _insert(self, req: Req, token_ids: TokenIds) -> None:
        """Cache a request's first tokens. Of what was there, it makes good what windows have lost."""
        req.handle = self.cache.insert(req.namespace, req.handle, token_ids, req.pages)
        if self.windows.window:
            self.windows.pass_on(req.pages, self.cache.path_pages(req.handle))

    def private(self, req: Req) -> list[int]:
        """The request's pages that the cache does not own: not full, or computed twice at the same time."""
        cached = self.cache.path_pages(req.handle)
        return [page for i, page in enumerate(req.pages) if i >= len(cached) or page != cached[i]]
