"""How long drafts are, where they come from, and whose they are."""

from __future__ import annotations

import logging
from dataclasses import replace
from unittest.mock import Mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from minisgl.config.draft import longest_draft
from minisgl.config.runtime import SchedulerConfig
from minisgl.core import Grammar, Req, ReqOutput, SamplingParams, ScheduledReq
from minisgl.kvcache.radix import PrefixCache
from minisgl.scheduler.drafters import MAX_MATCH, MIN_MATCH, QUOTED, Lookup, Prediction, TreePath, find_repeated
from minisgl.scheduler.plan import PlanBuilder
from minisgl.scheduler.planner import Planner
from minisgl.scheduler.speculation import Lengths, Speculation
from tests.simulator import GuessingDrafter, SimulatedEngine, SimulatedHandle, expected_output

CONFIG = SchedulerConfig(64, 512, 200, 4096, 4, draft_len=8, integrity_fatal=True, check_integrity=1)
PARAMS = SamplingParams(max_tokens=60, seed=0, ignore_eos=True)


def serve(planner: Planner, params: list[SamplingParams]) -> tuple[list[ReqOutput], list[int]]:
    """The last output of each request, and how many tokens of drafts each step had."""
    engine, last, sizes = SimulatedEngine(planner.config), dict[int, ReqOutput](), list[int]()
    outputs: dict[int, list[int]] = {uid: [] for uid in range(len(params))}
    for uid, one in enumerate(params):
        planner.add(uid, [uid, 1, 2], one)
    while not planner.is_idle:
        planned = planner.plan()
        assert planned is not None
        assert not planned.plan.drafts or planner.plan() is None, "it is not known where the next step begins"
        sizes.append(sum(len(draft.ids) for draft in planned.plan.drafts))
        for output in planner.retire(engine.submit(planned.plan).result()):
            outputs[output.req.uid] += output.token_ids
            last[output.req.uid] = output
    assert outputs == {uid: expected_output([uid, 1, 2], 3 + len(ids), ()) for uid, ids in outputs.items()}
    return [last[uid] for uid in outputs], sizes


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_longest_suffix_that_came_before(ids: list[int]) -> None:
    def ends(length: int) -> list[int]:
        return [end for end in range(length, len(ids)) if ids[end - length : end] == ids[-length:]]

    lengths = [length for length in range(MIN_MATCH, min(MAX_MATCH, len(ids) - 1) + 1) if ends(length)]
    array = np.array(ids, np.int32)
    assert find_repeated(array, array, len(ids)) == ((ends(max(lengths)), max(lengths)) if lengths else ([], 0))
    for place in range(len(ids)):
        near = [end for end in range(place + 1, min(place + QUOTED + 1, len(ids))) if ids[end - 1] == ids[-1]]
        assert lengths or find_repeated(array, array, place) == (near, bool(near))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20), st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=20)
)
def test_a_text_that_grows_is_searched_as_if_it_was_new(prompt: list[int], more: list[list[int]]) -> None:
    req, longest = Mock(tokens=[*prompt], prefix=np.array(prompt, np.int32)), 0
    drafter, tokens = Lookup(req), req.tokens
    for ids in more:
        tokens += ids
        ends, length = find_repeated(array := np.array(tokens, np.int32), array, len(tokens))
        draft, longest = list(drafter.propose(req, 0, 4)), max(longest, length)
        if longest < QUOTED:
            end = ends[-1] if length else 0
            assert draft == tokens[end : end + min(4, max(0, 2 * length - 3))]
        else:  # a place that holds is not left for a later one
            places = [end for end in range(1, len(tokens)) if tokens[end - min(2, length) : end] == tokens[-2:]]
            places = places or [end for end in range(1, len(tokens)) if tokens[end - 1] == tokens[-1]]
            assert any(draft == tokens[end : end + 4] for end in places) if length else len(draft) <= 4


