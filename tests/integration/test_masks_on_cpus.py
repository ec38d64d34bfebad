"""Masks on a CPU: the thread without Python's lock computes them, as soon as the step before has told its tokens."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

import minisgl
from minisgl import LLM, SamplingParams
from minisgl.core import (
    ID_PENDING,
    MASK_NOT_READY,
    MASK_PENDING,
    MASK_READY,
    Admission,
    Grammar,
    PageUpdate,
    ScheduledReq,
    StepPlan,
)
from minisgl.engine.cpu import Asked, CpuHandle, CpuRunner, CpuTables, WholeStep
from minisgl.engine.tables import StepIndex
from minisgl.errors import ConfigError
from minisgl.grammar import source
from minisgl.grammar.source import Vocabulary, VocabularyConfig, load_vocabulary, to_llguidance
from minisgl.kernel.masks import MaskRow, MaskWorker, NativeMatcher, Words, tell
from minisgl.scheduler.matching import walk
from tests.driver import CPU_KERNELS, engine_config

VOCAB, WORDS = 4096, 128
ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
SCHEMA = {"type": "array", "items": {**ITEM, "required": ["name", "age"]}, "minItems": 90}
GRAMMARS = Grammar("json", json.dumps(SCHEMA)), Grammar("regex", "([0-9]{4}-[0-9]{2} ){100}")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    config = VocabularyConfig(str(Path(minisgl.__file__).parent / "demo_model"), VOCAB, (2,))
    return load_vocabulary(config, is_native=True)


def native_matcher(vocabulary: Vocabulary, grammar: Grammar) -> NativeMatcher:
    matcher = vocabulary.matcher(to_llguidance(grammar, vocabulary.special), "x")
    assert isinstance(matcher, NativeMatcher)
    return matcher


def a_walk(vocabulary: Vocabulary, grammar: Grammar, num: int) -> list[int]:
    """Tokens that the grammar allows."""
    matcher, random, ids = native_matcher(vocabulary, grammar).deep_copy(), np.random.default_rng(5), list[int]()
    for _ in range(num):
        words = np.empty(WORDS, np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        ids.append(int(random.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")))))
        assert matcher.take(ids[-1:], len(ids))
    return ids


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_draft_is_walked_along_as_by_pythons_matcher(
    vocabulary: Vocabulary, grammar: Grammar, is_wrong: bool
) -> None:
    """And the matcher is where it was."""
    ids = a_walk(vocabulary, grammar, 12)
    native, text = native_matcher(vocabulary, grammar).deep_copy(), to_llguidance(grammar, vocabulary.special)
    python = LLMatcher(vocabulary.tokenizer, text, log_level=0)
    assert native.take(ids[:4], 4) and python.consume_tokens(ids[:4])
    draft = [*ids[4:8], 0, *ids[8:]] if is_wrong else ids[4:]
    (ours, is_whole), (theirs, _) = (walk(matcher, draft, WORDS, 10.0) for matcher in (native, python))
    assert is_whole and len(ours) == len(theirs) == (5 if is_wrong else 9)
    assert np.array_equal(ours, theirs)
    assert native.num_tokens == 4 and np.array_equal(walk(native, (), WORDS, 1.0)[0][0], theirs[0])


class Waiting:
    """Masks of one row, which a worker computes behind the token of the step before."""

    shape = 1, WORDS

    def __init__(self, worker: MaskWorker, matcher: NativeMatcher, before: Words) -> None:
        self._worker, self._matcher, self._before = worker, matcher, before

    def __call__(self, words: Words, states: Words, ids: Words | None) -> None:
        row = MaskRow(self._matcher.address, self._before.ctypes.data, 1, -1, 0)
        self._worker.submit(np.array([row], np.int64), words, states, self._before)


def test_a_step_waits_for_masks_and_these_for_the_token_before(vocabulary: Vocabulary) -> None:
    matcher, (token, *_) = native_matcher(vocabulary, GRAMMARS[1]).deep_copy(), a_walk(vocabulary, GRAMMARS[1], 1)
    worker, before = MaskWorker(1.0), np.full(1, ID_PENDING, np.int32)
    asked = Asked(Waiting(worker, matcher, before), (0,))
    words, states = np.zeros((1, WORDS), np.int32), np.zeros(1, np.int32)
    step = threading.Thread(target=asked, args=(words, states, None))
    step.start()
    time.sleep(0.1)
    assert step.is_alive() and matcher.num_tokens == 0
    before[0] = token
    tell()
    step.join(10)
    assert states[0] == MASK_READY and matcher.num_tokens == 1
    assert np.array_equal(words[0], walk(matcher, (), WORDS, 1.0)[0][0])
    worker.close()


def test_a_worker_that_nobody_closes_holds_up_no_exit() -> None:
    script = "from minisgl.kernel.masks import MaskWorker; worker = MaskWorker(1.0); import time; time.sleep(0.2)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_a_step_is_told_when_the_next_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the planner's thread then has to do needs Python's lock, which layers do not."""
    events, compute, tell_of = list[str](), WholeStep.__call__, CpuHandle.set_result

    def computed(self: WholeStep, *args: Any) -> Any:
        events.append("begin")
        found = compute(self, *args)
        events.append("end")
        return found

    def told(self: CpuHandle, result: Any) -> None:
        events.append("told")
        tell_of(self, result)

    monkeypatch.setattr(WholeStep, "__call__", computed)
    monkeypatch.setattr(CpuHandle, "set_result", told)
    with LLM(device="cpu", dtype="float32", speculate="off") as llm:
        events.clear()
        llm.generate([[10, 20, 30]], SamplingParams(40, 0.0, ignore_eos=True), progress=False)
    assert events.count("begin") == events.count("told") >= 40
    inside = [events[i - 1 : i + 2] == ["begin", "told", "end"] for i, event in enumerate(events) if event == "told"]
    assert sum(inside) > 20


