"""The scheduling policy: which request computes how many tokens in the next step, in which pages.

Everything here is a deterministic function of the calls made, in their order: no clock, no randomness, no sets. Each
tensor-parallel rank runs its own copy and reaches the same plans.

A request has `num_tokens` and `num_computed`; a step grants it `min(num_tokens - num_computed, budget left)`. Prefill,
chunked prefill, cache hits and decode are that one subtraction. `plan` advances the counts as if the step had run
already, so the next step can be planned while this one is on the device; `retire` fills in the sampled ids."""

from collections import Counter, deque
from collections.abc import KeysView
from itertools import islice

import numpy as np
import numpy.typing as npt

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import NOT_READY, FinishReason, Req, ReqOutput, ReqState, SamplingParams, ScheduledReq, StepResult
from minisgl.kvcache.pages import SOON, Pages
from minisgl.scheduler.drafters import Drafter
from minisgl.scheduler.plan import Pending, PlanBuilder, Planned
from minisgl.scheduler.speculation import Speculation
from minisgl.utils.fairness import FairQueue
from minisgl.utils.math import align_down, div_ceil

# Tokens of room for each running request to grow before another one is admitted; with less it is retracted soon.
_GROWTH_TOKENS = 64
_GROWTH_STEP = 16  # tokens of pages that a running request takes at a time
# What a prompt token with log-probabilities takes of a step's budget, in tokens: logits of the whole vocabulary.
_LOGPROBS_COST = 8
_READING = 3  # new tokens: reading the keys and values before them takes as long as attention of so many
# Longest-prefix-match looks at this many of the oldest waiting requests, and every so many admissions takes the
# oldest one whatever it matches, so that none waits for ever.
_LPM_WINDOW, _LPM_OLDEST_EVERY = 128, 8
_SPARSE, _TEMPLATE_TOKENS = 32, 8  # where snapshots of states are due: see `_borders`


