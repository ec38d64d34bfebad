"""Which pages are free, and who has which of them and which row of the engine's tables."""

import numpy as np

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import PageUpdate, Req, StateCopy
from minisgl.kvcache.allocator import PageAllocator
from minisgl.kvcache.radix import Match, NaiveCache, PrefixCache, RadixNode, TokenIds
from minisgl.kvcache.windows import WindowPages
from minisgl.utils.math import div_ceil

ZEROS, SOON = -1, -2  # in place of a snapshot's slot: the state before any token; the next plan is to take one


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
        self.cache = NaiveCache(config.page_size) if is_naive else PrefixCache(config.page_size)
        self.updates: list[PageUpdate] = []
        self.states: list[StateCopy] = []
        self.slots = range(config.max_running_requests + 1, config.max_running_requests + 1 + config.num_snapshots)
        self.free_slots = [*self.slots]
        self.snapshots: dict[int, int] = {}  # slots, by the cached page before; the one used least recently first

    @property
    def num_free(self) -> int:
        """Pages to be had, cached ones that nobody uses included."""
        return self.allocator.num_free + self.cache.num_evictable

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
        self.allocator.free(self.forget(self.cache.evict(missing)))
        return True

    def flush_unused(self) -> int:
        """Forget what is cached and in use by no running request. Returns the number of pages freed."""
        pages = self.forget(self.cache.evict(self.cache.num_evictable))
        self.allocator.free(pages)
        return len(pages)

    def forget(self, pages: list[int]) -> list[int]:
        """Give up the snapshots after these pages, and what layers with windows have of them. → the pages"""
        self.windows.forget(pages)
        slots = [self.snapshots.pop(page, SOON) for page in pages] if self.snapshots else []
        self.free_slots += [slot for slot in slots if slot != SOON]
        return pages

    def match(self, namespace: bytes, token_ids: TokenIds) -> tuple[Match, int]:
        """The longest cached prefix that can be gone on from, and its snapshot's slot."""
        match, slot = self.cache.match(namespace, token_ids), ZEROS
        pages, num_found = match.pages, len(match.pages)
        if self.windows.window:
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
            self.states.append(StateCopy(req.row, slot))

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
        self.allocator.free(self.forget(self.private(req)))
        self.leave(req, req.handle)
        if req.failed:
            self.forget(self.cache.path_pages(req.handle))
            self.allocator.free(self.cache.discard(req.handle))
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
