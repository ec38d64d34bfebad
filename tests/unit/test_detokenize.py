"""Incremental decoding and stop strings, against decoding everything at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisgl.core import FinishReason
from minisgl.message.messages import DetokenizeMsg, StreamStart, UserReply, pack_ids, unpack_ids
from minisgl.tokenizer.detokenize import Detokenizer, IncrementalDecoder, StopFinder
from minisgl.tokenizer.tokenize import HFTextCodec
from tests.packing import pack_logprobs

ANY_TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("🙂你 \n\ufffdab"), max_size=60)
fixtures_stay = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def split(items: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """Pieces of `items` of the given lengths, the rest one by one."""
    pieces, position = [], 0
    for cut in cuts:
        pieces.append(list(items[position : position + cut]))
        position += cut
    return pieces + [[item] for item in items[position:]]


def decode_in_pieces(codec: HFTextCodec, pieces: list[list[int]], context: Sequence[int] = ()) -> list[str]:
    decoder = IncrementalDecoder(codec, context)
    return [*(decoder.push(piece) for piece in pieces), decoder.flush()]


@fixtures_stay
@given(text=ANY_TEXT, cuts=st.lists(st.integers(0, 5), max_size=8))
def test_increments_add_up_to_the_text(byte_level: HFTextCodec, text: str, cuts: list[int]) -> None:
    ids = byte_level.encode(text, special=False)
    assert "".join(decode_in_pieces(byte_level, split(ids, cuts))) == text


@fixtures_stay
@given(ids=st.lists(st.integers(0, 420), max_size=80), cuts=st.lists(st.integers(0, 5), max_size=8))
def test_any_ids_decode_as_at_once(byte_level: HFTextCodec, ids: list[int], cuts: list[int]) -> None:
    """Also for bytes that are no text, special tokens, and ids past the tokenizer's vocabulary."""
    assert "".join(decode_in_pieces(byte_level, split(ids, cuts))) == byte_level.decode(ids)


@fixtures_stay
@given(prompt=ANY_TEXT, text=ANY_TEXT, cuts=st.lists(st.integers(0, 5), max_size=8))
def test_sentencepiece_keeps_spaces(sentencepiece: HFTextCodec, prompt: str, text: str, cuts: list[int]) -> None:
    """Byte fallback, and the space at the beginning that the decoder drops unless something precedes it."""
    prompt_ids = sentencepiece.encode(prompt, special=True)
    ids = sentencepiece.encode(text, special=False) if text else []
    whole, before = sentencepiece.decode(prompt_ids + ids), sentencepiece.decode(prompt_ids)
    if "\ufffd" in prompt[-1:] or "\ufffd" in text:
        return  # U+FFFD as a real character looks like unfinished bytes; the text is still all there, later
    pieces = decode_in_pieces(sentencepiece, split(ids, cuts), prompt_ids[-8:])
    assert before + "".join(pieces) == whole


def test_half_a_character_is_never_out_and_nothing_else_waits(byte_level: HFTextCodec) -> None:
    ids = byte_level.encode("ab🙂cd", special=False)
    pieces = decode_in_pieces(byte_level, [[i] for i in ids])
    assert all("\ufffd" not in piece for piece in pieces)
    shown = 0
    for count, piece in enumerate(pieces[:-1], start=1):
        shown += len(piece)
        assert shown == len(byte_level.decode(ids[:count]).rstrip("\ufffd"))


def test_text_before_an_unfinished_character_is_out_at_once(byte_level: HFTextCodec) -> None:
    x, emoji = (byte_level.encode(text, special=False) for text in ("x", "🜂"))  # an emoji that training has not merged
    decoder = IncrementalDecoder(byte_level)
    assert decoder.push([*x, emoji[0]]) == "x"


def test_a_long_run_of_bad_bytes_is_not_held_for_ever(byte_level: HFTextCodec) -> None:
    bad = byte_level.encode("🜂", special=False)[0]
    decoder = IncrementalDecoder(byte_level)
    longest = 0
    out = ""
    for count in range(1, 2000):
        out += decoder.push([bad])
        longest = max(longest, count - len(out))
        assert len(decoder._ids) < 40
    assert longest < 12
    assert out + decoder.flush() == byte_level.decode([bad] * 1999)