def test_who_has_said_much_again_is_expected_to_go_on() -> None:
    """Also behind a word that is another one: the next one that is the text's is enough there."""
    text = [*range(100, 140)]
    req = Mock(tokens=[*text, 1, *text[:2]], prefix=np.array([*text, 1], np.int32))
    drafter = Lookup(req)
    assert drafter.propose(req, 0, 15) == text[2:3]
    req.tokens += text[2 : QUOTED - 1]
    assert drafter.propose(req, 0, 15) == text[QUOTED - 1 :][: 2 * QUOTED - 5]
    assert drafter.propose(req, 1, 15) == text[QUOTED:][: 2 * QUOTED - 6]
    req.tokens += text[QUOTED - 1 : 10]
    assert drafter.propose(req, 0, 15) == text[10:25], "as many as there may be"
    req.tokens += [*text[10:12], 7]
    assert drafter.propose(req, 0, 15) == [], "nobody knows what this is"
    req.tokens += [text[13]]
    assert drafter.propose(req, 0, 15) == text[14:29]
    assert drafter.propose(req, 1, 15) == text[15:30]
    req.tokens += [8, text[20]]
    assert drafter.propose(req, 0, 15) == text[21:36]
    req.tokens += [9, text[39 - QUOTED // 2]]
    assert drafter.propose(req, 0, 15) == [], "it is too far from where the text was left"
    req.tokens += [text[3]]
    assert drafter.propose(req, 0, 15) == [], "and so is this"
    req.tokens += [text[4]]
    assert drafter.propose(req, 0, 8) == [*text[5:12], 7], "two are found anywhere, and what was said last comes next"


def test_a_request_says_how_long_its_drafts_may_be() -> None:
    planner = Planner(CONFIG, GuessingDrafter(lambda uid, position: 64))
    params = [PARAMS, replace(PARAMS, speculate=0), replace(PARAMS, speculate=2), replace(PARAMS, speculate=64)]
    last, _ = serve(planner, params)
    counts = [output.req.drafted for output in last]
    assert counts[1] == (0, 0)
    assert counts[0] == counts[3]
    assert 50 < counts[0][0] <= 59
    assert 0 < counts[2][0] <= 40
    assert all(wrong == 0 for _, wrong in counts)
    num = sum(x for x, _ in counts)
    assert planner.speculation.num_drafted == planner.speculation.num_right == {"off": num}


def test_wrong_and_right_tokens_are_counted() -> None:
    planner = Planner(CONFIG, GuessingDrafter(lambda uid, position: 3))
    (output,), sizes = serve(planner, [PARAMS])
    right, wrong = output.req.drafted
    assert right + wrong == sum(sizes) == planner.speculation.num_drafted.total()
    assert right + 1 + sizes.count(0) <= 60 <= right + len(sizes)


def test_who_drafts_badly_gets_little(caplog: pytest.LogCaptureFixture) -> None:
    config = replace(CONFIG, step_costs=(0.1, 0.03))
    noise = serve(Planner(config, GuessingDrafter(lambda uid, position: 0)), [PARAMS])[1]
    right = serve(Planner(config, GuessingDrafter(lambda uid, position: 64)), [PARAMS])[1]
    assert sum(noise[20:]) <= 8
    assert len(noise) >= 60
    assert len(right) < 20


def test_drafts_end_where_many_run() -> None:
    config = replace(CONFIG, step_costs=(0.1, 0.03))
    _, sizes = serve(Planner(config, GuessingDrafter(lambda uid, position: uid % 2)), [PARAMS] * 48)
    assert sum(sizes) < 48 * 60 // 20


def test_drafts_do_not_take_a_step_out_of_its_graph() -> None:
    config = replace(CONFIG, max_running_requests=64, cuda_graph_max_bs=24)
    drafter = GuessingDrafter(lambda uid, position: 64)
    for num, most in (8, 16), (40, 24):  # of 40 requests no step is captured: op by op there is room for all drafts
        _, sizes = serve(Planner(config, drafter), [PARAMS] * num)
        assert sizes[:3] == [0, most, most], sizes


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_no_other_length_gives_more(rate: float) -> None:
    def value(length: int) -> float:
        return (1 + sum(rate**i for i in range(1, length + 1))) / (1 + 0.2 * (1 + length))

    best = Lengths((0.2, 0.0, 0, 0), 1, 1, 32).best(rate, 0, 16)
    assert value(best) == max(value(length) for length in range(17))


@pytest.mark.parametrize(("rate", "asked", "length"), [(0.5, None, 8), (0.5, 2, 2), (0.5, 0, 0), (0.1, None, 0)])
def test_drafts_are_whole_where_steps_have_room_for_no_less(rate: float, asked: int | None, length: int) -> None:
    assert Lengths((0.2, 0.0, 9, 0), 1, 1, 32).best(rate, 0, 8, asked) == length
    assert Lengths((0.2, 0.0, 0, 0), 1, 1, 32).best(rate, 0, 8, asked) <= min(length, 2)


def test_a_drafter_that_fails_costs_drafts(caplog: pytest.LogCaptureFixture) -> None:
    planner = Planner(CONFIG, GuessingDrafter(lambda uid, position: -1 if uid == 1 and position > 20 else 64))
    with caplog.at_level(logging.ERROR):
        last, _ = serve(planner, [PARAMS, PARAMS])
    assert [record.getMessage() for record in caplog.records] == [
        "request 1 goes on without drafts: the drafter has failed"
    ]
    assert last[0].req.drafted[0] > 2 * last[1].req.drafted[0] > 0


@pytest.mark.parametrize("is_left", [False, True])
def test_a_wrong_draft_in_the_first_share_of_a_model_with_states(is_left: bool) -> None:
    """A short request that went back to the queue computes all of its tokens, and the draft, in one share."""
    config = replace(CONFIG, has_states=True, num_snapshots=4)
    planner, engine = Planner(config, GuessingDrafter(lambda uid, position: 0)), SimulatedEngine(config)
    planner.add(0, [0, 1, 2], replace(PARAMS, max_tokens=30))
    req, ids, first_shares = planner.reqs[0], list[int](), 0
    while not planner.is_idle:
        planned = planner.plan()
        assert planned is not None
        handle = engine.submit(planned.plan)
        if planned.plan.drafts and planned.plan.reqs[0].start == 0:
            first_shares += 1
            if is_left:
                planner.abort(0)
        for output in planner.retire(handle.result()):
            ids += output.token_ids
        if len(ids) == 1 and not first_shares:
            planner._retract(req)
    assert first_shares
    assert is_left or ids == expected_output([0, 1, 2], 33, ())


def test_a_text_of_one_token_and_a_prompt_that_is_an_array() -> None:
    ends, length = find_repeated(same := np.full(100_000, 7, np.int32), same, 0)
    assert (ends[-1], length) == (99_999, MAX_MATCH)
    req = Mock(tokens=[5, 6, 7, 8, 5, 6], prefix=np.array([5, 6, 7], np.int32))
    drafter = Lookup(req)
    assert list(drafter.propose(req, 0, 2)) == [7]
    req.tokens += [7, 9, 5, 6, 7]
    assert list(drafter.propose(req, 0, 4)) == [9, 5, 6], "three have come again"
    assert list(drafter.propose(req, 1, 4)) == [5, 6]
    assert list(drafter.propose(req, 1, 0)) == []


def test_a_prediction_is_the_draft_and_finds_its_place_again() -> None:
    text = [10, 11, 12, 13, 20, 21, 22, 23, 10, 11, 12, 30, 31, 32, 33, 34]
    req, prediction = Mock(tokens=[1, 2, 10, 11], prompt_len=4), Prediction(text, 4)
    assert prediction.propose(req, 0, 4) == text[:4], "the output is expected to begin with it"
    assert prediction.propose(req, 1, 4) == text[1:5]
    req.tokens += [10, 11]
    assert prediction.propose(req, 0, 8) == text[2:10]
    req.tokens += [99, 98]
    assert prediction.propose(req, 0, 8) == [], "it has left the prediction, where the prompt is not looked for"
    req.tokens += [10, 11, 12]
    assert prediction.propose(req, 0, 8) == text[3:11], "of the next place"
    req.tokens += [30, 31, 32]
    assert prediction.propose(req, 0, 8) == text[14:]
    req.tokens += [33, 34, 35]
    assert prediction.propose(req, 0, 8) == []


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=20))
def test_a_prediction_says_what_it_has_behind_the_last_tokens(text: list[int], more: list[list[int]]) -> None:
    req, prediction = Mock(tokens=[7], prompt_len=1), Prediction(text, 1)
    for ids in more:
        req.tokens += ids
        output = req.tokens[1:]
        draft = list(prediction.propose(req, 0, 4))
        places = [end for end in range(2, len(text)) if text[end - 2 : end] == output[-2:]]
        places = places or [end for end in range(1, len(text)) if text[end - 1 : end] == output[-1:]]
        begins = output == text[: len(output)]
        assert draft == [] or begins or any(draft == text[end : end + len(draft)] for end in places)
        assert not begins or draft == text[len(output) : len(output) + 4]


