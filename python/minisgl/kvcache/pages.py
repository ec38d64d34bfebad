"""Which pages are free, and who has which of them and which row of the engine's tables."""

import numpy as np

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import PageUpdate, Req, StateCopy
from minisgl.errors import IntegrityError, require
from minisgl.kvcache.radix import Match, NaiveCache, PrefixCache, TokenIds

ZEROS, SOON = -1, -2  # in place of a snapshot's slot: the state before any token; the next plan is to take one


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


class Pages:
    """Owns all rows, all page ids and the prefix cache. updates, states: what the next plan is to tell. slots:
    of snapshots of states; if there are any, a cached prefix is of use only up to one."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.page_size = config.page_size
        self.rows = list(range(config.max_running_requests - 1, -1, -1))  # that are free
        self.allocator = PageAllocator(config.num_pages)
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

    def make_room(self, count: int) -> bool:
        """Whether `count` pages are free, evicting cached ones where needed."""
        missing = count - self.allocator.num_free
        if missing > self.cache.num_evictable:
            return False
        self.allocator.free(self.forget(self.cache.evict(missing)))
        return True

    def flush_unused(self) -> int:
        """Forget what is cached and in use by no running request. Returns the number of pages freed."""
        pages = self.forget(self.cache.evict(self.cache.num_evictable))
        self.allocator.free(pages)
        return len(pages)

    def forget(self, pages: list[int]) -> list[int]:
        """Give up the snapshots after these pages, which are returned."""
        slots = [self.snapshots.pop(page, SOON) for page in pages] if self.snapshots else []
        self.free_slots += [slot for slot in slots if slot != SOON]
        return pages

    def match(self, namespace: bytes, token_ids: TokenIds) -> tuple[Match, int]:
        """The longest cached prefix that can be gone on from, and its snapshot's slot."""
        match, slot = self.cache.match(namespace, token_ids), ZEROS
        if self.slots:
            while (pages := match.pages) and pages[-1] not in self.snapshots:
                pages.pop()
            match = self.cache.match(namespace, token_ids[: len(pages) * self.page_size])
            if pages:
                slot = self.snapshots[pages[-1]] = self.snapshots.pop(pages[-1])
        return match, slot

    def share(self, req: Req, end: int) -> None:
        """From now on, even within this step, others find a request's first `end` tokens, or wait for the snapshot."""
        req.handle, req.num_saved = self.cache.insert(req.namespace, req.handle, req.prefix[:end], req.pages), end
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
        if pages:
            self.updates.append(PageUpdate(req.row, len(req.pages), tuple(pages)))
            req.pages += pages

    def release(self, req: Req) -> None:
        """Take back the row and the pages of a request that no step in flight touches."""
        if not req.failed:
            # A step planned before the request's end was known may have computed tokens whose ids were dropped.
            known = min(req.num_computed, len(req.tokens))
            tokens = np.asarray(req.tokens[:known], np.int32)
            req.handle = self.cache.insert(req.namespace, req.handle, tokens, req.pages)
            if self.slots and 0 < known == req.num_computed and known % self.page_size == 0 <= req.num_saved:
                self.save(req)
        self.allocator.free(self.private(req))
        self.cache.unlock(req.handle)
        if req.failed:
            self.forget(self.cache.path_pages(req.handle))
            self.allocator.free(self.cache.discard(req.handle))
        self.rows.append(req.row)
        req.handle, req.pages, req.row, req.num_computed, req.num_saved = None, [], -1, 0, 0

    def private(self, req: Req) -> list[int]:
        """The request's pages that the cache does not own: not full, or computed twice at the same time."""
        cached = self.cache.path_pages(req.handle)
        return [page for i, page in enumerate(req.pages) if i >= len(cached) or page != cached[i]]
