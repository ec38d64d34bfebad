"""Masks that are known from another place of a regular expression: bit by bit what llguidance computes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

import minisgl
from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar import source
from minisgl.grammar.source import Vocabulary, VocabularyConfig, load_vocabulary, to_llguidance
from minisgl.grammar.store import GrammarStore
from minisgl.kernel.jit import load_masks
from minisgl.kernel.masks import NativeMatcher, Words

MODEL = str(Path(minisgl.__file__).parent / "demo_model")
VOCAB, WORDS, EOS = 4096, 128, 2
FOLLOWED = (
    r"([a-z]+ ){5000}",
    r"([a-z]+ ){3}",
    r"([a-z]+ ){20,40}",
    r"([a-z]+( [a-z]+)*\n){500}",
    r"([a-zA-Z ]{1,400}x){100}",
    r"[a-z]{1,100}",
    r"[a-z]{70}",
    r"[a-z ]{0,30}",
    r"[a-z]{40,}",
    r"([a-z]{1,3} ){20,}",
    r"[^\n]*",
    r"[^a-z]{1,200}",
    r".{0,50}x",
    r"(.|\n)*end",
    r'"([^"\\]|\\["\\nt])*"',
    r"(\w+@\w+\.(com|org|net) ){200}",
    r"(\w+\s?)+[.!?]",
    r"\D{3,40}\d",
    r"[^\w]*a",
    r"((\w[a-m]+|[^a-z][n-z]+) ?)+",
    r"(a|b|ab|[a-c]{2,5})*d",
    r"a?b?c?d?(e|f)?[x-z]*",
    r"(x{0,3}y?){0,90}",
    r"((a|b)*c){40}",
    r"(yes|no|maybe){30}",
    r"(one two|one three|one )+",
    r"[+\-*/0-9() ]+",
    r"[a^-]+ [-b]*",
    r"(?:[a-z]+,)*[a-z]+",
    r"(([a-z]{1,9} ){2,4}[A-Z]+; ){50}",
    r"(\+[0-9]{2} [0-9]{3} [0-9]{6}; ){200}",
)
NOT_FOLLOWED = (
    r"(?i)([a-z]+ ){50}",
    r"([a-z]+? ){50}",
    r"([a-z&&[^b]]+ ){50}",
    r"([[:lower:]]+ ){50}",
    r"([\x61-\x7a]+ ){50}",
    r"([\p{Ll}]+ ){50}",
    r"([a-zä]+ ){50}",
)

TIMES = st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{3,}", "{30,90}", "{500}"])
ATOMS = st.sampled_from(
    [*"ab -]", ".", "[a-c]", "[^b]", "[a-]", "[^]a]", "[ab^]", r"\w", r"\s", r"[\d.]", r"\.", r"\n", "é"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda some: f"({'|'.join(some)})"),
        st.tuples(inner, TIMES).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(ATOMS, TIMES).map("".join),
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary(VocabularyConfig(MODEL, VOCAB, (EOS,)), is_native=True)


@pytest.fixture(autouse=True)
def _all_masks_are_dear() -> Iterator[None]:
    load_masks().limit_known(64 << 20, 0.0)
    yield
    load_masks().limit_known(64 << 20, 30e-6)


def native_matcher(vocabulary: Vocabulary, pattern: str) -> NativeMatcher:
    text = to_llguidance(Grammar("regex", pattern), vocabulary.special)
    matcher = vocabulary.matcher(text, "x", pattern)
    assert isinstance(matcher, NativeMatcher)
    return matcher


def mask_of(matcher: Any) -> Words:
    words = np.empty(WORDS, np.int32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return words


def allowed(words: Words) -> Words:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).astype(np.int32)


def walk_beside(vocabulary: Vocabulary, matcher: NativeMatcher, pattern: str, num: int, seed: int) -> int:
    """Along random tokens, with drafts that are taken back. → masks that were known."""
    before, random = load_masks().num_known(), np.random.default_rng(seed)
    matcher, text = matcher.deep_copy(), to_llguidance(Grammar("regex", pattern), vocabulary.special)
    theirs = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=source._LIMITS)
    for i in range(num):
        words, expected = mask_of(matcher), mask_of(theirs)
        if theirs.is_error():  # by a limit: what is known costs nothing
            break
        assert np.array_equal(words, expected), (pattern, i)
        ids = allowed(words)
        if i % 4 == 3 and (draft := int(random.choice(ids))) != EOS:
            if not theirs.try_consume_tokens([draft]):
                assert theirs.is_error()
                break
            assert matcher.try_consume_tokens([draft]) == 1
            if not theirs.is_stopped():
                expected = mask_of(theirs)
                if theirs.is_error():
                    break
                assert np.array_equal(mask_of(matcher), expected), (pattern, i)
            assert matcher.rollback(1) and theirs.rollback(1)
            again = mask_of(matcher)
            if matcher.is_error():
                break
            assert np.array_equal(again, words), (pattern, i)
        token = int(random.choice(ids))
        if token == EOS:
            break
        if not theirs.consume_tokens([token]) or theirs.is_stopped():
            break
        assert matcher.take([token], i + 1)
    return int(load_masks().num_known() - before)


@pytest.mark.parametrize("pattern", FOLLOWED)
def test_masks_are_those_of_llguidance(vocabulary: Vocabulary, pattern: str) -> None:
    matcher = native_matcher(vocabulary, pattern)
    known = sum(walk_beside(vocabulary, matcher, pattern, 30, seed) for seed in range(6))
    assert known > 0


@given(EXPRESSIONS, st.integers(0, 1000))
def test_so_are_those_of_any_expression(vocabulary: Vocabulary, pattern: str, seed: int) -> None:
    try:
        matcher = native_matcher(vocabulary, pattern)
    except RequestError:
        return
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of llguidance's compiler
            raise
        return
    for i in range(2):
        walk_beside(vocabulary, matcher, pattern, 12, seed + i)


@pytest.mark.parametrize("pattern", NOT_FOLLOWED)
def test_what_is_not_followed_has_masks_of_llguidance(vocabulary: Vocabulary, pattern: str) -> None:
    matcher = native_matcher(vocabulary, pattern)
    assert sum(walk_beside(vocabulary, matcher, pattern, 20, seed) for seed in range(2)) == 0


def test_a_place_is_named_in_no_time_however_deep(vocabulary: Vocabulary) -> None:
    pattern = "a"
    for _ in range(45):
        pattern = f"({pattern}|ad?){{0,9}}"
    matcher, (token,) = native_matcher(vocabulary, pattern).deep_copy(), vocabulary.tokenizer.tokenize_str("a")
    begin = time.thread_time()
    for i in range(8):
        assert matcher.take([token], i + 1)
        mask_of(matcher)
    assert time.thread_time() - begin < 1  # 5 s each, if parts are looked at once for each way to them


def test_who_begins_gets_an_empty_pattern_for_a_full_one(vocabulary: Vocabulary) -> None:
    words = "|".join(f"([a-z]{{1,{k}}} ){{1,{90 - k}}}[0-9]" for k in range(30, 38))
    matcher, random, known = native_matcher(vocabulary, f"({words}){{9000}}"), np.random.default_rng(1), list[int]()
    for _ in range(4):
        before, one = load_masks().num_known(), matcher.deep_copy()
        for i in range(1500):
            assert one.take([int(random.choice(allowed(mask_of(one))))], i + 1)
        known.append(load_masks().num_known() - before)
    assert min(known[:2]) > 1000 > known[2], "none of them is full"
    assert known[3] > 1000


def test_no_count_beyond_the_longest_token_has_a_mask_of_its_own(vocabulary: Vocabulary) -> None:
    """Of four words, which each begin with a space but for the first, two masks are computed."""
    pattern = "([a-z]+ ){5000}"
    matcher, before = native_matcher(vocabulary, pattern), load_masks().num_known()
    ids = vocabulary.tokenizer.tokenize_str("the word goes on and on")
    for i, token in enumerate(ids):
        mask_of(matcher)
        assert matcher.take([token], i + 1)
    assert load_masks().num_known() - before >= len(ids) - 2


def test_what_is_prescribed_is_asked_for_each_time(vocabulary: Vocabulary) -> None:
    """The canonical token depends on the tokens before."""
    matcher = native_matcher(vocabulary, "(harbour lights ){50}")
    assert sum(walk_beside(vocabulary, matcher, "(harbour lights ){50}", 20, seed) for seed in range(2)) == 0


def test_two_expressions_share_no_mask(vocabulary: Vocabulary) -> None:
    """Their places have the same numbers."""
    one, other = (native_matcher(vocabulary, pattern) for pattern in ("([a-z]+ ){5000}", "([0-9]+ ){5000}"))
    assert not np.array_equal(mask_of(one), mask_of(other))


def test_the_oldest_masks_are_forgotten(vocabulary: Vocabulary) -> None:
    load_masks().limit_known(2 * 4 * WORDS, 0.0)
    pattern = "[a-z]{1,60}"
    matcher = native_matcher(vocabulary, pattern)
    walk_beside(vocabulary, matcher, pattern, 12, 1)
    load_masks().limit_known(0, 0.0)
    assert walk_beside(vocabulary, matcher, pattern, 1, 1) == 0, "of the beginning"


@pytest.mark.parametrize(
    ("grammar", "is_known"),
    [
        (Grammar("regex", "([a-z]+ ){500}"), True),
        (Grammar("regex", "([a-z]+ ){500}", reasoning="always <think> </think>"), False),
        (Grammar("choice", json.dumps(["([a-z]+ ){500}"])), False),
    ],
)
def test_only_a_grammar_that_is_nothing_else_is_followed(grammar: Grammar, is_known: bool) -> None:
    store = GrammarStore(VocabularyConfig(MODEL, VOCAB, (EOS,)), is_native=True)
    try:
        matcher = store.request(grammar).result(60).matcher
        mask_of(matcher.deep_copy())
        before = load_masks().num_known()
        mask_of(matcher.deep_copy())
        assert load_masks().num_known() - before == is_known
    finally:
        store.close()