def oracle(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 6), max_size=20),
)
def test_stop_strings_cut_where_they_should(text: str, stops: list[str], cuts: list[int]) -> None:
    finder, out, position, found = StopFinder(stops), "", 0, False
    for cut in [*cuts, len(text)]:
        piece, found = finder.push(text[position : position + cut])
        position += cut
        out += piece
        if found:
            break
        held = text[len(out) : position]
        assert out + held == text[:position]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)  # no more than needed
    assert (out if found else out + finder.flush(), found) == oracle(text, stops)


def message(
    ids: Sequence[int], *, stop: Sequence[str] | None = None, finish: FinishReason | None = None, hidden: int = 0
) -> DetokenizeMsg:
    start = None if stop is None else StreamStart(num_prompt_tokens=3, stop=tuple(stop), prompt_tail=b"")
    return DetokenizeMsg(uid=7, token_ids=pack_ids(ids), start=start, finish_reason=finish, num_hidden=hidden)


@fixtures_stay
@given(
    text=st.text("abc 🙂", max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=3), max_size=2),
    finish=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR]),
    late=st.integers(0, 3),
)
def test_exactly_one_terminal_reply(
    byte_level: HFTextCodec, text: str, stops: list[str], finish: FinishReason, late: int
) -> None:
    """Whatever comes after a stop string: more tokens, the scheduler's own end, the confirmed abort."""
    detokenizer = Detokenizer(byte_level)
    ids = byte_level.encode(text, special=False)
    extra = byte_level.encode("zzz", special=False)[:late]
    messages = [message([token]) for token in ids + extra]
    messages = [message([], stop=stops), *messages, message([], finish=finish)]
    replies: list[UserReply] = []
    aborts = 0
    for item in messages:
        reply, abort = detokenizer.detokenize(item)
        replies += [reply] if reply else []
        aborts += abort is not None
    assert [reply.finish_reason is not None for reply in replies] == [False] * (len(replies) - 1) + [True]
    expected, found = oracle(text + byte_level.decode(extra), stops)
    assert "".join(reply.text for reply in replies) == expected
    assert aborts <= found
    if aborts:
        assert replies[-1].finish_reason is FinishReason.STOP
    assert not detokenizer._streams


def test_a_stop_string_in_the_last_token_needs_no_abort(byte_level: HFTextCodec) -> None:
    detokenizer = Detokenizer(byte_level)
    ids = byte_level.encode("one stop", special=False)
    reply, abort = detokenizer.detokenize(message(ids, stop=["stop"], finish=FinishReason.LENGTH))
    assert reply is not None
    assert (reply.text, reply.finish_reason, abort) == ("one ", FinishReason.STOP, None)


@pytest.mark.parametrize(("stop", "num_right"), [("b", 4), ("c", 5), ("d", 6), ("e", 6), ("x", 6)])
def test_guesses_behind_a_stop_string_are_in_no_count(byte_level: HFTextCodec, stop: str, num_right: int) -> None:
    """Of the five tokens of a step, all but the last were guessed; of those before, two."""
    detokenizer = Detokenizer(byte_level)
    detokenizer.detokenize(message([], stop=[stop]))
    ids = [token for letter in "abcde" for token in byte_level.encode(letter, special=False)]
    reply, _ = detokenizer.detokenize(DetokenizeMsg(7, pack_ids(ids), drafted=(6, 3)))
    assert reply is not None and reply.drafted == (num_right, 3)


@fixtures_stay
@given(
    text=st.text("abc 🙂", max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(1, 9), max_size=8),
    least=st.integers(0, 6),
    finish=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
)
def test_several_tokens_at_once_are_as_one_by_one(
    byte_level: HFTextCodec, text: str, stops: list[str], cuts: list[int], least: int, finish: FinishReason
) -> None:
    """Text, ids, counts, log-probabilities and reason: nothing behind a stop string is told."""
    ids = byte_level.encode(text, special=False)

    def told(pieces: list[list[int]]) -> tuple[object, ...]:
        detokenizer, replies, position = Detokenizer(byte_level), list[UserReply](), 0
        for piece in [some for some in pieces if some]:
            logprobs = pack_logprobs([(-float(position + i), ()) for i in range(len(piece))])
            is_last = (position := position + len(piece)) == len(ids)
            start = None if replies else StreamStart(3, tuple(stops), b"", min_tokens=least)
            reason = finish if is_last else None
            packed = pack_ids(piece)
            reply, _ = detokenizer.detokenize(DetokenizeMsg(7, packed, 0, 0, start, reason, logprobs=logprobs))
            replies += [] if reply is None else [reply]
        last, wholes = replies[-1], [unpack_ids(reply.token_ids) for reply in replies]
        return (
            "".join(reply.text for reply in replies),
            [token for whole in wholes for token in whole],
            [one.logprob for reply in replies for one in reply.logprobs],
            (last.num_output_tokens, last.finish_reason, last.stop),
        )

    assert not ids or told(split(ids, cuts)) == told(split(ids, []))