class Never:
    shape = 2, WORDS

    def __init__(self) -> None:
        self.ids = np.empty(0, np.int32)

    def __call__(self, words: Words, states: Words, ids: Words | None) -> None:
        assert ids is not None
        states[0], self.ids = MASK_NOT_READY, ids


def test_masks_that_never_come_stop_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.engine.cpu._MASK_SECONDS", 0.05)
    masks, words, states = Never(), np.zeros((2, WORDS), np.int32), np.zeros(2, np.int32)
    asked = Asked(masks, (1, 3))
    asked(words, states, None)
    assert states.tolist() == [MASK_NOT_READY, MASK_PENDING]
    asked.tell(torch.tensor([10, 11, 12, 13], dtype=torch.int32))
    assert masks.ids.tolist() == [11, 13]


def outputs_of(prompts: Sequence[list[int]], **options: Any) -> list[list[int]]:
    each = [SamplingParams(48, 0.8, seed=i, ignore_eos=True, grammar=GRAMMARS[i % 2]) for i in range(len(prompts))]
    with LLM(device="cpu", dtype="float32", max_running_requests=8, **options) as llm:
        for _ in range(2):  # the first time masks are not known to be cheap
            outputs = [output.token_ids for output in llm.generate(list(prompts), each, progress=False)]
    return outputs


def test_outputs_are_those_of_pythons_matchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's masks come from the worker, most of them from one look at the table of the step before."""
    num_jobs, submit = 0, MaskWorker.submit

    def counted(self: MaskWorker, *args: Any) -> None:
        nonlocal num_jobs
        num_jobs += 1
        submit(self, *args)

    def fail(*_: object) -> None:
        raise ConfigError("there is no compiler")

    prompts = [[10 + 5 * i, 20 + i, 30] for i in range(6)]
    monkeypatch.setattr(MaskWorker, "submit", counted)
    ours = outputs_of(prompts)
    assert num_jobs > 40
    assert outputs_of(prompts, disable_overlap=True) == ours
    monkeypatch.setattr(source, "NativeVocabulary", fail)
    num_before = num_jobs
    assert outputs_of(prompts) == ours and num_jobs == num_before


