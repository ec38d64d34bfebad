"""A device that computes nothing, but notices every wrong read.

Instead of keys and values, a slot of its KV pool remembers the exact token prefix that was computed into it, and for
which salt. When a step attends to a position, the slot that the page table names must hold that very prefix; a page
that was freed too early, shared wrongly or never written is caught at its first use. The next token is a hash of the
prefix, so outputs do not depend on how the work was scheduled unless something is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from minisgl.config.runtime import SchedulerConfig
from minisgl.core import NOT_READY, Masks, Req, StepPlan, StepResult, num_right
from minisgl.engine.tables import resolved
from minisgl.errors import EngineError


def next_token(prefix: tuple[int, ...], vocab_size: int) -> int:
    return hash(prefix) % vocab_size


class SimulatedHandle:
    def __init__(self, result: StepResult | Exception) -> None:
        self._result = result

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def result(self) -> StepResult:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class SimulatedEngine:
    """An `Executor`. `fail_next`: the next step raises; `poison`: sampled tokens of these rows are not finite;
    `unready`: masks of these rows are not there; `missing`: nor those of these samples of the next step. `told`: of
    what is asked for behind a request's tokens, so many tokens are right; below 0: none is told, as by captured steps
    that have no room for drafts; None: the head fails.

    After a failed step the KV that later steps write is garbage, until the planner has been told (`broken = False`).
    With `has_states` each row has a state, too, which remembers the tokens that it has seen and for which salt; so do
    the slots of snapshots, which are copied as the plans say. With a `window`, layers that see no further have
    pages and tables of their own.
    """

    def __init__(self, config: SchedulerConfig, vocab_size: int = 50) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.fail_next = False
        self.broken = False
        self.poison: list[int] = []
        self.unready: list[int] = []
        self.missing: list[int] = []
        self.told: Callable[[tuple[int, ...]], int] | None = len
        self.num_steps = self.num_following = 0  # those that go on where the one before has got to
        self.max_step_tokens = 0
        self._before = StepPlan(-1, (), (), ()), StepResult(-1, [])
        max_pages = -(-(config.max_seq_len + 1) // config.page_size)
        self._tokens = np.full((config.max_running_requests, config.max_seq_len + 1), -1, np.int64)
        self._page_table = np.full((config.max_running_requests, max_pages), -1, np.int64)
        self._window_table = self._page_table.copy()
        self._salts = [""] * config.max_running_requests
        self._kv: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._window_kv: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._states: dict[int, tuple[str | None, tuple[int, ...], tuple[int, ...]]] = {}  # seen; kept
        self._pooled: dict[int, tuple[str, int, list[int]]] = {}  # by row: kind, tokens of the prompt, those seen

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> SimulatedHandle:
        self.num_steps += 1
        self.num_following += any(share.follows for share in plan.reqs)
        plan = resolved(plan, *self._before, [], self.config.has_states)
        self._before = StepPlan(-1, (), (), ()), StepResult(-1, [])
        self.max_step_tokens = max(self.max_step_tokens, plan.num_tokens)
        assert plan.reqs
        assert all(req.num_new > 0 for req in plan.reqs), "a share of nothing"
        assert plan.num_tokens <= self.config.max_prefill_length
        assert len({req.row for req in plan.reqs}) == len(plan.reqs), "a row is scheduled twice"
        is_decode = [req.num_new == req.num_samples == 1 for req in plan.reqs]
        assert is_decode == sorted(is_decode, reverse=True), "prefill comes before decode"
        assert sum(is_decode) == plan.num_decode
        for row, ids, params, prompt_len, _ in plan.admissions:
            assert params.seed is not None
            self._pooled[row] = params.pooling, prompt_len, []
            self._tokens[row], self._salts[row] = -1, params.cache_salt
            self._page_table[row] = self._window_table[row] = -1
            self._tokens[row, : len(ids)] = ids
        for row, first, pages, window_pages in plan.page_updates:
            assert len(window_pages) == len(pages) * (self.config.window > 0)
            assert all(0 <= page < self.config.num_window_pages for page in window_pages)
            self._page_table[row, first : first + len(pages)] = pages
            self._window_table[row, first : first + len(window_pages)] = window_pages
        for row, _, pages, window_pages in plan.expected:
            assert self._page_table[row, : len(pages)].tolist() == [*pages]
            assert self._window_table[row, : len(window_pages)].tolist() == [*window_pages]
        verified = {req.row: (req.start + req.num_new, req.num_samples) for req in plan.reqs}
        for row, position, ids in plan.drafts:
            assert verified[row] == (position + len(ids), len(ids) + 1), "a draft is no part of its share"
            self._tokens[row, position : position + len(ids)] = ids
        if self.fail_next or self.broken:
            failed, self.fail_next, self.broken = self.fail_next, False, True
            sampled = self._run_broken(plan)
            return SimulatedHandle(EngineError("simulated") if failed else StepResult(plan.step_id, sampled))
        result = StepResult(plan.step_id, self._run(plan), pooled=self._vectors(plan))
        self._before = plan, result._replace(drafts=self._drafts(plan, result))
        return SimulatedHandle(self._before[1])

    def _drafts(self, plan: StepPlan, result: StepResult) -> dict[int, list[int]]:
        """What a head tells behind the last token that is kept of each request that asks."""
        if self.told is None:
            return {}
        guesses, ids, told = {draft.row: draft.ids for draft in plan.drafts}, iter(result.token_ids), {}
        for i, share in enumerate(plan.reqs):
            sampled = next(ids) if share.num_samples else ()
            if share.next_draft_len:
                kept = num_right(guesses.get(share.row, ()), sampled)
                end = share.start + share.num_new - share.num_samples + 1 + kept
                tokens = [*self._tokens[share.row, :end].tolist(), sampled[kept]]
                right = self.told(tuple(tokens))
                for place in range(share.next_draft_len * (right >= 0)):
                    token = next_token(tuple(tokens), self.vocab_size)
                    tokens.append(token if place < right else (token + 1) % self.vocab_size)
                told[i] = tokens[-share.next_draft_len :] if right >= 0 else []
        return told

    def _vectors(self, plan: StepPlan) -> dict[int, bytes]:
        """Of a prompt's mean all its tokens as they were computed, else the one that would come next."""
        vectors = {}
        for i, (row, start, num_new, num_samples, *_) in enumerate(plan.reqs):
            kind, prompt_len, seen = self._pooled[row]
            ids = tuple(self._tokens[row, : start + num_new].tolist())
            seen += ids[start:]
            assert not kind or not num_samples, "nothing is sampled for a vector"
            if kind and start + num_new == prompt_len:
                vector = bytes(seen) if kind == "mean" else bytes([next_token(ids, self.vocab_size)])
                vectors[i] = b"" if row in self.poison else vector
        return vectors

    def _run(self, plan: StepPlan) -> list[tuple[int, ...]]:
        self._copy(plan)
        for row, start, num_new, num_samples, _, num_accepted, _ in plan.reqs:
            ids = tuple(self._tokens[row, : start + num_new].tolist())
            assert -1 not in ids, "a token is computed before it is known"
            for position in range(start, start + num_new):
                for kv, slot, _ in self._layers(row, position):
                    kv[slot] = self._salts[row], ids[: position + 1]
            if self.config.has_states:
                salt, seen, kept = self._states[row]
                known = (self._salts[row], ids[:start]) if start else (None, ())
                assert (salt, seen + kept[:num_accepted]) == known, "a state has seen other tokens than its sequence's"
                sure = start + num_new - max(0, num_samples - 1)
                self._states[row] = self._salts[row], ids[:sure], ids[sure:]
        sampled: list[tuple[int, ...]] = []
        for row, start, num_new, num_samples, *_ in plan.reqs:
            end = start + num_new
            ids = tuple(self._tokens[row, :end].tolist())
            for position in range(end):
                known = self._salts[row], ids[: position + 1]
                for kv, slot, seen in self._layers(row, position):
                    assert position + seen <= start or kv.get(slot) == known, "someone else's KV is read"
            is_unready, count = row in self.unready, sum(map(len, sampled))
            samples = [next_token(ids[: end + 1 - i], self.vocab_size) for i in range(num_samples, 0, -1)]
            self._tokens[row, end + 1 - num_samples : end + 1] = samples
            for i in range(num_samples):
                if count + i in plan.masked and (is_unready or count + i in self.missing):
                    self._tokens[row, end + 1 - num_samples + i] = 0
                    samples[i] = NOT_READY
            if num_samples:
                sampled.append((-1,) * num_samples if row in self.poison else tuple(samples))
        return sampled

    def pages_of(self, plan: StepPlan) -> dict[int, str]:
        """The pages that a plan just submitted reads or writes, each with the one salt whose requests do."""
        salts: dict[int, str] = {}
        for req in plan.reqs:
            for page in self._page_table[req.row, : -(-(req.start + req.num_new) // self.config.page_size)].tolist():
                assert salts.setdefault(page, self._salts[req.row]) == self._salts[req.row], "a page has two salts"
        return salts

    def _copy(self, plan: StepPlan) -> None:
        garbage = "", (-1,), ()
        for source, target in plan.states:
            self._states[target] = (None, (), ()) if source < 0 else self._states.get(source, garbage)
            if self.broken:
                self._states[target] = garbage

    def _run_broken(self, plan: StepPlan) -> list[tuple[int, ...]]:
        self._copy(plan)
        for row, start, num_new, num_samples, *_ in plan.reqs:
            for position in range(start, start + num_new):
                for kv, slot, _ in self._layers(row, position):
                    kv[slot] = "", (-1,)
            self._states[row] = "", (-1,), ()
            self._tokens[row, start + num_new + 1 - num_samples : start + num_new + 1] = 0
        return [(0,) * req.num_samples for req in plan.reqs if req.num_samples]

    def _layers(self, row: int, position: int) -> Iterator[tuple[dict[int, tuple[str, tuple[int, ...]]], int, int]]:
        """Of both kinds of layers: what their slots hold, this position's slot, and how many tokens a position sees."""
        tables = [(self._kv, self._page_table, self.config.max_seq_len)]
        if self.config.window:
            tables.append((self._window_kv, self._window_table, self.config.window))
        for kv, table, seen in tables:
            page = int(table[row, position // self.config.page_size])
            assert page >= 0, "a page is used before it is there"
            yield kv, page * self.config.page_size + position % self.config.page_size, seen

    def close(self) -> None:
        pass


def expected_output(prompt: list[int], max_len: int, eos: tuple[int, ...], vocab_size: int = 50) -> list[int]:
    """What any correct schedule produces for a prompt."""
    tokens = list(prompt)
    while len(tokens) < max_len:
        tokens.append(next_token(tuple(tokens), vocab_size))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


class GuessingDrafter:
    """How many of the tokens that it proposes are right, `length(uid, position)` says; what follows is noise. It fails
    where that is negative."""

    def __init__(self, length: Callable[[int, int], int], vocab_size: int = 50) -> None:
        self._length, self._vocab_size = length, vocab_size

    def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
        tokens, num_right = list(req.tokens), self._length(req.uid, len(req.tokens)) + num_pending
        if num_right < num_pending:
            raise RuntimeError("the drafter fails")
        for i in range(num_pending + most):
            token = next_token(tuple(tokens), self._vocab_size)
            tokens.append(token if i < num_right else (token + 1) % self._vocab_size)
        return tokens[len(req.tokens) + num_pending :]
