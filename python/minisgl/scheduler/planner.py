"""The scheduling policy: which request computes how many tokens in the next step, in which pages.

Everything here is a deterministic function of the calls made, in their order: no clock, no randomness, no sets. Each
tensor-parallel rank runs its own copy and reaches the same plans.

A request has `num_tokens` and `num_computed`; a step grants it `min(num_tokens - num_computed, budget left)`. Prefill,
chunked prefill, cache hits and decode are that one subtraction. `plan` advances the counts as if the step had run
already, so the next step can be planned while this one is on the device; `retire` fills in the sampled ids.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import KeysView
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import (
    MAX_COUNT,
    NOT_READY,
    Admission,
    FinishReason,
    PageUpdate,
    Req,
    ReqOutput,
    ReqState,
    SamplingParams,
    ScheduledReq,
    StepPlan,
    StepResult,
    TokenBitmask,
    with_logprobs,
)
from minisgl.errors import IntegrityError, require
from minisgl.kvcache.allocator import PageAllocator
from minisgl.kvcache.radix import NaiveCache, PrefixCache
from minisgl.utils.fairness import FairQueue
from minisgl.utils.math import div_ceil

# Room that must be left for each running request to grow before another one is admitted, in tokens. More wastes
# pages; less admits requests only to retract them soon after.
_GROWTH_TOKENS = 64
_GROWTH_STEP = 16  # tokens of pages that a running request takes at a time
# A prompt's token whose log-probabilities are to be told takes as much of a step as so many others: logits, for the
# whole vocabulary.
_TELLING_COST = 8
# Longest-prefix-match looks at this many of the oldest waiting requests, and every so many admissions takes the
# oldest one whatever it matches, so that none waits for ever.
_LPM_WINDOW = 128
_LPM_OLDEST_EVERY = 8
_CACHES = {"radix": PrefixCache, "naive": NaiveCache}


def _cost(req: Req) -> int:
    """Of one token of a prompt, in tokens of the step's budget."""
    return _TELLING_COST if req.tells_prompt else 1


