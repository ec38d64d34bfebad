"""What a GPU's engine makes of plans: captured steps, padding, drafts in them. No GPU is needed: a step that was
captured is computed again by the function that would have been captured, from the same static tensors."""

import ctypes
import functools
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minisgl.attention.base import AttentionBackend, AttentionStep
from minisgl.attention.sdpa import attend
from minisgl.config.model import AttentionSpec
from minisgl.config.runtime import EngineConfig, SchedulerConfig
from minisgl.config.states import DeltaNet, State
from minisgl.core import (
    ID_PENDING,
    MASK_NOT_READY,
    MASK_PENDING,
    MASK_READY,
    NOT_READY,
    Admission,
    Masks,
    PageUpdate,
    ReqOutput,
    SamplingParams,
    ScheduledReq,
    StepPlan,
    StepResult,
)
from minisgl.distributed.comm import Communicator
from minisgl.engine import cuda
from minisgl.engine.cuda import CapturedSteps
from minisgl.engine.draft import SecondModel
from minisgl.engine.engine import create_engine
from minisgl.engine.graph import RunStep
from minisgl.engine.rules import apply_bitmask
from minisgl.engine.shapes import GraphShape, captured_shapes, fit
from minisgl.engine.shard import ModelShard
from minisgl.engine.staging import DeviceTables
from minisgl.engine.step import StepRunner
from minisgl.engine.tables import StepIndex
from minisgl.kernel.ops import PagedSequences, TorchOps
from minisgl.kernel.sampling import SamplingColumns, TokenStore, penalize
from minisgl.kvcache.pool import LayerCache
from minisgl.scheduler.speculation import Speculation
from tests.draft_kernels import DraftKernels
from tests.driver import engine_config
from tests.integration.test_mtp import NUM_DRAFTS, Head, generate, made
from tests.integration.test_speculation import NUM_TOKENS, Knowing, ids_of, logprobs_of, run
from tests.models import tiny_model

Tensor = torch.Tensor
__all__ = ["made"]  # a fixture