@pytest.mark.parametrize("speculate", ["off", "ngram"])
@pytest.mark.parametrize("wrong", [0, 20, 1])
def test_predictions_make_steps_fewer_and_change_nothing(speculate: str, wrong: int) -> None:
    """wrong: one in so many of the prediction's tokens is; 1: all."""
    planner = Planner(replace(CONFIG, speculate=speculate))
    expected = expected_output([0, 1, 2], 63, ())
    guess = [49 - token if wrong and i % wrong == wrong - 1 else token for i, token in enumerate(expected)]
    last, sizes = serve(planner, [replace(PARAMS, prediction=tuple(guess)), PARAMS])
    right, bad = last[0].req.drafted
    assert planner.speculation.num_right["prediction"] == right
    assert planner.speculation.num_drafted["prediction"] == right + bad
    if wrong == 1:
        assert right < 5
    else:
        assert right > (50 if wrong == 0 else 30)
        assert bad <= (0 if wrong == 0 else right)
    assert len(sizes) >= 60, "the other one has no draft"
    assert not planner.speculation.is_on or speculate == "ngram", "it is forgotten"


def test_nobody_else_is_looked_at_for_the_sake_of_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan must not take longer for all requests because one of them brings a draft."""
    planner, asked = Planner(CONFIG), set[int]()
    propose = planner.speculation._propose
    monkeypatch.setattr(planner.speculation, "_propose", lambda req, *more: asked.add(req.uid) or propose(req, *more))
    serve(planner, [PARAMS, replace(PARAMS, prediction=tuple(expected_output([1, 1, 2], 63, ()))), PARAMS])
    assert asked == {1}


def test_there_are_no_predictions_where_none_can_be_verified() -> None:
    planner = Planner(replace(CONFIG, draft_len=0))
    (output,), _ = serve(planner, [replace(PARAMS, prediction=tuple(expected_output([0, 1, 2], 63, ())))])
    assert output.req.drafted == (0, 0)
    planner = Planner(CONFIG)
    params = replace(PARAMS, speculate=0, prediction=tuple(expected_output([0, 1, 2], 63, ())))
    (output,), _ = serve(planner, [params])
    assert output.req.drafted == (0, 0)


def test_drafts_without_a_drafter_only_where_nobody_pays_for_them() -> None:
    assert longest_draft("off", None, is_free=False) == longest_draft("off", 5, is_free=False) == 0
    assert longest_draft("off", None, is_free=True) == longest_draft("ngram", None, is_free=True) == 15, "on a CPU"
    assert longest_draft("mtp", None, is_free=False) == 3 and longest_draft("mtp", None, is_free=True) == 8
    assert longest_draft("off", 5, is_free=True) == longest_draft("ngram", 5, is_free=False) == 5
    assert longest_draft("ngram", None, is_free=False) == 31, "on a GPU"
    assert all(longest_draft("ngram", None, is_free, states=(1,)) == 8 for is_free in (False, True)), "of hybrids"


PATHS = st.lists(st.tuples(st.sampled_from([b"", b"a"]), st.lists(st.integers(0, 2), max_size=14)), max_size=12)


@given(PATHS, st.sampled_from([1, 2, 4]), st.sampled_from([b"", b"a", b"b"]), st.lists(st.integers(0, 2), min_size=1),
       st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=12))  # fmt: skip
@example([(b"", [0, 0]), (b"", [0, 0, 0])], 1, b"", [0], [(0, 0, True)])  # the edge ends with what is pending
def test_a_tree_says_what_its_namespace_had_behind_the_same_tokens(
    paths: list[tuple[bytes, list[int]]],
    page_size: int,
    namespace: bytes,
    prompt: list[int],
    turns: list[tuple[int, int, bool]],
) -> None:
    """turns: tokens that the request gets, as it was told or others; pages that are evicted; whether one is pending."""
    cache, page = PrefixCache(page_size), iter(range(1000))
    for other, ids in paths:
        handle = cache.match(other, np.empty(0, np.int32)).handle
        cache.lock(handle)
        pages = [next(page) for _ in range(len(ids) // page_size)]
        cache.unlock(cache.insert(other, handle, np.array(ids, np.int32), pages))
    known = [ids[: len(ids) // page_size * page_size] for other, ids in paths if other == namespace]
    handle = cache.match(namespace, np.array(prompt, np.int32)).handle
    cache.lock(handle)
    req, drafter, is_first = Mock(tokens=[*prompt], handle=handle, namespace=namespace), TreePath(page_size), True
    for num_told, num_evicted, is_pending in turns:
        num, tokens = len(req.tokens) + is_pending, req.tokens
        draft = list(drafter.propose(req, is_pending, 3))
        going_on = [ids[num : num + 3] for ids in known if ids[: len(tokens)] == tokens and len(ids) > num]
        assert not draft or any(draft == ids[: len(draft)] for ids in going_on)
        assert not is_first or bool(draft) == bool(going_on), "what is not evicted yet is found"
        cache.evict(num_evicted)
        is_first = False
        if not is_pending:
            req.tokens += [*draft, 1, 0, 2][:num_told]


def ask_again(planner: Planner, params: list[SamplingParams]) -> list[int]:
    """The same prompt, one after the other: how many steps each takes."""
    engine, steps = SimulatedEngine(planner.config), list[int]()
    for uid, one in enumerate(params):
        ids = list[int]()
        planner.add(uid, [1, 2, 3], one)
        steps.append(0)
        while not planner.is_idle:
            planned = planner.plan()
            assert planned is not None
            steps[-1] += 1
            for output in planner.retire(engine.submit(planned.plan).result()):
                ids += output.token_ids
        assert ids == expected_output([1, 2, 3], 3 + len(ids), ()) and len(ids) == one.max_tokens
    return steps


@pytest.mark.parametrize("kind", ["plain", "states", "windows"])
def test_a_question_that_comes_again_takes_few_steps(kind: str) -> None:
    states = {"has_states": True, "num_snapshots": 8} if kind == "states" else {}
    windows = {"window": 8, "num_window_pages": 64} if kind == "windows" else {}
    planner = Planner(replace(CONFIG, speculate="ngram", **states, **windows))
    steps = ask_again(planner, [PARAMS, PARAMS, replace(PARAMS, max_tokens=100)])
    assert steps[0] >= 55 and steps[1] < 15
    assert steps[2] < 60, "as far as it is known"
    assert planner.speculation.num_right["tree"] >= 100
    assert planner.speculation.num_drafted["tree"] < 1.1 * planner.speculation.num_right["tree"]


def test_nobody_is_told_what_another_tenant_asked() -> None:
    """Neither by the text of drafts nor by the number of steps."""
    planner = Planner(replace(CONFIG, speculate="ngram"))
    tenants = [replace(PARAMS, cache_salt=salt) for salt in ("a", "b", "", "c", "a")]
    steps = ask_again(planner, tenants)
    assert len({*steps[:4]}) == 1
    assert steps[4] < 15
    right = planner.speculation.num_right["tree"]
    assert right == planner.speculation.num_drafted["tree"] > 40, "only the tenant's own text was a draft"


def test_text_that_only_begins_alike_costs_little() -> None:
    """Where a tree is wrong again and again, its drafts get short, and lookup has its turn."""
    cache, tokens = PrefixCache(4), [*range(40)]
    handle = cache.match(b"", np.empty(0, np.int32)).handle
    cache.lock(handle)
    cache.insert(b"", handle, np.array([*tokens, *range(40, 80)], np.int32), [*range(20)])
    req, drafter = Mock(tokens=[*range(44)], handle=cache.match(b"", np.arange(40, dtype=np.int32)).handle), TreePath(4)
    req.namespace = b""
    assert drafter.propose(req, 0, 8) == [*range(44, 52)]
    assert drafter.propose(req, 1, 8) == [*range(45, 53)]
    req.tokens += [44, 45]
    assert drafter.propose(req, 0, 3) == [46, 47, 48]
    req.tokens += [99]
    assert list(drafter.propose(req, 0, 8)) == []
    req.tokens += [49]
    assert list(drafter.propose(req, 0, 8)) == [], "this is no path of the tree"


def test_a_path_that_was_left_for_another_is_found_again() -> None:
    cache = PrefixCache(4)
    handle = cache.match(b"", np.empty(0, np.int32)).handle
    for _ in range(2):
        cache.lock(handle)
    cache.insert(b"", handle, np.array([1, 2, 3, 4, 5, 6, 70, 80, *range(40)], np.int32), [*range(12)])
    cache.insert(b"", handle, np.array([1, 2, 3, 4, 5, 6, 7, 8, *range(60, 100)], np.int32), [*range(20, 32)])
    prompt = np.array([1, 2, 3, 4, 5], np.int32)
    req, drafter = Mock(tokens=[*prompt.tolist()], handle=cache.match(b"", prompt).handle, namespace=b""), TreePath(4)
    assert drafter.propose(req, 0, 3) == [6, 7, 8], "the newest"
    req.tokens += [6, 70]
    drafts = []
    for token in [80, *range(20)]:
        drafts.append(list(drafter.propose(req, 0, 4)))
        req.tokens.append(token)
    assert drafts[0] == [], "it was wrong"
    assert drafts[1] == [0] and drafts[2] == [1, 2, 3] and drafts[-1] == [19, 20, 21, 22]


def test_a_draft_of_a_request_that_has_ended_is_nobodys() -> None:
    """Neither right nor wrong, and no name of a drafter is made up for it."""
    planner = Planner(CONFIG, GuessingDrafter(lambda uid, position: 64))
    engine = SimulatedEngine(planner.config)
    planner.add(0, [0, 1, 2], PARAMS)
    while not (planned := planner.plan() or pytest.fail("it waits")).plan.drafts:
        planner.retire(engine.submit(planned.plan).result())
    before = dict(planner.speculation.num_drafted)
    planner.abort(0)
    assert planner.retire(engine.submit(planned.plan).result()) == [] and planner.is_idle
    assert dict(planner.speculation.num_drafted) == before


def test_nobody_is_asked_where_no_draft_would_pay() -> None:
    """And somebody is, where those of all would, as far as their graph has room for them."""
    asked = list[int]()

    class Watched(GuessingDrafter):
        def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
            asked.append(req.uid)
            return super().propose(req, num_pending, most)

    for verify_cost, max_batch, pays in (50.0, 0, False), (0.03, 0, True), (0.4, 0, True), (0.4, 5, False):
        asked.clear()
        config = replace(CONFIG, step_costs=(0.01, verify_cost), cuda_graph_max_bs=max_batch)
        serve(Planner(config, Watched(lambda uid, position: 64)), [PARAMS] * 4)
        assert bool(asked) == pays


def test_many_are_not_asked_in_vain_more_often_than_one() -> None:
    """What that takes of a host, all of them wait for."""
    asked = list[int]()

    class Knows(GuessingDrafter):
        def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
            asked.append(req.uid)
            return super().propose(req, num_pending, most) if len(req.tokens) > 500 else []

    config = replace(CONFIG, max_seq_len=2048, num_pages=4096, step_costs=(0.001, 0.03))
    for num in (1, 8):
        asked.clear()
        params = [replace(PARAMS, max_tokens=1000)] * num
        _, sizes = serve(Planner(config, Knows(lambda uid, position: 64)), params)
        assert len(asked) < 1.3 * 500 + sum(size > 0 for size in sizes) * num
        assert len(sizes) < 620, "who guesses right at last is heard soon"


def test_many_that_quote_need_no_draft_that_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one wrong token in three would not pay, as one is in flight: who has said much again is seldom wrong."""
    monkeypatch.setattr("tests.simulator.next_token", lambda prefix, vocab_size: len(prefix) % 20)
    config = replace(CONFIG, speculate="ngram", num_pages=2048, draft_len=31, step_costs=(0.025, 0.7))
    planner, engine, handles = Planner(config), SimulatedEngine(config), list[SimulatedHandle]()
    for uid in range(8):
        planner.add(uid, [uid, 1, 2], replace(PARAMS, max_tokens=150))
    while not planner.is_idle:
        if planned := planner.plan():
            handles.append(engine.submit(planned.plan))
        if not planned or len(handles) == 2:
            planner.retire(handles.pop(0).result())
    assert planner.speculation.num_right["ngram"] > 8 * 75
    assert engine.num_steps < 90