class Planner:
    """Owns the queues, every `Req`, and `pages`. Others only look at them: the integrity walk, dumps, and tests.

    The configuration must satisfy max_seq_len <= num_pages * page_size, so that any single request can run alone."""

    def __init__(self, config: SchedulerConfig, drafter: Drafter | None = None) -> None:
        assert config.max_seq_len <= config.num_pages * config.page_size
        self.config, self._page_size = config, config.page_size
        self.reqs: dict[int, Req] = {}  # those whose terminal output is still to come
        self.waiting: FairQueue[Req] = FairQueue()  # by uid
        self.running: list[Req] = []  # in order of admission; only the last may have much of its prefill left
        self.leaving: list[Req] = []  # finished or retracted, their pages still in use by steps in flight
        self.inflight: deque[Planned] = deque()  # submitted and not yet retired, oldest first
        self.pages, self.speculation = Pages(config), Speculation(config, drafter)
        self._step_id = self._num_admitted = 0
        self.num_retracted = 0  # times that a running request was sent back to the queue
        every = config.check_integrity  # steps; by default a walk, of 0.2 microseconds a page, takes next to no time
        self._check_every = max(256, config.num_pages // 50) if every is None else every

    def reset(self) -> KeysView[int]:
        """Forget all but the requests that have not begun → their uids; the caller ends the rest. None is in flight."""
        waiting = [req for _, req in self.waiting.items() if req.state is ReqState.WAITING and not req.started]
        self.speculation.forget(self.reqs)
        self.reqs, self.waiting, self.running, self.leaving, self.inflight = {}, FairQueue(), [], [], deque()
        self.pages = Pages(self.config)
        for req in waiting:
            self._wait(req)
        return self.reqs.keys()

    @property
    def is_idle(self) -> bool:
        """No request is left and no step is in flight."""
        return not (self.reqs or self.inflight)

    def add(self, uid: int, token_ids: list[int], params: SamplingParams, count: int = 1) -> list[ReqOutput]:
        """Queue a request: as many as there are outputs, their uids and seeds one after the other, their ids the same
        objects while they wait. A request that can never run ends with an error at once."""
        max_len = self.config.max_seq_len + bool(params.pooling)  # which needs no room for an output
        if params.max_tokens is not None:
            max_len = min(max_len, len(token_ids) + max(1, params.max_tokens))
        size, prefix = len(token_ids), np.array(token_ids, np.int32)
        namespace = params.cache_salt.encode("utf-8", "surrogatepass")
        ends, failed, error = frozenset(params.end_ids(self.config.eos_token_ids)), list[ReqOutput](), None
        if not 0 < size < max_len:
            error = f"{size} prompt tokens do not fit the context of {self.config.max_seq_len}"
        elif params.seed is None or not self._knows(prefix, params):
            error = "a token is not in the vocabulary, or there is no seed"
        for index in range(count):
            choice = params.of_choice(index)
            req = Req(uid + index, token_ids, prefix, size, choice, max_len, size, namespace, ends=ends)
            if (why := f"request id {req.uid} is in use" if req.uid in self.reqs else error) is not None:
                req.state = ReqState.FINISHED
                failed.append(ReqOutput(req, (), FinishReason.ERROR, error=why))
            else:
                self._wait(req)
                self.speculation.expect(req)
        return failed

    def _knows(self, ids: npt.NDArray[np.int32], params: SamplingParams) -> bool:
        """Whether the vocabulary has these tokens and those that the parameters name."""
        named = [*params.stop_token_ids, *(token for token, _ in params.logit_bias), int(ids.min()), int(ids.max())]
        return min(named) >= 0 and max(named) < (self.config.vocab_size or 2**31)

    def abort(self, uid: int) -> list[ReqOutput]:
        """End a request. Nothing happens for one that has ended, or never was: the abort lost a race."""
        req = self.reqs.get(uid)
        return [] if req is None else [self._finish(ReqOutput(req, (), FinishReason.ABORT))]

    def resume(self, uid: int, paced: bool) -> None:
        """A request that is held may be planned again; with `paced` it is held after each token from now on."""
        if (req := self.reqs.get(uid)) is not None:
            req.held, req.paced = False, paced
            if self.config.has_states and req.num_saved < 0 and not req.retracted:
                self._retract(req)

    def plan(self) -> Planned | None:
        """The next step, or None when nothing can be computed now, or it is not known yet how far the last one gets."""
        step = PlanBuilder(self.config.max_prefill_length)
        if (self.speculation.is_on or any(plan.drafts for plan, _ in self.inflight)) and not self._may_follow(step):
            return None
        # What a failed request computed may still be in the cache until it is released: admit nobody onto it.
        may_admit = not any(req.failed for req in self.leaving)
        if self.waiting.is_shared and self.waiting and self.running:
            self._take_turns()
        has_pages = self._plan_running(step)
        if may_admit and (has_pages or not (self.running or self.leaving)):
            self._plan_waiting(step)
            if not (self.running or self.leaving):  # who ran alone has just made way
                self._plan_waiting(step)
        if not step.decode and not step.prefill:
            return None
        self.speculation.lengthen(step, self.pages)
        checked = self._check_every and self._step_id % self._check_every == 0
        planned = step.build(self._step_id, self.pages, self.running if checked else [])
        self.inflight.append(planned)
        self._step_id += 1
        return planned

    def _may_follow(self, step: PlanBuilder) -> bool:
        """Whether the next step can be planned now: no step in flight verifies or makes drafts; or only one is in
        flight, the same requests go on behind it (`step.pending`), and there are pages for all that it may accept."""
        shares = [one for plan, _ in self.inflight for one in enumerate(plan.reqs, 1)]
        if not (shares := [(i, share) for i, share in shares if share.num_samples > 1 or share.next_draft_len]):
            return True
        step.pending = {one.row: Pending(i, one.num_samples - 1, one.next_draft_len) for i, one in shares}
        others = [r for r in self.running if r.held or r.params.grammar or r.num_tokens > r.num_computed + 1]
        can = len(self.inflight) == 1 and not ((self.waiting and self.pages.rows) or others)  # for whom there is a row
        num = len(self.running) * div_ceil(1 + self.config.draft_len, self._page_size)
        return can and self.speculation.can_follow(self.inflight[0].plan) and self.pages.missing(num, num) <= 0

    def _plan_running(self, step: PlanBuilder) -> bool:
        """Give running requests their shares of the step, oldest first → whether there were pages for all of them."""
        has_pages, page_size, budget, keeps_states = True, self._page_size, step.budget, bool(self.pages.slots)
        for index, req in enumerate(self.running):  # a retraction takes requests off the end, none from before this one
            num_tokens, start = req.num_tokens, req.num_computed
            if num_tokens >= req.max_len or num_tokens == start or req.held:
                continue  # its last token is planned already, or its next one cannot be sampled
            if budget <= 0:
                break
            if self.config.window:  # `_sit_out` may go back to its last known token
                self.pages.advance(req, min(start, len(req.tokens) - 1))
            num_new, cost = num_tokens - start, 1
            if keeps_states:
                self._save_state(req, start)
                if req.borders and start < max(req.borders):
                    num_new = min([num_new, *(border - start for border in req.borders if border > start)])
            if num_new > 1:  # what a token of everyone's output takes is no less if it comes a step later
                num_new, cost = self._share(req, start, num_new, budget - (len(self.running) - index - 1))
            most = num_new + step.pending.get(req.row, Pending()).draft_len
            if start + most > len(req.pages) * page_size and not self._grow(req, most):
                has_pages = False
                continue
            budget -= cost
            self._schedule(req, num_new, step)
        step.budget = budget
        return has_pages

    def _plan_waiting(self, step: PlanBuilder) -> None:
        """Admit waiting requests while budget, rows and pages are left."""
        while step.budget > 0 and self.waiting:
            req = self._next_waiting()
            num_new = self._admit(req, step.budget) if self.pages.rows else 0
            if num_new <= 0:
                if num_new or not self.pages.rows:
                    self._make_way(req, -num_new)
                break
            step.admit(req, self.config.eos_token_ids)
            is_whole = req.num_computed + num_new in (req.num_tokens, *req.borders[-1:])
            _, cost = self._share(req, req.num_computed, num_new, step.budget)
            step.budget = step.budget - cost if is_whole else 0
            self._schedule(req, num_new, step)

    def _share(self, req: Req, start: int, num_new: int, budget: int) -> tuple[int, int]:
        """How many of so many tokens of a prompt, behind those before `start`, a step's budget holds, at least one; and
        what they take of it, with their attention (docs/adr/0030-attention-in-a-step.md)."""
        each = _LOGPROBS_COST if req.tells_prompt and not req.params.pooling else 1
        span = self.config.attention_tokens
        num_new = max(1, min(num_new, ((budget + 1) * span - _READING * start - 1) // (each * span + start)))
        return num_new, num_new * each + (num_new + _READING) * start // span

    def _schedule(self, req: Req, num_new: int, step: PlanBuilder) -> None:
        """Give a request a share of `num_new` tokens, and count them as computed already."""
        start, pages = req.num_computed, self.pages
        end = req.num_computed = start + num_new
        req.num_inflight += 1
        num_samples = int(end == req.num_tokens and not req.params.pooling)
        if start < len(req.prefix) and not req.tells_prompt and (end in req.borders or not pages.slots):
            pages.share(req, end)
        req.num_tokens += num_samples
        req.held = req.paced and num_samples > 0
        accepted, follows = pages.accepted.pop(req.row, 0), step.pending.get(req.row, Pending()).follows
        share = ScheduledReq(req.row, start, num_new, num_samples, 0, accepted, follows)
        (step.decode if num_new == num_samples else step.prefill).append((req, share))

    def retire(self, result: StepResult) -> list[ReqOutput]:
        """Take in the oldest planned step's sampled ids. Returns what became known, in plan order."""
        plan, reqs = self.inflight.popleft()
        assert plan.step_id == result.step_id, f"step {result.step_id} retired, {plan.step_id} expected"
        outputs, token_ids, sample, ended = list[ReqOutput](), iter(result.token_ids), 0, ReqState.FINISHED
        drafts, probs, of_prompts = {x.row: x.ids for x in plan.drafts}, result.logprobs, result.prompt_logprobs
        for index, (req, scheduled) in enumerate(zip(reqs, plan.reqs, strict=True)):
            req.num_inflight -= 1
            if of_prompts:
                req.prompt_logprobs += of_prompts.get(index, b"")
            if result.pooled and (vector := result.pooled.get(index)) is not None and req.state is not ended:
                end = ReqOutput(req, (), FinishReason.STOP, pooled=vector)
                outputs.append(self._finish(end) if vector else self._accept(req, (-1,)))
            if scheduled.num_samples:
                ids = sampled = next(token_ids)
                if req.num_stale:  # how far it got is known
                    req.num_stale -= 1
                elif req.state is not ended:
                    if drafts and (draft := drafts.get(scheduled.row)):
                        ids = self.speculation.settle(req, scheduled, draft, sampled, self.pages)
                    logprobs = b"".join([probs.get(sample + i, b"") for i in range(len(ids))]) if probs else b""
                    outputs.append(self._sit_out(req) if ids[0] == NOT_READY else self._accept(req, ids, logprobs))
                sample += len(sampled)
        self.speculation.hear(reqs, plan, result)
        self._release_leaving()
        return outputs

    def fail(self, step_id: int, error: str) -> list[ReqOutput]:
        """The oldest planned step failed on the device. Its requests and those of later steps, which may have read what
        this one did not write, end with an error, and nothing computed so far is reused. The others go on."""
        victims = [req for req in self.reqs.values() if req.num_inflight]
        plan, reqs = self.inflight.popleft()
        assert plan.step_id == step_id, f"step {step_id} failed, {plan.step_id} expected"
        for req in reqs:
            req.num_inflight -= 1
        for req in self.leaving:
            req.failed = True
        outputs = [self._finish(ReqOutput(req, (), FinishReason.ERROR, error=error)) for req in victims]
        self._release_leaving()
        self.pages.flush_unused()
        self.pages.forget([*self.pages.snapshots])
        return outputs

    def _grow(self, req: Req, num_new: int) -> bool:
        """Give a running request the pages for `num_new` tokens, retracting younger ones if need be."""
        pages = self.pages
        needed = div_ceil(req.num_computed + num_new, self._page_size) - len(req.pages)
        while not pages.make_room(needed):
            if self.leaving or (req.num_inflight and len(self.running) == 1):
                return False  # pages come back as soon as the steps in flight have run
            victim = self.running[-1]
            self._retract(victim)
            if not self.running:  # a prefix that it could not use was cached, and it had computed that again
                pages.flush_unused()
            if victim is req:
                return False
        # While there are plenty, several small pages are taken at a time: one for each token costs the plan the most.
        wanted = min(_GROWTH_STEP // self._page_size, div_ceil(req.max_len, self._page_size) - len(req.pages))
        are_plenty = pages.allocator.num_free > (num := wanted * len(self.running)) and pages.missing(num, num) < 0
        pages.give(req, pages.allocator.allocate(max(needed, wanted) if are_plenty else needed))
        return True

    def _next_waiting(self) -> Req:
        """Of the client whose turn it is the request that comes first by the policy."""
        waiting = self.waiting.turn()
        if self.config.schedule_policy == "priority":  # of equal ones the first
            return min(waiting.values(), key=lambda req: req.params.priority)
        if self.config.schedule_policy == "lpm" and self._num_admitted % _LPM_OLDEST_EVERY:
            window = islice(waiting.values(), _LPM_WINDOW)
            return max(window, key=lambda req: self.pages.cache.match_len(req.namespace, req.prefix))
        return next(iter(waiting.values()))

    def _borders(self, req: Req, num_cached: int) -> list[int]:
        """Where snapshots are due in a prompt: where others have gone on in another way, now and then where it is long,
        and at its end, but for what may be the template's last words, which the next turn has not."""
        size, every = len(req.prefix) - 1, self.config.snapshot_tokens
        known = self.pages.cache.match_len(req.namespace, req.prefix[:size])
        ends = (known, *range(_SPARSE * every, size, _SPARSE * every), size + 1 - _TEMPLATE_TOKENS)
        return [border for end in ends if (border := align_down(end, self._page_size)) >= num_cached + every]

    def _save_state(self, req: Req, start: int) -> None:
        """Have a snapshot made of a running request's state, if one is due, before it goes on."""
        is_output = start >= len(req.prefix) and start % self._page_size == 0
        if is_output and req.num_saved + self.config.snapshot_tokens <= start <= len(req.tokens):
            if req.num_saved > req.prompt_len:  # only the last one of an output is needed
                self.pages.forget(req.handle.pages[-1:])
            req.prefix = np.append(req.prefix, np.array(req.tokens[len(req.prefix) : start], np.int32))
            self.pages.share(req, start)
        if start == req.num_saved:
            self.pages.save(req)

    def _admit(self, req: Req, budget: int) -> int:
        """Give a waiting request a row and pages for its first chunk. Returns how many tokens that has, or, if there is
        no room for it, minus the pages that are missing. 0: it should wait for a snapshot that is to be made."""
        pages = self.pages
        # At least one token is left to compute; and all prompt tokens whose log-probabilities are still to be told.
        num_reusable = 0 if req.tells_prompt else len(req.prefix) - 1
        match, slot = pages.match(req.namespace, req.prefix[:num_reusable])
        if slot == SOON:
            return 0
        pages.hold(req, match)
        num_cached = req.num_saved = len(match.pages) * self._page_size
        num_new, _ = self._share(req, num_cached, len(req.tokens) - num_cached, budget)
        if pages.slots and not req.tells_prompt:
            req.borders = self._borders(req, num_cached)
            num_new = min([num_new, *(border - num_cached for border in req.borders)])
        needed = div_ceil(num_cached + num_new, self._page_size) - len(match.pages)
        headroom = growth = 0  # pages for all of its tokens, and for the running ones to grow a while
        if self.running or self.leaving:
            growth = len(self.running) * div_ceil(_GROWTH_TOKENS, self._page_size)
            headroom = div_ceil(len(req.tokens) - num_cached, self._page_size) + growth
        missing = pages.missing(headroom, needed + growth)
        if missing > 0 or not pages.make_room(needed):
            pages.leave(req, match.handle)
            return -max(missing, 0)
        self.waiting.remove(req.params.client, req.uid)
        self.running.append(req)
        self._num_admitted += 1
        req.state, req.prompt_logprobs = ReqState.RUNNING, b""
        req.row = pages.rows.pop()
        req.handle, req.num_computed = match.handle, num_cached
        if not req.started:
            req.started, req.num_cached, req.tokens = True, num_cached, list(req.tokens)
        self.waiting.charge(req.params.client, num_new)
        req.num_charged = max(req.num_charged, num_cached + num_new)
        pages.give(req, match.pages)
        pages.give(req, pages.allocator.allocate(needed))
        if self.config.has_states:
            pages.copy_state(slot, req.row)
        return num_new

    def _take_turns(self) -> None:
        """Clients are charged for what was computed since they last were. A long prefill goes back to the queue, and
        what it has computed to the cache, while others have had less; that must be more than the last time."""
        for req in self.running:
            self.waiting.charge(req.params.client, max(0, req.num_computed - req.num_charged))
            req.num_charged = max(req.num_charged, req.num_computed)
        req = self.running[-1]
        num_left = req.num_tokens - req.num_computed + len(self.running)
        most, _ = self._share(req, req.num_computed, num_left, self.config.max_prefill_length)
        is_long = num_left > most and self.config.cache_type == "radix"
        is_further = req.num_saved >= req.num_interrupted + self._page_size and not req.tells_prompt
        if is_long and is_further and self.pages.rows and self.waiting.overtakes(req.params.client):
            req.num_interrupted = req.num_saved
            self._retract(req)

    def _make_way(self, req: Req, missing: int) -> None:
        """So many pages are too few for a waiting request, or there is no row (0). If another client has twice what it
        wants and four times what its client has, that one's youngest go back to the queue."""
        client, wanted = req.params.client, div_ceil(len(req.tokens), self._page_size) if missing else 1
        held: Counter[str] = Counter()
        for other in self.running:
            held[other.params.client] += len(other.pages) if missing else 1
        most = max(held, key=held.__getitem__, default=client)
        if any(other.retracted for other in self.leaving):
            return
        for other in self.running[::-1]:
            if held[most] >= 4 * held[client] + 2 * wanted and other.params.client == most:
                gain = len(other.pages) if missing else 1
                held[most], missing = held[most] - gain, missing - gain
                self._retract(other)
                if missing <= 0:
                    break

    def _sit_out(self, req: Req) -> ReqOutput:
        """A request goes on as if the step had not been planned: its last token is computed again once it is resumed.
        Steps in flight went on from a token that there is not; a state that has seen it is of no use."""
        req.num_tokens, req.num_computed = len(req.tokens), len(req.tokens) - 1
        req.num_stale, req.held, req.num_saved = req.num_inflight, True, -1
        return ReqOutput(req, ())

    def _accept(self, req: Req, ids: tuple[int, ...], logprobs: bytes = b"") -> ReqOutput:
        """The tokens that a step has sampled: one, and as many more as its draft was right. logprobs: of these."""
        tokens, params, prompt, req.prompt_logprobs = req.tokens, req.params, req.prompt_logprobs, b""
        num_hidden, reason, error = 0, None, None
        for num, token_id in enumerate(ids):  # so many before it are kept
            req.num_tokens += num > 0
            if token_id < 0:
                reason, error = FinishReason.ERROR, "the model's output was not finite (NaN or infinity)"
            elif params.max_tokens == 0:
                reason = FinishReason.LENGTH
            else:
                tokens.append(token_id)
                if token_id in req.ends and len(tokens) > req.prompt_len + params.min_tokens:
                    num, num_hidden, reason = num + 1, int(not params.include_stop_str_in_output), FinishReason.STOP
                elif len(tokens) >= req.max_len:
                    num, reason = num + 1, FinishReason.LENGTH
            if reason is not None:
                logprobs = logprobs[: len(logprobs) // len(ids) * num]
                return self._finish(ReqOutput(req, ids[:num], reason, num_hidden, error, 500, logprobs, prompt))
        return ReqOutput(req, ids, None, 0, None, 500, logprobs, prompt)

    def _wait(self, req: Req, *, first: bool = False) -> None:
        self.reqs[req.uid] = req
        self.waiting.put(req.params.client, req.uid, req, first=first)

    def _retract(self, req: Req) -> None:
        """Send a running request back to the queue. What it has computed stays in the cache while there is room."""
        self.num_retracted += 1
        self.running.remove(req)
        self.leaving.append(req)
        req.retracted = True
        self._release_leaving()

    def _finish(self, output: ReqOutput) -> ReqOutput:
        """The request's last output, now that it has ended."""
        req = output.req
        del self.reqs[req.uid]
        self.speculation.forget([req.uid])
        if req.state is ReqState.WAITING:
            self.waiting.remove(req.params.client, req.uid)
        elif not req.retracted:
            self.running.remove(req)
            self.leaving.append(req)
        req.state, req.failed = ReqState.FINISHED, output.finish_reason is FinishReason.ERROR
        self._release_leaving()
        return output

    def _release_leaving(self) -> None:
        """Requests that no step in flight touches any more give back rows and pages; retracted ones wait again."""
        for req in self.leaving:
            if not req.num_inflight:
                self.pages.release(req)
                req.retracted = False
                if req.state is not ReqState.FINISHED:
                    req.state, req.prefix = ReqState.WAITING, np.array(req.tokens, np.int32)
                    self._wait(req, first=True)
        self.leaving = [req for req in self.leaving if req.num_inflight]