class OnDevice(AttentionBackend[PagedSequences]):
    """Reads of a step what lies on the device, as kernels do that can be captured."""

    def prepare(self, step: AttentionStep, captured: bool) -> PagedSequences:
        return step.on_device()

    def forward(
        self, q: Tensor, cache: LayerCache, spec: AttentionSpec, metadata: PagedSequences, sinks: Tensor | None = None
    ) -> Tensor:
        out, seqs = torch.empty_like(q), metadata
        for i, (row, end) in enumerate(zip(seqs.rows.tolist(), seqs.seq_lens.tolist(), strict=True)):
            begin, stop = seqs.cu_q[i : i + 2].tolist()
            positions = torch.arange(end)
            slots = seqs.page_table[row, positions // seqs.page_size].long() * seqs.page_size
            k, v = (x[slots + positions % seqs.page_size].transpose(0, 1) for x in cache)
            mask = torch.arange(end - stop + begin, end)[:, None] >= positions
            out[begin:stop] = attend(q[begin:stop].transpose(0, 1), k, v, mask, spec, sinks).transpose(0, 1)
        return out


class Graphs:
    """In place of `DecodeGraphs`. Of what a GPU computes once while it captures, the largest and the smallest step."""

    def __init__(self, prepare: Callable[[GraphShape], RunStep], shapes: list[GraphShape]) -> None:
        self.replayed: list[GraphShape] = []
        self._runs, self._results = dict[GraphShape, RunStep](), dict[GraphShape, tuple[Tensor, Tensor]]()
        for shape in reversed(shapes):
            self._runs[shape] = prepare(shape)
            if shape in (shapes[0], shapes[-1]):
                self._results[shape] = self._runs[shape]()

    def replay(self, shape: GraphShape) -> Tensor:
        self.replayed.append(shape)
        self._results[shape] = self._runs[shape]()
        return self._results[shape][0]

    def logits(self, shape: GraphShape) -> Tensor:
        return self._results[shape][1]


class Ops(TorchOps):
    def captures_chunks(self, kinds: Sequence[State]) -> bool:
        return all(isinstance(kind, DeltaNet) for kind in kinds)


def at(kind: Any, address: int, num: int) -> Any:
    return (kind * num).from_address(address)


class RuleOps(Ops):
    """Reads the rules from tables on the device, as kernels do that sample by them, and waits for masks as they do."""

    most_ruled = 1 << 20

    def sample(self, logits: Tensor, columns: SamplingColumns, out: Tensor, store: TokenStore | None = None) -> Tensor:
        assert store is not None and store.places is not None
        address, *board, began = store.places.tolist()
        assert began == 0
        changed, masks = self._changed(logits, columns, store, address), columns["mask"].tolist()
        for row, mask in enumerate(masks):
            if mask >= 0:
                self._mask(changed[row : row + 1], *board[:2], mask)
        super().sample(changed, columns, out)
        for row, mask in enumerate(masks):
            if mask >= 0:
                if changed[row].isnan().all():
                    out[row] = NOT_READY
                at(ctypes.c_int32, board[2], mask + 1)[mask] = int(out[row])
        self.store_ids(store.token_ids, store.rows, columns["position"], out)
        return out

    def _mask(self, logits: Tensor, words: int, states: int, mask: int) -> None:
        """NaN: it is not ready."""
        deadline, num_words = time.monotonic() + 60, -(-logits.shape[1] // 32)
        while (state := at(ctypes.c_int32, states, mask + 1)[mask]) == MASK_PENDING:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        own = np.ctypeslib.as_array(at(ctypes.c_int32, words + 4 * mask * num_words, num_words)).copy()
        apply_bitmask(logits, torch.from_numpy(own)[None])
        if state != MASK_READY:
            logits.fill_(math.nan)

    def _changed(self, logits: Tensor, columns: SamplingColumns, store: TokenStore, address: int) -> Tensor:
        num_rows, changed = len(store.token_ids), logits.float().clone()
        bounds = at(ctypes.c_int32, address, num_rows + 1)
        total = bounds[num_rows]
        ids = at(ctypes.c_int32, address + 4 * (num_rows + 1), total)
        values = at(ctypes.c_float, address + 4 * (num_rows + 1 + total), total)
        for i, row in enumerate(store.rows.tolist()):
            own, position = columns.select(torch.tensor([i])), int(columns["position"][i])
            penalize(changed[i : i + 1], own, store.token_ids[row : row + 1, :position].long())
            for entry in range(bounds[row], bounds[row + 1]):
                if values[entry] != -math.inf or position < int(own["min_len"]):
                    changed[i, ids[entry]] += values[entry]
        return changed


class DraftOps(RuleOps):
    """A step goes on where the one before it has got, as that is found on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.draft = DraftKernels()


class Engine:
    """A `core.Executor` of captured steps."""

    def __init__(self, config: EngineConfig, ops: TorchOps | None = None) -> None:
        with torch.inference_mode():
            shard = ModelShard(config, torch.device("cpu"), Communicator(), ops or Ops())
            tables = DeviceTables(config, shard.ops, shard.ropes, shard.device)
            row = tables.padding_row
            tables.page_table[row] = tables.host.pages[row] = config.num_pages
            given, second = config.model.second, None
            if given is not None and shard.head is None:
                second = SecondModel(shard, *given)
                second.create_attention = OnDevice  # type: ignore[method-assign, assignment]
            pages, backend = [config.num_pages + 1] * 2, OnDevice()
            self.steps = CapturedSteps(shard, tables, backend, pages, config.cuda_graph_max_bs, second)  # type: ignore[arg-type]
        self.num_plain = 0  # steps that only decode, and whose states are up to date

    def submit(self, plan: StepPlan, masks: Masks | None = None) -> Any:
        self.num_plain += plan.num_decode == len(plan.reqs) and not any(share.num_accepted for share in plan.reqs)
        with torch.inference_mode():
            result: StepResult = self.steps.launch(plan, masks).result(plan)
        return SimpleNamespace(result=lambda: result)

    def close(self) -> None:
        pass


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """Those that engines make."""
    made = list[Graphs]()
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)

    def make(*args: Any) -> Graphs:
        made.append(Graphs(*args))
        return made[-1]

    for name in ("empty", "zeros", "full"):
        create = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, pin_memory=False, create=create, **how: create(*size, **how))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: event)
    monkeypatch.setattr(cuda, "DecodeGraphs", make)
    return made


@functools.cache
def uncaptured(family: str) -> tuple[EngineConfig, SchedulerConfig, list[list[ReqOutput]]]:
    """What is computed without drafts, step by step, and how."""
    config = engine_config(tiny_model(family), page_size=4, num_pages=256, max_running_requests=128)
    has_states = bool(config.model.states)
    if has_states:
        config = replace(config, num_snapshots=8)
    rows, chunk, longest = config.max_running_requests, 64, config.max_seq_len
    states = {"has_states": has_states, "num_snapshots": config.num_snapshots}
    planning = SchedulerConfig(rows, chunk, longest, 256, 4, check_integrity=1, integrity_fatal=True, **states)
    reference = create_engine(config)
    expected = run(reference, planning, None)[0]
    reference.close()
    return config, planning, expected


FAMILIES = ["qwen3", "qwen3_moe", "qwen3_5_text", "lfm2"]
KINDS = ["none", "right", "noise", "some", "ngram"]
# Each family and each kind with both, in turn: rules know neither of drafts nor of layers.
CASES = [
    pytest.param(
        family, kind, (Ops, RuleOps)[(i + j) % 2](), id=f"{family}-{kind}" + "-rules in kernels" * ((i + j) % 2)
    )
    for i, family in enumerate(FAMILIES)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("family", "kind", "ops"), CASES)
def test_captured_steps_give_the_same_with_drafts(family: str, kind: str, ops: Ops, graphs: list[Graphs]) -> None:
    config, planning, expected = uncaptured(family)
    truth = {uid: ids_of(outputs) for uid, outputs in enumerate(expected)}
    lengths: dict[str, Callable[[int], int]] = {
        "right": lambda _: 64,
        "noise": lambda _: 0,
        "some": lambda n: n * 7 % 5,
    }
    drafter = Knowing(truth, lengths[kind]) if kind in lengths else None
    planning = replace(planning, speculate="ngram" if kind == "ngram" else "off")
    engine = Engine(replace(config, draft_len=8, cuda_graph_max_bs=128), ops)
    told, num_steps = run(engine, planning, drafter)
    for outputs, wanted in zip(told, expected, strict=True):
        assert ids_of(outputs) == ids_of(wanted)
        parts, others = (logprobs_of(some) for some in (outputs, wanted))
        for part, one in zip(parts, others, strict=True):
            np.testing.assert_allclose(part[0], one[0], atol=1e-4)
            assert [token for token, _ in part[1]] == [token for token, _ in one[1]]
    replayed = graphs[-1].replayed
    if (
        family == "lfm2"
    ):  # its short convolutions take a request's tokens one by one: steps that verify are not captured
        assert len(replayed) == engine.num_plain
        assert not any(shape.is_wide for shape in replayed)
    if family != "lfm2" or kind not in lengths:
        assert len(replayed) > num_steps // 3, "hardly anything was captured"
    if family == "qwen3_5_text" and kind in lengths:
        assert any(shape.num_tokens > shape.num_reqs for shape in replayed)
    assert kind != "right" or num_steps < NUM_TOKENS // 2


@pytest.mark.parametrize("reads", [0, 300, 1 << 16])
@pytest.mark.parametrize("speculate", ["off", "mtp"])
def test_short_prompts_are_captured_too(
    speculate: str, reads: int, made: tuple[Path, Any, Head], graphs: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in parts, and beside what decodes; those whose tokens would read too much before them are not."""
    by_hand = list[StepPlan]()
    launch = StepRunner._launch

    def counted(runner: StepRunner, plan: StepPlan, *known: Any) -> Any:
        by_hand.append(plan)
        return launch(runner, plan, *known)

    monkeypatch.setattr(StepRunner, "_launch", counted)
    monkeypatch.setattr(cuda, "_PROMPT_READS", reads)
    config = {"draft_len": NUM_DRAFTS * (speculate == "mtp"), "cuda_graph_max_bs": 128, "max_running_requests": 128}
    outputs, drafts = generate(made[0], speculate, create=Engine, **config)
    num_by_hand = len(by_hand)
    assert (outputs, drafts) == generate(made[0], speculate)
    assert (num_by_hand == 0) == (reads > 300) and graphs[-1].replayed
    for plan in by_hand[:num_by_hand]:
        prompts = [req for req in plan.reqs if req.num_new > req.num_samples]
        assert sum(req.num_new * (req.start + req.num_new) for req in prompts) > reads


@pytest.mark.parametrize("max_batch", [0, 64])
def test_a_head_tells_the_same_without_the_host(
    made: tuple[Path, Any, Head], max_batch: int, graphs: list[Graphs]
) -> None:
    """As the one that asks for each token: those drafts are compared with transformers'."""
    config = {"draft_len": NUM_DRAFTS, "cuda_graph_max_bs": max_batch}
    outputs, drafts = generate(made[0], "mtp", create=Engine, **config)
    expected = generate(made[0], "mtp")
    assert outputs == expected[0] == generate(made[0], "off")[0]
    assert drafts == expected[1]
    assert bool(graphs[-1].replayed) == (max_batch > 0)


def test_a_head_goes_on_after_steps_that_tell_nothing(
    made: tuple[Path, Any, Head], graphs: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph that tells drafts holds all three requests, and none of them has one meanwhile."""
    drafts_of = Speculation._drafts
    monkeypatch.setattr(Speculation, "_drafts", lambda self, all, *_: {} if len(all) > 2 else drafts_of(self, all, *_))
    outputs, _ = generate(made[0], "mtp", create=Engine, draft_len=NUM_DRAFTS, cuda_graph_max_bs=8)
    assert outputs == generate(made[0], "off")[0]
    tells = [shape.is_wide for shape in graphs[-1].replayed]
    assert tells.count(False) > 3 and any(tells[tells.index(False) :])


@pytest.mark.parametrize("max_batch", [0, 32])
def test_a_head_of_a_hybrid_changes_nothing(max_batch: int, graphs: list[Graphs]) -> None:
    path = tiny_model("qwen3_5_text", mtp_num_hidden_layers=1)
    config = {"draft_len": NUM_DRAFTS, "cuda_graph_max_bs": max_batch, "max_running_requests": 4, "dummy_weight": True}
    outputs, drafts = generate(path, "mtp", create=Engine, **config)
    assert outputs == generate(path, "off", dummy_weight=True)[0]
    assert drafts == generate(path, "mtp", dummy_weight=True)[1]
    assert any(shape.is_wide for shape in graphs[-1].replayed) == (max_batch > 0)


@pytest.mark.parametrize("max_batch", [0, 8, 32])
@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_steps_that_follow_one_whose_end_is_not_known(
    made: tuple[Path, Any, Head], family: str, by_kernel: bool, max_batch: int, graphs: list[Graphs]
) -> None:
    """Captured steps find on the device where they go on; others, and those whose rules the host has, wait for it."""
    is_hybrid = family == "qwen3_5_text"
    path = tiny_model(family, mtp_num_hidden_layers=1) if is_hybrid else made[0]
    ops, weights = DraftOps() if by_kernel else Ops(), {"dummy_weight": True} if is_hybrid else {}
    config = {"draft_len": NUM_DRAFTS, "cuda_graph_max_bs": max_batch, "max_running_requests": 4}
    create = functools.partial(Engine, ops=ops)
    outputs, drafts = generate(path, "mtp", create=create, ahead=1, **config, **weights)
    assert outputs == generate(path, "off", **weights)[0]
    assert drafts == generate(path, "mtp", ahead=1, **weights)[1]
    assert not isinstance(ops, DraftOps) or max_batch < 32 or ops.draft.num_followed > 3


@pytest.mark.parametrize(("draft_len", "most"), [(3, 64), (4, 51), (8, 28)])
def test_every_step_with_drafts_fits_a_shape(draft_len: int, most: int) -> None:
    shapes = [one for one in captured_shapes(256, draft_len, 2048) if one.is_wide]
    rng = random.Random(0)
    for num in range(1, most + 1):
        for _ in range(20):
            counts = [rng.choice((1, rng.randint(1, draft_len), draft_len + 1)) for _ in range(num)]
            reqs = [ScheduledReq(i, 9, n, n) for i, n in enumerate(counts)]
            found = fit(shapes, reqs, row=999)
            assert found is not None, counts
            shape, padding = found
            together = (*reqs, *padding)
            assert (sum(req.num_new for req in together), len(together)) == shape
            assert all(req.row == 999 and req.num_new == req.num_samples > 0 for req in padding)


class LateMasks:
    """Two, of which the second is not ready. Where a device waits for them they come from a thread, after a while."""

    def __init__(self, words: np.ndarray, seconds: float = 0.2) -> None:
        self.shape, self._words, self._seconds = words.shape, words, seconds
        self.asked: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None

    def __call__(self, words: np.ndarray, states: np.ndarray, ids: np.ndarray | None) -> None:
        assert self.asked is None and states.tolist() == [MASK_PENDING] * 2
        self.asked = words, states, ids
        if ids is None:
            self.compute()
        else:
            assert ids.tolist() == [ID_PENDING] * 2
            threading.Timer(self._seconds, self.compute).start()

    def compute(self) -> None:
        assert self.asked is not None
        words, states, _ = self.asked
        words[:] = self._words
        states[0] = MASK_READY
        time.sleep(self._seconds / 10)
        states[1] = MASK_NOT_READY


@pytest.mark.parametrize("ops", [Ops, RuleOps])
@pytest.mark.parametrize("max_batch", [0, 8])
def test_masks_of_captured_steps_forbid_tokens(graphs: list[Graphs], ops: type[Ops], max_batch: int) -> None:
    """Steps with a grammar beside plain ones, one with a mask that is not ready; the same as a CPU's engine samples.
    With kernels that follow rules it is the device that waits for masks."""
    config = uncaptured("qwen3")[0]
    engines = Engine(replace(config, cuda_graph_max_bs=max_batch), ops()), create_engine(config)
    words = np.zeros((2, -(-config.model.vocab_size // 32)), np.int32)
    words[:, 1] = 0b1000
    pages = tuple(PageUpdate(row, 0, (row,), (row,)) for row in range(3))
    ids = np.array([5, 6, 7], np.int32)
    admissions = tuple(Admission(row, ids, SamplingParams(4, 0.0, seed=row), 3, ()) for row in range(3))
    first = StepPlan(0, admissions, pages, tuple(ScheduledReq(row, 0, 3, 1) for row in range(3)), 0)
    second = StepPlan(1, (), (), tuple(ScheduledReq(row, 3, 1, 1) for row in range(3)), 3, masked=(0, 2))
    found, told = [], []
    for engine in engines:
        masks = LateMasks(words)
        handles = [engine.submit(first), engine.submit(second, masks)]
        found.append([handle.result().token_ids for handle in handles])
        assert masks.asked is not None
        told.append(masks.asked[2])
        engine.close()
    assert graphs and found[0] == found[1] and bool(graphs[-1].replayed) == (max_batch > 0)
    assert found[0][1][0] == (35,) and found[0][1][2] == (NOT_READY,)
    assert (told[0] is None) == (ops is Ops)
    assert all(ids.tolist() == [35, NOT_READY] for ids in told if ids is not None) and told[1] is not None


def test_the_memory_of_masks_is_theirs_until_they_are_there(graphs: list[Graphs]) -> None:
    """And used again four steps after those whose masks are, and those of the next step, which read its ids."""
    config = uncaptured("qwen3")[0]
    tables = Engine(replace(config, cuda_graph_max_bs=8), RuleOps()).steps.tables
    words = np.zeros((2, -(-config.model.vocab_size // 32)), np.int32)
    plan = StepPlan(1, (), (), tuple(ScheduledReq(row, 3, 1, 1) for row in range(3)), 3, masked=(0, 2))
    masks = [LateMasks(words, 1e6 if number in (1, 6) else 0.0) for number in range(12)]
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "Timer", lambda seconds, run: SimpleNamespace(start=run if not seconds else int))
        for one in masks:
            tables.send(plan, StepIndex.of(plan.reqs), one)
    used = [one.asked[0] for one in masks if one.asked is not None]
    shared = {(i, j) for i in range(12) for j in range(i) if np.shares_memory(used[i], used[j])}
    since = {(i, j): range(j, i, 4) for i in range(12) for j in range(i) if (i - j) % 4 == 0}
    assert shared == {pair for pair, steps in since.items() if not {0, 1, 5, 6} & {*steps}}