class Planner:
    """Owns the queues, every `Req`, all page ids and the prefix cache.

    The configuration must satisfy max_seq_len <= num_pages * page_size, so that any single request can run alone.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        assert config.max_seq_len <= config.num_pages * config.page_size
        self._config = config
        self._page_size = config.page_size
        self._reqs: dict[int, Req] = {}  # those whose terminal output is still to come
        self._waiting: FairQueue[Req] = FairQueue()  # by uid
        self._running: list[Req] = []  # in order of admission; only the last may be in the middle of its prefill
        self._leaving: list[Req] = []  # finished or preempted, their pages still in use by steps in flight
        self._inflight: deque[tuple[StepPlan, list[Req]]] = deque()  # a request for each of plan.reqs
        self._eos = frozenset(config.eos_token_ids)
        self._step_id = 0
        every = config.check_integrity  # steps; by default a walk, of 0.2 microseconds a page, takes next to no time
        self._check_every = max(256, config.num_pages // 50) if every is None else every
        self._num_admitted = 0
        self.num_retracted = 0  # times that a running request was sent back to the queue
        self._page_updates: list[PageUpdate] = []
        self.masked_reqs: list[Req] = []  # of the last plan: those that its bitmask is for
        self._allocator = PageAllocator(config.num_pages)
        self._cache: PrefixCache = _CACHES[config.cache_type](config.page_size)
        self._rows = list(range(config.max_running_requests - 1, -1, -1))

    def reset(self) -> KeysView[int]:
        """Forget all but the requests that have not begun. Returns their uids: the caller ends the others, and has seen
        that no step is in flight."""
        waiting = [req for _, req in self._waiting.items() if req.state is ReqState.WAITING and not req.started]
        self._reqs, self._waiting = {req.uid: req for req in waiting}, FairQueue()
        for req in waiting:
            self._waiting.put(req.params.client, req.uid, req)
        self._running, self._leaving, self._inflight = [], [], deque()
        self._allocator = PageAllocator(self._config.num_pages)
        self._cache = _CACHES[self._config.cache_type](self._page_size)
        self._rows = list(range(self._config.max_running_requests - 1, -1, -1))
        return self._reqs.keys()

    def flush_unused(self) -> int:
        """Forget what is cached and in use by no running request. Returns the number of pages freed."""
        pages = self._cache.evict(self._cache.num_evictable)
        self._allocator.free(pages)
        return len(pages)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_pages(self) -> int:
        return self._allocator.num_free + self._cache.num_evictable

    @property
    def is_idle(self) -> bool:
        """No request is left and no step is in flight."""
        return not (self._reqs or self._inflight)

    def add(self, uid: int, token_ids: list[int], params: SamplingParams, count: int = 1) -> list[ReqOutput]:
        """Queue a request: as many as there are outputs, their uids and seeds one after the other, their ids the same
        objects while they wait. A request that can never run ends with an error at once."""
        max_len = self._config.max_seq_len
        if params.max_tokens is not None:
            max_len = min(max_len, len(token_ids) + max(1, params.max_tokens))
        size, prefix = len(token_ids), np.array(token_ids, np.int32)
        namespace = params.cache_salt.encode("utf-8", "surrogatepass")
        failed, error = list[ReqOutput](), None
        if not 0 < size < max_len:
            error = f"{size} prompt tokens do not fit the context of {self._config.max_seq_len}"
        elif params.seed is None or not self._knows(prefix, params):
            error = "a token is not in the vocabulary, or there is no seed"
        for index in range(count):
            choice = params.of_choice(index)
            req = Req(uid + index, token_ids, prefix, size, choice, max_len, size, namespace)
            if (why := f"request id {req.uid} is in use" if req.uid in self._reqs else error) is not None:
                req.state = ReqState.FINISHED
                failed.append(ReqOutput(req, (), FinishReason.ERROR, error=why))
            else:
                self._reqs[req.uid] = req
                self._waiting.put(params.client, req.uid, req)
        return failed

    def _knows(self, ids: npt.NDArray[np.int32], params: SamplingParams) -> bool:
        """Whether the vocabulary has these tokens and those that the parameters name."""
        named = [*params.stop_token_ids, *(token for token, _ in params.logit_bias), int(ids.min()), int(ids.max())]
        return min(named) >= 0 and max(named) < (self._config.vocab_size or MAX_COUNT)

    def abort(self, uid: int) -> list[ReqOutput]:
        """End a request. Nothing happens for one that has ended, or never was: the abort lost a race."""
        req = self._reqs.get(uid)
        return [] if req is None else [self._finish(ReqOutput(req, (), FinishReason.ABORT))]

    def resume(self, uid: int, paced: bool) -> None:
        """A request that is held may be planned again; with `paced` it is held after each token from now on."""
        if (req := self._reqs.get(uid)) is not None:
            req.held, req.paced = False, paced

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can be computed now (nothing to do, or all pages are still in use)."""
        budget = self._config.max_prefill_length
        decode: list[tuple[Req, ScheduledReq]] = []
        prefill: list[tuple[Req, ScheduledReq]] = []
        self._page_updates = []
        # What a failed request computed may still be in the cache until it is released: admit nobody onto it.
        may_admit = not any(req.failed for req in self._leaving)
        page_size = self._page_size
        if self._waiting.is_shared and self._waiting and self._running:
            self._take_turns()
        for req in self._running:  # a retraction takes requests off the end, never from before this one
            num_tokens, start = req.num_tokens, req.num_computed
            if num_tokens >= req.max_len or req.held:
                continue  # its last token is planned already, or its next one cannot be sampled
            if budget <= 0:
                break
            num_new = num_tokens - start
            cost = 1 if num_new == 1 else _cost(req)
            if num_new * cost > budget:
                num_new = max(1, budget // cost)
            if start + num_new > len(req.pages) * page_size and not self._grow(req, num_new):
                may_admit = False
                continue
            budget -= num_new * cost
            share = self._schedule(req, num_new)
            (decode if share.is_decode else prefill).append((req, share))
        admissions: list[Admission] = []
        while may_admit and budget > 0 and self._waiting:
            req = self._next_waiting()
            num_new = self._admit(req, budget) if self._rows else self._make_way(req, 0)
            if num_new == 0:
                break
            ends = req.params.end_ids(self._config.eos_token_ids) if req.params.min_tokens else ()
            admissions.append(Admission(req.row, req.prefix, req.params, req.prompt_len, ends))
            budget = budget - num_new * _cost(req) if req.num_computed + num_new == req.num_tokens else 0
            share = self._schedule(req, num_new)
            (decode if share.is_decode else prefill).append((req, share))
        scheduled = decode + prefill
        if not scheduled:
            return None
        bitmask, self.masked_reqs = _bitmask_of(scheduled)
        checked = self._check_every and self._step_id % self._check_every == 0
        expected = tuple(PageUpdate(req.row, 0, tuple(req.pages)) for req in self._running) if checked else ()
        plan = StepPlan(
            self._step_id,
            tuple(admissions),
            tuple(self._page_updates),
            tuple(share for _, share in scheduled),
            num_decode=len(decode),
            bitmask=bitmask,
            expected=expected,
        )
        self._inflight.append((plan, [req for req, _ in scheduled]))
        self._step_id += 1
        return plan

    def retire(self, result: StepResult) -> list[ReqOutput]:
        """Take in the oldest planned step's sampled ids. Returns what became known, in plan order."""
        plan, reqs = self._inflight.popleft()
        assert plan.step_id == result.step_id, f"step {result.step_id} retired, {plan.step_id} expected"
        outputs: list[ReqOutput] = []
        token_ids = iter(enumerate(result.token_ids))
        for index, (req, scheduled) in enumerate(zip(reqs, plan.reqs, strict=True)):
            req.num_inflight -= 1
            if result.prompt_logprobs is not None and index in result.prompt_logprobs:
                req.prompt_logprobs.append(result.prompt_logprobs[index])
            if scheduled.num_samples:
                sample, (token_id,) = next(token_ids)
                if req.num_stale:
                    req.num_stale -= 1
                elif req.state is not ReqState.FINISHED:
                    output = self._sit_out(req) if token_id == NOT_READY else self._accept(req, token_id)
                    has_more = token_id != NOT_READY and (result.logprobs is not None or req.prompt_logprobs)
                    outputs.append(with_logprobs(output, result, sample) if has_more else output)
        self._release_leaving()
        return outputs

    def fail(self, step_id: int, error: str) -> list[ReqOutput]:
        """The oldest planned step failed on the device.

        Its requests, and those of later steps, which may have read what this one did not write, end with an error, and
        nothing computed so far is reused. The others go on.
        """
        victims = [req for req in self._reqs.values() if req.num_inflight]
        plan, reqs = self._inflight.popleft()
        assert plan.step_id == step_id, f"step {step_id} failed, {plan.step_id} expected"
        for req in reqs:
            req.num_inflight -= 1
        for req in self._leaving:
            req.failed = True
        outputs = [self._finish(ReqOutput(req, (), FinishReason.ERROR, error=error)) for req in victims]
        self._release_leaving()
        self.flush_unused()
        return outputs

    def damage(self, how: str) -> None:
        """For tests: what a fault would do to the pages."""
        if how == "exhaust":
            self._allocator.allocate(self._allocator.num_free)
        elif how == "free":
            self._allocator.free(self._running[0].pages[-1:])
        else:
            self._cache.num_evictable += 1

    def free_pages(self) -> list[int]:
        """The pages that belong to nobody."""
        return self._allocator.check()

    def check_integrity(self) -> None:
        """Walk all that is remembered. Raises: IntegrityError naming what does not fit."""
        held = self._running + self._leaving
        owners = [("nobody", self.free_pages()), ("the cache", self._cache.check([req.handle for req in held]))]
        shares = Counter(id(req) for _, reqs in self._inflight for req in reqs)
        for req in held:
            self._check_req(req, shares[id(req)])
            owners.append((f"request {req.uid}", self._private_pages(req)))
        owned, num_pages = Counter(chain.from_iterable(pages for _, pages in owners)), self._config.num_pages
        if len(owned) < sum(len(pages) for _, pages in owners):
            ((page, _),) = owned.most_common(1)
            names = [name for name, pages in owners for other in pages if other == page]
            raise IntegrityError(f"page {page} belongs to {' and to '.join(names)}")
        require(min(owned) >= 0 and max(owned) < num_pages, "a page has a number that there is not")
        require(len(owned) == num_pages, f"{num_pages - len(owned)} pages are lost")
        rows = sorted([*self._rows, *(req.row for req in held)])
        require(rows == list(range(self._config.max_running_requests)), "rows are lost or shared")
        for uid, req in self._waiting.items():
            begun = req.state is not ReqState.WAITING or req.row >= 0 or req.pages or req.handle or req.num_computed
            require(not begun and req.uid == uid and self._reqs.get(uid) is req, f"request {uid} should not wait")
        num_running = sum(req.state is ReqState.RUNNING for req in held)
        require(len(self._reqs) == len(self._waiting) + num_running, "a request is in no queue, or in two")

    def _check_req(self, req: Req, num_inflight: int) -> None:
        """One that has a row: that its state, counts, pages and lock fit together."""
        runs, num_known, num_pages = req.state is ReqState.RUNNING, len(req.tokens), len(req.pages)
        computed = 0 <= req.num_computed <= min(req.num_tokens, num_pages * self._page_size)
        placed = runs == (self._reqs.get(req.uid) is req) and req.state is not ReqState.WAITING
        counts = req.prompt_len <= num_known <= req.num_tokens <= min(req.max_len, num_known + num_inflight)
        for holds, contradiction in (
            (placed, f"is {req.state.value}, and in the wrong place"),
            (computed, "has computed beyond its pages"),
            (counts or not runs, f"has {req.num_tokens} tokens, {num_known} known"),
            (req.num_inflight == num_inflight, f"is in {num_inflight} steps, not {req.num_inflight}"),
            (self._cache.spells(req.namespace, req.handle, req.prefix), "holds a prefix of other tokens"),
            (len(self._cache.path_pages(req.handle)) <= num_pages, "holds more of the cache than it has pages"),
        ):
            require(holds, f"request {req.uid} {contradiction}")

    def _schedule(self, req: Req, num_new: int) -> ScheduledReq:
        start = req.num_computed
        end = req.num_computed = start + num_new
        req.num_inflight += 1
        num_samples = int(end == req.num_tokens)
        is_prefill = start < len(req.prefix)
        if is_prefill and not req.tells_prompt:  # others may share its pages from now on, even within this step
            req.handle = self._cache.insert(req.namespace, req.handle, req.prefix[:end], req.pages)
        req.num_tokens += num_samples
        req.held = req.paced and num_samples > 0
        return ScheduledReq(req.row, start, num_new, num_samples)

    def _grow(self, req: Req, num_new: int) -> bool:
        """Give a running request the pages for `num_new` tokens, retracting younger ones if need be."""
        needed = div_ceil(req.num_computed + num_new, self._page_size) - len(req.pages)
        while needed > self._allocator.num_free and not self._make_room(needed):
            if self._leaving:
                return False  # pages come back as soon as the steps in flight have run
            victim = self._running[-1]
            self._retract(victim)
            if victim is req:
                return False
        # While there are plenty, small pages are taken several at a time: one for each token would cost the plan more
        # than all the rest.
        wanted = min(_GROWTH_STEP // self._page_size, div_ceil(req.max_len, self._page_size) - len(req.pages))
        are_plenty = self._allocator.num_free > wanted * len(self._running)
        self._give(req, self._allocator.allocate(max(needed, wanted) if are_plenty else needed))
        return True

    def _make_room(self, count: int) -> bool:
        """Whether `count` pages are free, evicting cached ones where needed."""
        missing = count - self._allocator.num_free
        if missing > self._cache.num_evictable:
            return False
        self._allocator.free(self._cache.evict(missing))
        return True

    def _give(self, req: Req, pages: list[int]) -> None:
        if pages:
            self._page_updates.append(PageUpdate(req.row, len(req.pages), tuple(pages)))
            req.pages += pages

    def _retract(self, req: Req) -> None:
        """Send a running request back to the queue. What it has computed stays in the cache while there is room."""
        self._running.remove(req)
        self.num_retracted += 1
        req.preempted = True
        self._leaving.append(req)
        self._release_leaving()

    def _next_waiting(self) -> Req:
        waiting = self._waiting.turn()
        if self._config.schedule_policy == "priority":  # of equal ones the first
            return min(waiting.values(), key=lambda req: req.params.priority)
        if self._config.schedule_policy == "lpm" and self._num_admitted % _LPM_OLDEST_EVERY:
            window = islice(waiting.values(), _LPM_WINDOW)
            return max(window, key=lambda req: self._cache.match_len(req.namespace, req.prefix))
        return next(iter(waiting.values()))

    def _admit(self, req: Req, budget: int) -> int:
        """Give a waiting request a row and pages for its first chunk: how many tokens, 0 if there is no room for it."""
        # At least one token is left to compute; and all prompt tokens whose log-probabilities are still to be told.
        num_reusable = 0 if req.tells_prompt else len(req.prefix) - 1
        match = self._cache.match(req.namespace, req.prefix[:num_reusable])
        self._cache.lock(match.handle)
        num_cached = len(match.pages) * self._page_size
        num_new = min(len(req.tokens) - num_cached, max(1, budget // _cost(req)))
        needed = div_ceil(num_cached + num_new, self._page_size) - len(match.pages)
        headroom = 0  # pages for all of its tokens, and for the running ones to grow a while
        if self._running or self._leaving:
            growth = len(self._running) * div_ceil(_GROWTH_TOKENS, self._page_size)
            headroom = div_ceil(len(req.tokens) - num_cached, self._page_size) + growth
        missing = headroom - self.num_free_pages
        if missing > 0 or not self._make_room(needed):
            self._cache.unlock(match.handle)
            return self._make_way(req, missing)
        self._waiting.remove(req.params.client, req.uid)
        self._running.append(req)
        self._num_admitted += 1
        req.state, req.prompt_logprobs = ReqState.RUNNING, []
        req.row = self._rows.pop()
        req.handle, req.num_computed = match.handle, num_cached
        if not req.started:
            req.started, req.num_cached, req.tokens = True, num_cached, list(req.tokens)
        self._waiting.charge(req.params.client, num_new)
        req.num_charged = max(req.num_charged, num_cached + num_new)
        self._give(req, match.pages)
        self._give(req, self._allocator.allocate(needed))
        return num_new

    def _take_turns(self) -> None:
        """Clients are charged for what was computed since they last were. A long prefill goes back to the queue, and
        what it has computed to the cache, while others have had less; but for the last pages, so it must have come
        further than the last time."""
        for req in self._running:
            self._waiting.charge(req.params.client, max(0, req.num_computed - req.num_charged))
            req.num_charged = max(req.num_charged, req.num_computed)
        req = self._running[-1]
        num_left = req.num_tokens - req.num_computed + len(self._running)
        is_long = num_left > self._config.max_prefill_length and self._config.cache_type == "radix"
        is_further = req.num_computed >= req.num_interrupted + self._page_size and not req.tells_prompt
        if is_long and is_further and self._rows and self._waiting.overtakes(req.params.client):
            req.num_interrupted = req.num_computed
            self._retract(req)

    def _make_way(self, req: Req, missing: int) -> int:
        """So many pages are too few for a waiting request, or there is no row (0). If another client has twice what it
        wants and four times what its client has, that one's youngest go back to the queue. Returns 0, its tokens."""
        client, wanted = req.params.client, div_ceil(len(req.tokens), self._page_size) if missing else 1
        held: Counter[str] = Counter()
        for other in self._running:
            held[other.params.client] += len(other.pages) if missing else 1
        most = max(held, key=held.__getitem__, default=client)
        if any(other.preempted for other in self._leaving):
            return 0
        for other in self._running[::-1]:
            if held[most] >= 4 * held[client] + 2 * wanted and other.params.client == most:
                gain = len(other.pages) if missing else 1
                held[most], missing = held[most] - gain, missing - gain
                self._retract(other)
                if missing <= 0:
                    break
        return 0

    def _sit_out(self, req: Req) -> ReqOutput:
        """As if the step had not been planned: its last token is computed again once it is resumed. Steps in flight
        went on from a token that there is not."""
        req.num_tokens, req.num_computed = len(req.tokens), len(req.tokens) - 1
        req.num_stale, req.held = req.num_inflight, True
        return ReqOutput(req, ())

    def _accept(self, req: Req, token_id: int) -> ReqOutput:
        if token_id < 0:
            error = "the model's output was not finite (NaN or infinity)"
            return self._finish(ReqOutput(req, (), FinishReason.ERROR, error=error))
        params = req.params
        if params.max_tokens == 0:
            return self._finish(ReqOutput(req, (), FinishReason.LENGTH))
        req.tokens.append(token_id)
        eos_ends = not params.ignore_eos or params.grammar is not None
        ends = token_id in params.stop_token_ids or (token_id in self._eos and eos_ends)
        if ends and len(req.tokens) - req.prompt_len > params.min_tokens:
            num_hidden = 0 if params.include_stop_str_in_output else 1
            return self._finish(ReqOutput(req, (token_id,), FinishReason.STOP, num_hidden))
        if len(req.tokens) >= req.max_len:
            return self._finish(ReqOutput(req, (token_id,), FinishReason.LENGTH))
        return ReqOutput(req, (token_id,))

    def _finish(self, output: ReqOutput) -> ReqOutput:
        """The request's last output, now that it has ended."""
        req = output.req
        del self._reqs[req.uid]
        if req.state is ReqState.WAITING:
            self._waiting.remove(req.params.client, req.uid)
        elif not req.preempted:
            self._running.remove(req)
            self._leaving.append(req)
        req.state = ReqState.FINISHED
        req.failed = output.finish_reason is FinishReason.ERROR
        self._release_leaving()
        return output

    def _release_leaving(self) -> None:
        """Take back rows and pages of requests that no step in flight touches any more."""
        for req in self._leaving:
            if not req.num_inflight:
                self._release(req)
        self._leaving = [req for req in self._leaving if req.num_inflight]

    def _release(self, req: Req) -> None:
        if not req.failed:
            # A step planned before the request's end was known may have computed tokens whose ids were dropped.
            known = min(req.num_computed, len(req.tokens))
            tokens = np.asarray(req.tokens[:known], np.int32)
            req.handle = self._cache.insert(req.namespace, req.handle, tokens, req.pages)
        self._allocator.free(self._private_pages(req))
        self._cache.unlock(req.handle)
        if req.failed:
            self._allocator.free(self._cache.discard(req.handle))
        self._rows.append(req.row)
        req.handle, req.pages, req.row, req.num_computed = None, [], -1, 0
        req.preempted = False
        if req.state is not ReqState.FINISHED:
            req.state, req.prefix = ReqState.WAITING, np.array(req.tokens, np.int32)
            self._waiting.put(req.params.client, req.uid, req, first=True)

    def _private_pages(self, req: Req) -> list[int]:
        """The request's pages that the cache does not own: not full, or computed twice at the same time."""
        cached = self._cache.path_pages(req.handle)
        return [page for i, page in enumerate(req.pages) if i >= len(cached) or page != cached[i]]


def _bitmask_of(scheduled: list[tuple[Req, ScheduledReq]]) -> tuple[TokenBitmask | None, list[Req]]:
    """The bitmask of a step without its words, which rank 0 adds: it has the matchers. And whose tokens it is for."""
    if all(req.params.grammar is None for req, _ in scheduled):
        return None, []
    sampling = [req for req, share in scheduled if share.num_samples]
    samples = tuple(index for index, req in enumerate(sampling) if req.params.grammar is not None)
    return (TokenBitmask(samples, None) if samples else None), [sampling[index] for index in samples]