def test_what_is_held_back_comes_at_the_end(byte_level: HFTextCodec) -> None:
    detokenizer = Detokenizer(byte_level)
    ids = byte_level.encode("one st", special=False)
    first, _ = detokenizer.detokenize(message(ids, stop=["stop"]))
    last, _ = detokenizer.detokenize(message([2], finish=FinishReason.STOP, hidden=1))
    assert first is not None
    assert last is not None
    assert (first.text, last.text, last.num_output_tokens) == ("one ", "st", len(ids) + 1)


def test_a_hidden_token_is_counted_and_not_shown(byte_level: HFTextCodec) -> None:
    detokenizer = Detokenizer(byte_level)
    ids = byte_level.encode("ab", special=False)
    reply, _ = detokenizer.detokenize(message(ids, stop=[], finish=FinishReason.STOP, hidden=1))
    assert reply is not None
    assert reply.text == byte_level.decode(ids[:-1])
    assert reply.num_output_tokens == len(ids)


@pytest.mark.parametrize("finish", [FinishReason.ABORT, FinishReason.ERROR])
def test_the_end_of_a_request_that_never_started(byte_level: HFTextCodec, finish: FinishReason) -> None:
    reply, _ = Detokenizer(byte_level).detokenize(message([], finish=finish))
    assert reply is not None
    assert reply.finish_reason is finish


def test_tokens_of_an_unknown_request_are_dropped(byte_level: HFTextCodec) -> None:
    assert Detokenizer(byte_level).detokenize(message([65])) == (None, None)


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (["a" * (1023 - index) + "b" for index in range(16)], "a"),
        (["a" * 512 + "b" + "a" * 511] * 16, "a"),
        (["ab" * 512] * 16, "ab"),
    ],
)
def test_a_stop_string_costs_no_more_the_longer_the_output_is(stops: list[str], text: str) -> None:
    """The largest that the API takes, all of them nearly there all the time."""
    finder, times = StopFinder(stops), []
    for _ in range(4):
        begun = time.thread_time()
        for _ in range(1500):
            finder.push(text * 2)
        times.append(time.thread_time() - begun)
    assert min(times[2:]) < 5 * max(times[1], 0.01)
    assert min(times) / 1500 < 0.005


def test_what_ended_is_forgotten(byte_level: HFTextCodec) -> None:
    """Whatever ended it; and nothing is made of a uid that is not known."""
    detokenizer = Detokenizer(byte_level)
    before = sum(type(thing).__name__ == "_Stream" for thing in gc.get_objects())
    for uid in range(300):
        for reason in (None, [*FinishReason][uid % len(FinishReason)]):
            start = None if reason else StreamStart(1, ("b",), b"")
            ids = pack_ids(byte_level.encode("abc", special=False))
            detokenizer.detokenize(DetokenizeMsg(uid=uid, token_ids=ids, start=start, finish_reason=reason))
        assert detokenizer.detokenize(DetokenizeMsg(uid=uid, token_ids=pack_ids([40]))) == (None, None)
    assert sum(type(thing).__name__ == "_Stream" for thing in gc.get_objects()) == before


def test_a_prompt_is_decoded_once_for_all_outputs_that_echo_it(
    byte_level: HFTextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = HFTextCodec.decode

    def counted(self: HFTextCodec, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        sizes.append(len(token_ids))
        return decode(self, token_ids, skip_special=skip_special)

    monkeypatch.setattr(HFTextCodec, "decode", counted)
    detokenizer, texts = Detokenizer(byte_level), ["hello " * 50, "world " * 50]
    for uid in range(20):
        prompt = byte_level.encode(texts[uid // 10], special=False)
        start = StreamStart(len(prompt), (), b"", echo=True, prompt=pack_ids(prompt))
        reply, _ = detokenizer.detokenize(DetokenizeMsg(uid=uid, token_ids=b"", start=start))
        assert reply is not None and reply.text == texts[uid // 10]
    assert sum(size > 50 for size in sizes) == 2