@pytest.mark.parametrize("num", [1, 2, 4])
def test_drafts_behind_plain_steps_have_masks_of_their_own(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions begin while a step without drafts is in flight, and end where they are wrong."""
    monkeypatch.setattr("minisgl.engine.cpu._MASK_SECONDS", 60.0)
    monkeypatch.setattr("minisgl.config.resolve.step_costs", lambda _: (0.02, 0.0))  # several draft, too
    prompts = [[10 + 5 * i, 20 + i, 30] for i in range(num)]
    plain = outputs_of(prompts, speculate="off")
    each = [SamplingParams(48, 0.8, seed=i, ignore_eos=True, grammar=GRAMMARS[i % 2]) for i in range(num)]
    told = [tuple(3 if i % 8 == 7 else token for i, token in enumerate(ids[5:])) for ids in plain]
    guessed = [replace(params, prediction=ids) for params, ids in zip(each, told, strict=True)]
    with LLM(device="cpu", dtype="float32", max_running_requests=8, speculate="off") as llm:
        for _ in range(3):
            start = time.monotonic()
            outputs = llm.generate(list(prompts), guessed, progress=False)
            assert [output.token_ids for output in outputs] == plain and time.monotonic() - start < 50
        # How far a draft is looked at is a matter of the time that its masks take.
        assert llm.scheduler.planner.speculation.num_right["prediction"] > 0


class There:
    """Masks that are there before the step is, but for one that comes too late for its head."""

    def __init__(self, words: Words, late: int) -> None:
        self.shape, self._words, self._late = words.shape, words, late

    def __call__(self, words: Words, states: Words, ids: Words | None) -> None:
        words[:], states[:] = self._words, MASK_READY
        states[self._late : self._late + 1] = MASK_PENDING


def some_masks(num: int) -> Words:
    """One token, few, most of a part, all but some; and nothing at all."""
    random, masks = np.random.default_rng(num), np.zeros((num, 32 * WORDS), np.bool_)
    for i, mask in enumerate(masks):
        if i % 5 < 2:
            mask[random.choice(VOCAB, (1, 9)[i % 5], replace=False)] = True
        else:
            mask[: (1000, VOCAB - 40, 0)[i % 5 - 2]] = True
    return np.packbits(masks, axis=1, bitorder="little").view(np.int32)


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
@pytest.mark.parametrize("num", [1, 2, 3, 14, 40])
def test_logits_that_no_mask_allows_are_left_out(num: int, dtype: str, quantization: str | None) -> None:
    """All others are what they are without masks, to the bit, as are all of rows whose mask is not there yet, and of
    those that tell log-probabilities."""
    model = Path(minisgl.__file__).parent / "demo_model"
    options = {"num_threads": 2, "max_running_requests": num, "quantization": quantization, "dtype": dtype}
    runner = CpuRunner(engine_config(model, **{**CPU_KERNELS, **options}), rank=0)
    steps, tables, masked = runner.steps, runner.steps.tables, [i for i in range(num) if i % 7 != 3]
    tells = [i for i in range(num) if i % 6 == 2]
    each = [SamplingParams(8, 0.0, seed=0, logprobs=2 if i in tells else None) for i in range(num)]
    given = [Admission(i, np.array([10 + i, 20, 30 + i], np.int32), params) for i, params in enumerate(each)]
    updates = [PageUpdate(i, 0, tuple(range(3 * i, 3 * i + 3))) for i in range(num)]
    plan = StepPlan(
        0, tuple(given), tuple(updates), tuple(ScheduledReq(i, 0, 3, 1) for i in range(num)), masked=tuple(masked)
    )
    words, late = some_masks(len(masked)), min(5, len(masked))
    with torch.inference_mode():
        assert isinstance(steps.forward, WholeStep)
        index = StepIndex.of(plan.reqs)
        tables.host.apply(plan)
        found = []
        for masks in (None, Asked(There(words, late), plan.masked)):
            tables.send(plan, index, masks)
            steps.forward._logits = torch.full((num, VOCAB), torch.nan)
            found.append(steps.forward(steps.batch(index, 0)).logits(None).clone().numpy())
    runner.close()
    plain, ours = found
    assert np.isfinite(plain).all()
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB].astype(np.bool_)
    wanted = np.ones((num, VOCAB), np.bool_)
    wanted[masked] = allowed
    wanted[[*masked[late : late + 1], *tells]] = True
    assert np.array_equal(ours[wanted], plain[wanted])
    assert np.isnan(ours[~wanted]).mean() > 0.85


def test_log_probabilities_beside_grammars_are_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a stream with a grammar, too: they are told of the logits before its mask."""

    def told() -> list[Any]:
        each = [SamplingParams(24, 0.8, seed=i, ignore_eos=True, grammar=GRAMMARS[i % 2]) for i in range(4)]
        each = [replace(params, logprobs=5) if i % 2 else params for i, params in enumerate(each)]
        with LLM(device="cpu", dtype="float32", max_running_requests=8, speculate="off") as llm:
            for _ in range(2):  # the first time masks are not known to be cheap
                outputs = llm.generate([[10 + i, 20, 30] for i in range(4)], each, progress=False)
            return [(output.token_ids, output.logprobs) for output in outputs]

    ours = told()
    send = CpuTables.send

    def without(self: CpuTables, *args: Any) -> None:
        send(self, *args)
        self.masks = (None,) * 3

    monkeypatch.setattr(CpuTables, "send", without)
    assert told() == ours and ours[1][1]
