"""Single tokens as bytes, and what the detokenizer makes of log-probabilities."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.core import FinishReason, SamplingParams
from minisgl.message.messages import (
    DetokenizeMsg,
    StreamStart,
    TextPrompt,
    TokenLogprob,
    UserReply,
    pack_ids,
    unpack_logprobs,
)
from minisgl.server.answers.openai import CompletionRenderer, chat_logprobs
from minisgl.server.answers.renderer import Assembler
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.tokenizer.detokenize import Detokenizer, LateLogprobs
from minisgl.tokenizer.tokenize import HFTextCodec
from tests.packing import pack_logprobs
from tests.tokenizers_fixture import make_byte_level, make_sentencepiece


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> list[HFTextCodec]:
    directory = tmp_path_factory.mktemp("models")
    return [HFTextCodec(str(make_byte_level(directory / "b"))), HFTextCodec(str(make_sentencepiece(directory / "s")))]


@given(text=st.text("abc dehloHwT.ä 🙂你\n\x00ß", min_size=1, max_size=20))
def test_bytes_of_tokens_add_up_to_the_text(codecs: list[HFTextCodec], text: str) -> None:
    byte_level, sentencepiece = codecs
    ids = byte_level.encode(text, special=False)
    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()
    ids = sentencepiece.encode(text, special=False)
    assert b"".join(map(sentencepiece.token_bytes, ids)) == b" " + text.encode()


@given(data=st.data())
def test_a_text_is_what_the_tokenizer_makes_of_it(codecs: list[HFTextCodec], data: st.DataObject) -> None:
    """Whatever the tokens are: parts of characters, bytes that are none, special ones."""
    for codec in codecs:
        ids = data.draw(st.lists(st.integers(0, codec.vocab_size - 1), max_size=6))
        assert codec.text(ids) == codec.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_special_and_unknown_tokens_have_bytes_too(codecs: list[HFTextCodec]) -> None:
    assert codecs[0].token_bytes(1) == b"<|im_start|>"
    assert codecs[1].token_bytes(2) == b"</s>"
    assert codecs[0].token_bytes(10**6) == b""


def logprobs_of(num: int, num_top: int, *chosen: float) -> bytes:
    """chosen: of the first tokens, in place of 0, -0.5, -1 …"""
    own = [*chosen, *(-i / 2 for i in range(len(chosen), num))]
    return pack_logprobs(
        [(one, [(i * num_top + j, -i * num_top - j) for j in range(num_top)]) for i, one in enumerate(own)]
    )


@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_packing_keeps_numbers_and_bounds_those_that_json_has_not(num_top: int) -> None:
    unpacked = unpack_logprobs(logprobs_of(2, num_top) + logprobs_of(1, num_top, -math.inf), 3)
    assert [logprob for logprob, _ in unpacked] == [0, -0.5, -9999]
    assert [len(top) for _, top in unpacked] == [num_top] * 3
    assert unpacked[1][1] == [(num_top + i, -num_top - i) for i in range(num_top)]
    assert unpack_logprobs(logprobs_of(1, num_top, math.nan), 1)[0][0] == -9999
    assert unpack_logprobs(b"", 0) == []


def replies(codec: HFTextCodec, text: str, *, echo: str = "", num_top: int = 0) -> list[UserReply]:
    """Of one request whose output is `text`, token by token."""
    detokenizer, prompt = Detokenizer(codec), codec.encode(echo or "a", special=False)
    start = StreamStart(len(prompt), (), b"", echo=bool(echo), prompt=pack_ids(prompt) if echo else b"")
    ids = codec.encode(text, special=False)
    messages = [
        DetokenizeMsg(
            uid=1,
            token_ids=pack_ids([token]),
            start=None if i else start,
            finish_reason=FinishReason.LENGTH if i == len(ids) - 1 else None,
            logprobs=logprobs_of(1, num_top),
            prompt_logprobs=b"" if i else logprobs_of(len(prompt) - 1, num_top),
        )
        for i, token in enumerate(ids)
    ]
    answers = [detokenizer.detokenize(message)[0] for message in messages]
    return [answer for answer in answers if answer is not None]


def test_parts_of_characters_are_written_out(codecs: list[HFTextCodec]) -> None:
    """As OpenAI does; and a token's offset is where its text is, or the character that it helps to make."""
    parsed = GenerationRequest((TextPrompt("ab"),), SamplingParams(), logprobs=True)
    given = replies(codecs[0], "xшy", echo="ab", num_top=2)
    shown = CompletionRenderer("m", parsed, Assembler).body([given])["choices"][0]["logprobs"]
    assert shown["tokens"] == ["a", "b", "x", *(f"bytes:\\x{byte:02x}" for byte in "ш".encode()), "y"]
    assert shown["text_offset"] == [0, 1, 2, 3, 3, 4]
    assert shown["token_logprobs"][0] is None
    assert shown["top_logprobs"][0] is None
    content = chat_logprobs(replies(codecs[0], "xшy"))["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "xшy"
    assert content[1]["token"] == "\\xd1"


def test_an_echo_comes_before_the_text_and_is_not_searched_for_stop_strings(codecs: list[HFTextCodec]) -> None:
    answers = replies(codecs[0], "def", echo="abc")
    assert "".join(answer.text for answer in answers) == "abcdef"
    start = StreamStart(3, ("b",), b"", echo=True, prompt=pack_ids(codecs[0].encode("abc", special=False)))
    ids = codecs[0].encode("xbz", special=False)
    reply, _ = Detokenizer(codecs[0]).detokenize(DetokenizeMsg(uid=1, token_ids=pack_ids(ids), start=start))
    assert reply is not None
    assert (reply.text, reply.finish_reason) == ("abcx", "stop")


def test_stop_strings_before_min_tokens_are_text(codecs: list[HFTextCodec]) -> None:
    ids = codecs[0].encode("bxbyb", special=False)
    assert len(ids) == 5
    for size in (1, 2, 5):
        detokenizer, text = Detokenizer(codecs[0]), ""
        for first in range(0, 5, size):
            start = None if first else StreamStart(1, ("b",), b"", min_tokens=3)
            message = DetokenizeMsg(uid=1, token_ids=pack_ids(ids[first : first + size]), start=start)
            reply, _ = detokenizer.detokenize(message)
            text += reply.text if reply is not None else ""
        assert text == "bxby"


def test_log_probabilities_that_are_made_late_are_the_same(codecs: list[HFTextCodec]) -> None:
    """They are a list to whoever reads, copies or pickles them, and nothing is made before."""
    asked = list[int]()
    codec = codecs[0]
    ids = codec.encode("abc", special=False)
    message = DetokenizeMsg(1, pack_ids(ids), start=StreamStart(1, (), b""), logprobs=logprobs_of(3, 2))
    packing = Detokenizer(codec, late=True)
    (whole, _), (packed, _) = (one.detokenize(message) for one in (Detokenizer(codec), packing))
    assert whole is not None and packed is not None and len(whole.logprobs) == 3
    assert (packed.token_ids, packed.logprobs) == (message.token_ids, message.logprobs)
    late = LateLogprobs(lambda: packing.logprobs(message.token_ids, message.logprobs, skips=True))
    for copied in (copy.copy(late), late, pickle.loads(pickle.dumps(late))):
        assert copied == list(whole.logprobs) and copied[1] == whole.logprobs[1] and len(copied) == 3

    def made() -> Iterator[TokenLogprob]:
        for one in whole.logprobs:
            asked.append(one.token_id)
            yield one

    unread = LateLogprobs(made)
    assert not asked
    assert unread[0] == whole.logprobs[0] and asked == ids


def test_log_probabilities_whose_first_reading_was_interrupted_are_read_again() -> None:
    def made() -> Iterator[TokenLogprob]:
        yield one
        if stops.pop():
            raise KeyboardInterrupt
        yield one

    one, stops = TokenLogprob(1, b"a", -1.0, [], True), [False, True]
    late = LateLogprobs(made)
    with pytest.raises(KeyboardInterrupt):
        len(late)
    assert list(late) == [one, one]