def test_what_a_wide_graph_computes_is_paid_for() -> None:
    """One request's draft makes it whole drafts of all."""

    class First(GuessingDrafter):
        def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
            return [] if req.uid else super().propose(req, num_pending, most)

    for max_batch, gains in (0, True), (256, False):
        costs, graphs = (0.02, 0.0), {"has_states": True, "cuda_graph_max_bs": max_batch}
        config = replace(CONFIG, speculate="ngram", step_costs=costs, **graphs)
        _, sizes = serve(Planner(config, First(lambda uid, position: 64)), [PARAMS] * 24)
        assert (max(sizes[:30]) > 0) == gains


@pytest.mark.parametrize(("costs", "num_wrong"), [((0.019, 0.5), 8), ((0.0056, 0.053), 20), ((0.15, 0.56), 4)])
def test_who_was_wrong_at_first_is_asked_again(costs: tuple[float, float], num_wrong: int) -> None:
    """Also where what is thought of it would just pay for a token, but not for a step that verifies."""
    wrong = [*range(num_wrong)]

    class Learns(GuessingDrafter):
        def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
            right = super().propose(req, num_pending, most)
            return [(token + 1) % 50 for token in right] if wrong and wrong.pop() >= 0 else right

    config = replace(CONFIG, max_seq_len=4096, num_pages=4096, step_costs=costs)
    _, sizes = serve(Planner(config, Learns(lambda uid, position: 64)), [replace(PARAMS, max_tokens=3000)])
    assert len(sizes) < 1500


def test_requests_with_a_grammar_have_drafts_of_text_that_comes_again() -> None:
    config = replace(CONFIG, speculate="ngram", step_costs=(0.01, 0.03))
    planner = Planner(config, GuessingDrafter(lambda uid, position: 64))
    _, sizes = serve(planner, [replace(PARAMS, grammar=Grammar("regex", ".*"))])
    assert sum(sizes) > 30


def test_who_has_failed_gets_guesses_again_in_time() -> None:
    """Of a head, which is not asked in between."""
    speculation = Speculation(replace(CONFIG, speculate="mtp", step_costs=(0.3, 0.33)))
    req = Mock(uid=1, num_computed=10, prompt_len=2, num_tokens=12, tokens=[0] * 11, max_len=100, params=PARAMS)
    req.held = req.paced = req.num_stale = False
    shares = [(req, ScheduledReq(0, 11, 1, 1))]
    speculation._rates[1], num = 0.42, 0
    while not speculation._wanted(shares, 1):
        assert not speculation._drafts(shares, 1, PlanBuilder(8))
        num += 1
        assert num < 1000
    assert num > 30
