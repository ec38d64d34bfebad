"""Outputs of a grammar that begin alike: a matcher goes on as a copy of another one, and its masks are llguidance's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher

import minisgl
from minisgl.core import Grammar
from minisgl.grammar.source import Vocabulary, VocabularyConfig, load_vocabulary, to_llguidance
from minisgl.kernel.jit import load_masks
from minisgl.kernel.masks import NativeMatcher, Words
from tests.unit.test_masks_of_patterns import allowed, mask_of

MODEL = str(Path(minisgl.__file__).parent / "demo_model")
VOCAB, WORDS, EOS = 4096, 128, 2
MOST_KEPT, LONGEST = 128, 64  # matchers of a grammar, and tokens from its beginning
SCHEMAS = (
    '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}',
    '{"type": "array", "items": {"enum": ["red", "green", "black"]}, "minItems": 3}',
    '{"type": "object", "properties": {"day": {"type": "string", "pattern": "[0-9]{4}-[0-9]"}}, "required": ["day"]}',
    "{}",
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary(VocabularyConfig(MODEL, VOCAB, (EOS,)), is_native=True)


@pytest.fixture(autouse=True)
def _all_masks_are_dear() -> Iterator[None]:
    load_masks().keep_from(0.0, 1.0)
    yield
    load_masks().keep_from(60e-6, 50e-6)


def matchers_of(vocabulary: Vocabulary, schema: str) -> tuple[NativeMatcher, LLMatcher]:
    text = to_llguidance(Grammar("json", schema), vocabulary.special)
    assert vocabulary.native is not None
    return vocabulary.native.matcher(text), LLMatcher(vocabulary.tokenizer, text)


def both(matcher: NativeMatcher, token: int) -> Words:
    """Take a token and compute the mask behind it, as workers do."""
    words = np.zeros(WORDS, np.int32)
    length = matcher.num_tokens + 1
    assert load_masks().advance(matcher.address, length, [token], words.ctypes.data, words.nbytes)
    assert matcher.num_tokens == length
    return words


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("choices", [1, 2, 5000])
def test_masks_are_those_of_llguidance(vocabulary: Vocabulary, schema: str, choices: int) -> None:
    """choices: how many of the allowed tokens come: with few of them many outputs begin alike."""
    random, (first, plain) = np.random.default_rng(0), matchers_of(vocabulary, schema)
    before = load_masks().num_copied()
    for _ in range(16):
        ours, theirs = first.deep_copy(), plain.deep_copy()
        words = mask_of(ours)
        for _ in range(24):
            assert (words == mask_of(theirs)).all()
            token = int(random.choice(allowed(words)[:choices]))
            if token == EOS:
                break
            assert theirs.consume_tokens([token])
            words = both(ours, token)
    assert load_masks().num_copied() > before


def test_who_takes_tokens_and_asks_later_goes_on_as_a_copy_too(vocabulary: Vocabulary) -> None:
    (first, plain), before = matchers_of(vocabulary, SCHEMAS[0]), 0
    for _ in range(12):
        ours, theirs, before = first.deep_copy(), plain.deep_copy(), load_masks().num_copied()
        for _ in range(4):
            assert (mask_of(ours) == mask_of(theirs)).all()
            token = int(allowed(mask_of(theirs))[0])
            assert ours.take([token], ours.num_tokens + 1) and theirs.consume_tokens([token])
    assert load_masks().num_copied() - before == 4


def test_only_beginnings_are_remembered(vocabulary: Vocabulary) -> None:
    first, plain = matchers_of(vocabulary, '{"type": "array", "items": {"enum": [1]}, "minItems": 100}')
    for _ in range(LONGEST + 12):  # each of them knows one place more
        ours, theirs, before = first.deep_copy(), plain.deep_copy(), load_masks().num_copied()
        words = mask_of(ours)
        for _ in range(LONGEST + 20):
            token = int(allowed(words)[0])
            assert theirs.consume_tokens([token])
            words = both(ours, token)
            assert (words == mask_of(theirs)).all()
    assert load_masks().num_copied() - before == 1 + LONGEST  # with the mask before the first token


def test_who_goes_back_or_tries_tokens_is_no_copy_any_more(vocabulary: Vocabulary) -> None:
    first, plain = matchers_of(vocabulary, SCHEMAS[1])
    for _ in range(5):
        ours, theirs = first.deep_copy(), plain.deep_copy()
        for _ in range(3):
            words = mask_of(ours)
            token, other = int(allowed(words)[0]), int(allowed(words)[-1])
            assert ours.try_consume_tokens([other]) == theirs.try_consume_tokens([other]) == 1
            assert (mask_of(ours) == mask_of(theirs)).all()
            assert ours.rollback(1) and theirs.rollback(1)
            assert (both(ours, token) == (theirs.consume_tokens([token]) and mask_of(theirs))).all()


def test_a_forbidden_token_breaks_a_matcher_wherever_others_have_been(vocabulary: Vocabulary) -> None:
    first, _ = matchers_of(vocabulary, SCHEMAS[0])
    for _ in range(4):
        ours, words = first.deep_copy(), np.zeros(WORDS, np.int32)
        for _ in range(2):
            words = both(ours, int(allowed(mask_of(ours))[0]))
        banned = int(np.setdiff1d(np.arange(3, VOCAB), allowed(words))[0])
        assert not ours.take([banned], 3) and ours.is_error()


def test_so_many_are_kept_and_no_more(vocabulary: Vocabulary) -> None:
    """Of one grammar, and what is gone makes room."""
    ours = load_masks()
    for _ in range(9):  # more of them than 1,024 of all grammars would have room for, if they stayed
        first, plain = matchers_of(vocabulary, '{"type": "string"}')
        quote = next(int(one) for one in allowed(mask_of(plain)) if vocabulary.tokenizer.decode_bytes([one]) == b'"')
        begun = [first.deep_copy() for _ in range(6)]
        assert all((mask_of(one) == mask_of(plain)).all() for one in begun)
        starts = allowed([both(one, quote) for one in begun][-1])  # others have passed: what is behind is numbered
        before, some = ours.num_copied(), starts[: MOST_KEPT + 40].tolist()
        for token in some * 2:
            follower = first.deep_copy()
            assert follower.take([quote], 1)
            both(follower, token)
        num_copied = ours.num_copied() - before
        assert len(some) > MOST_KEPT > num_copied >= MOST_KEPT - 3  # some are the beginning itself, and the quote


def test_who_is_dearer_to_copy_than_a_mask_is_not_kept(vocabulary: Vocabulary) -> None:
    """To copy a matcher of some thousand alternatives takes ten times as long as its masks, and 1.5 MB."""
    ours, random = load_masks(), np.random.default_rng(0)
    words = [f"w{random.integers(1 << 60):x}" for _ in range(4000)]
    first, _ = matchers_of(vocabulary, json.dumps({"type": "array", "items": {"enum": words}}))
    ours.keep_from(0.0, 50e-6)
    before = ours.num_copied()
    for _ in range(30):
        one = first.deep_copy()
        allows = mask_of(one)
        for _ in range(6):
            allows = both(one, int(allowed(allows)[0]))
    assert ours.num_copied() == before
