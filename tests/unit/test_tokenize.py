"""Prompts to ids: templates, special tokens, and everything that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import PreTrainedTokenizerFast

from minisgl.config.runtime import TokenizerConfig
from minisgl.core import Grammar, SamplingParams
from minisgl.errors import ConfigError, RequestError
from minisgl.message.messages import (
    AbortMsg,
    AcceptedReply,
    ChatPrompt,
    DetokenizeMsg,
    ErrorReply,
    FlushMsg,
    IdsPrompt,
    PingMsg,
    StreamStart,
    TextPrompt,
    TokenizeMsg,
    UserMsg,
    UserReply,
    pack_ids,
    unpack_ids,
)
from minisgl.message.sockets import ipc_endpoints
from minisgl.tokenizer.server import TokenizerServer
from minisgl.tokenizer.tokenize import HFTextCodec, Tokenizer
from tests.tokenizers_fixture import CHATML, make_byte_level

CONFIG = TokenizerConfig(model_path="", max_seq_len=64, vocab_size=400)
HELLO = ChatPrompt(messages=[{"role": "user", "content": "hello"}])


def request(prompt: Any, uid: int = 1, **params: Any) -> TokenizeMsg:
    return TokenizeMsg(uid=uid, prompt=prompt, params=SamplingParams(**params))


def tokenize_one(codec: HFTextCodec, prompt: Any, **params: Any) -> UserMsg | ErrorReply:
    (answer,) = Tokenizer(CONFIG, codec).tokenize([request(prompt, **params)])
    return answer


def test_a_chat_is_encoded_as_its_template_says(byte_level: HFTextCodec) -> None:
    ids = Tokenizer(CONFIG, byte_level).encode(HELLO)
    text = byte_level.tokenizer.decode(ids)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(1) == 2  # <|im_start|> is one token, not its characters


HARD = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] | trim }}"
    "</s>{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, HARD])
@pytest.mark.parametrize("said", ["The sum", "The sum ", " is\n\n", "", "is is is", "</s>", "größer 🙂"])
def test_a_message_that_goes_on_ends_where_it_ends(tmp_path: Path, template: str, said: str) -> None:
    """However the template trims it, and whatever it puts behind; the prompt before it is as ever."""
    codec = HFTextCodec(str(make_byte_level(tmp_path / "model", template=template)))
    asked = [{"role": "user", "content": "is"}]
    begun = codec.render_chat(ChatPrompt(asked))
    text = codec.render_chat(ChatPrompt([*asked, {"role": "assistant", "content": said}], continue_final=True))
    assert text in (begun + said, begun + said.lstrip())
    ended = codec.render_chat(ChatPrompt(asked, add_generation_prompt=False))
    assert begun.startswith(ended)
    assert not ended.endswith(("assistant\n", "[assistant]"))


@pytest.mark.parametrize("said", ["The sum", "is\n", "naïve"])
def test_it_ends_as_in_transformers(byte_level: HFTextCodec, tmp_path: Path, said: str) -> None:
    messages = [{"role": "user", "content": "is"}, {"role": "assistant", "content": said}]
    theirs = PreTrainedTokenizerFast.from_pretrained(str(make_byte_level(tmp_path / "model")))
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert byte_level.render_chat(ChatPrompt(messages, continue_final=True)) == expected


def test_a_template_that_hides_the_end_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content[:2] }}{% endfor %}"
    codec = HFTextCodec(str(make_byte_level(tmp_path / "model", template=template)))
    with pytest.raises(RequestError, match="does not show how the last message ends"):
        codec.render_chat(ChatPrompt([{"role": "assistant", "content": "abc"}], continue_final=True))


def test_no_second_bos(byte_level_bos: HFTextCodec) -> None:
    """The template has put one; plain text gets the tokenizer's."""
    tokenizer = Tokenizer(CONFIG, byte_level_bos)
    assert tokenizer.encode(HELLO).count(0) == 1
    assert tokenizer.encode(TextPrompt(text="hello")).count(0) == 1
    assert tokenizer.encode(IdsPrompt(input_ids=pack_ids([5, 6]))) == [5, 6]


def test_a_batch_is_encoded_like_its_parts(byte_level_bos: HFTextCodec) -> None:
    tokenizer = Tokenizer(CONFIG, byte_level_bos)
    bad = ChatPrompt(messages=[{"role": "wizard", "content": "x"}])
    prompts = [HELLO, TextPrompt(text="a b"), bad, IdsPrompt(input_ids=pack_ids([7])), TextPrompt(text=""), HELLO]
    answers = tokenizer.tokenize([request(prompt, uid) for uid, prompt in enumerate(prompts)])
    assert [answer.uid for answer in answers] == list(range(6))
    assert [isinstance(answer, ErrorReply) for answer in answers] == [False, False, True, False, True, False]
    for answer, prompt in zip(answers, prompts, strict=True):
        if isinstance(answer, UserMsg):
            assert unpack_ids(answer.prompt) == tokenizer.encode(prompt)


@pytest.mark.parametrize(
    ("prompt", "param", "word"),
    [
        (ChatPrompt(messages=[]), "messages", "empty"),
        (ChatPrompt(messages=[{"role": "wizard", "content": "x"}]), "messages", "Unknown role"),
        (ChatPrompt(messages=[{"content": "x"}]), "messages", "template"),
        (ChatPrompt(messages=[{"role": "user", "content": "long " * 99}]), "messages", "64"),
        (TextPrompt(text=""), "prompt", "empty"),
        (TextPrompt(text="long " * 99), "prompt", "64"),
        (IdsPrompt(input_ids=b""), "prompt", "empty"),
        (IdsPrompt(input_ids=pack_ids([3, 400])), "prompt", "400"),
        (IdsPrompt(input_ids=pack_ids([-1])), "prompt", "-1"),
        (IdsPrompt(input_ids=pack_ids([3] * 64)), "prompt", "64 tokens"),
    ],
)
def test_what_is_refused(byte_level: HFTextCodec, prompt: Any, param: str, word: str) -> None:
    answer = tokenize_one(byte_level, prompt)
    assert isinstance(answer, ErrorReply)
    assert (answer.status, answer.param) == (400, param)
    assert word in answer.message


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}", "line 1: Unexpected end of template"),
        ("{{ messages }}\n{{ bos | }}", "line 2: expected token"),
        ("{{ " + "(" * 20000, "it is too deeply nested"),
        (7, "it is too deeply nested, or no text"),
    ],
)
def test_a_broken_template_is_told_at_the_start(
    tmp_path: Path, template: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By its line; without chats the model can be used."""
    codec = HFTextCodec(str(make_byte_level(tmp_path, template=template)))
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: its chat template is broken, and chats will be refused: {says}")
    assert codec.encode("a", special=True)
    with pytest.raises(RequestError):
        codec.render_chat(ChatPrompt([{"role": "user", "content": "a"}]))


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    codec = HFTextCodec(str(make_byte_level(tmp_path, template=None)))
    answer = tokenize_one(codec, HELLO)
    assert isinstance(answer, ErrorReply)
    assert "/v1/completions" in answer.message
    assert isinstance(tokenize_one(codec, TextPrompt(text="x")), UserMsg)


@pytest.mark.parametrize(("asked", "got"), [(None, 62), (5, 5), (62, 62), (1000, 62)])
def test_max_tokens_is_what_the_context_has_room_for(byte_level: HFTextCodec, asked: int | None, got: int) -> None:
    answer = tokenize_one(byte_level, IdsPrompt(input_ids=pack_ids([3, 4])), max_tokens=asked)
    assert isinstance(answer, UserMsg)
    assert answer.params.max_tokens == got


@pytest.mark.parametrize(
    ("end", "usually", "does"),
    [
        ("", "optional <think> </think>", "optional <think> </think>"),
        ("<think>\n", "optional <think> </think>", "always <think> </think>"),
        ("<think>\n\n</think>\n\n", "optional <think> </think>", ""),
        ("", "always <think> </think>", "always <think> </think>"),
        ("</think>", "always <think> </think>", ""),
        ("</think>", "optional [THINK] [/THINK]", "optional [THINK] [/THINK]"),
        ("[THINK]", "optional [THINK] [/THINK]", "always [THINK] [/THINK]"),
    ],
)
def test_the_end_of_the_prompt_says_whether_reasoning_comes_before_a_grammar(
    tmp_path: Path, end: str, usually: str, does: str
) -> None:
    codec = HFTextCodec(str(make_byte_level(tmp_path, template=CHATML.replace("assistant\n", "assistant\n" + end))))
    chat = ChatPrompt([{"role": "user", "content": "a <think> b"}])
    made = tokenize_one(codec, chat, grammar=Grammar("regex", "x", reasoning=usually))
    assert isinstance(made, UserMsg)
    assert made.params.grammar == Grammar("regex", "x", reasoning=does)


def test_seeds_are_drawn_where_none_is_given(byte_level: HFTextCodec) -> None:
    tokenizer = Tokenizer(CONFIG, byte_level)
    answers = tokenizer.tokenize([request(TextPrompt(text="x"), seed=seed) for seed in (None, None, 7, 0)])
    seeds = [answer.params.seed for answer in answers if isinstance(answer, UserMsg)]
    assert seeds[2:] == [7, 0]
    assert None not in seeds
    assert seeds[0] != seeds[1]


def test_truncation_in_tokenizer_json_is_off(tmp_path: Path) -> None:
    make_byte_level(tmp_path)
    codec = HFTextCodec(str(tmp_path))
    codec.tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    codec.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(HFTextCodec(str(tmp_path)).encode("q w e r t y u i o p", special=False)) > 10


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_an_unusable_tokenizer_is_a_config_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path)) as caught:
        HFTextCodec(str(tmp_path))
    assert "\n" not in str(caught.value)


class Moody(HFTextCodec):
    """Breaks on one text, in ways that nobody expects."""

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if "boom" in texts:
            raise RuntimeError("secret")
        return super().encode(texts, special=special)

    def text(self, token_ids: Sequence[int]) -> str:
        if 13 in token_ids:
            raise RuntimeError("secret")
        return super().text(token_ids)


def start_server(tmp_path: Path, codec: HFTextCodec, *, num_tokenizer: int, tokenizer: bool) -> TokenizerServer:
    endpoints = ipc_endpoints(str(tmp_path), num_tokenizer)
    endpoint = next(iter(endpoints.tokenizers.values())) if tokenizer else endpoints.detokenizer
    return TokenizerServer(CONFIG, endpoints, endpoint, codec)


def test_streams_of_a_scheduler_that_has_died_are_forgotten(tmp_path: Path) -> None:
    codec = HFTextCodec(str(make_byte_level(tmp_path / "model")))
    server = start_server(tmp_path, codec, num_tokenizer=1, tokenizer=False)
    start = StreamStart(num_prompt_tokens=1, stop=(), prompt_tail=b"")
    token = DetokenizeMsg(uid=4, token_ids=pack_ids(codec.encode("a", special=False)[:1]))
    _, replies = server.handle([msgspec.structs.replace(token, start=start), token, FlushMsg(0), token])
    assert [reply.uid for reply in replies] == [4, 4], "tokens of a uid that nobody has introduced are dropped"
    server.close()


def test_one_bad_request_harms_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    codec = Moody(str(make_byte_level(tmp_path / "model")))
    server = start_server(tmp_path, codec, num_tokenizer=0, tokenizer=True)
    start = StreamStart(num_prompt_tokens=1, stop=(), prompt_tail=b"")
    to_backend, to_frontend = server.handle(
        [
            request(TextPrompt(text="fine"), 1),
            request(TextPrompt(text="boom"), 2),
            request(TextPrompt(text="also fine"), 3),
            DetokenizeMsg(uid=4, token_ids=pack_ids([13]), start=start),
            DetokenizeMsg(uid=5, token_ids=pack_ids([40]), start=start),
            DetokenizeMsg(uid=4, token_ids=pack_ids([14])),
        ]
    )
    server.close()
    assert [message.uid for message in to_backend if isinstance(message, UserMsg)] == [1, 3]
    assert [message for message in to_backend if isinstance(message, AbortMsg)] == [AbortMsg(uid=4)]
    errors = [message for message in to_frontend if isinstance(message, ErrorReply)]
    assert [(error.uid, error.status) for error in errors] == [(2, 500), (4, 500)]
    assert all("secret" not in error.message for error in errors)
    assert [message.uid for message in to_frontend if isinstance(message, UserReply)] == [5]
    assert sum(record.exc_info is not None for record in caplog.records) == 2


def test_who_asks_is_told_that_the_prompt_is_taken(tmp_path: Path, byte_level: HFTextCodec) -> None:
    """Not of a grammar: the scheduler may still refuse the request for it."""
    server = start_server(tmp_path, byte_level, num_tokenizer=1, tokenizer=True)
    asking = [request(TextPrompt(text=text), uid) for uid, text in enumerate(["x", "", "x"])]
    asking.append(request(TextPrompt(text="x"), 3, grammar=Grammar("regex", "a")))
    asking = [msgspec.structs.replace(message, notify=message.uid != 2) for message in asking]
    _, to_frontend = server.handle(asking)
    server.close()
    assert [(type(message), message.uid) for message in to_frontend] == [(AcceptedReply, 0), (ErrorReply, 1)]


def test_a_prompt_is_encoded_once_for_all_of_its_outputs(tmp_path: Path, byte_level: HFTextCodec) -> None:
    server = start_server(tmp_path, byte_level, num_tokenizer=1, tokenizer=True)
    asking = [
        msgspec.structs.replace(request(TextPrompt(text=t), u), notify=True, count=3) for u, t in ((1, "x"), (4, ""))
    ]
    (message,), to_frontend = server.handle(asking)
    server.close()
    assert isinstance(message, UserMsg) and (message.uid, message.count) == (1, 3)
    assert [message.uid for message in to_frontend if isinstance(message, AcceptedReply)] == [1, 2, 3]
    assert [message.uid for message in to_frontend if isinstance(message, ErrorReply)] == [4, 5, 6]


def test_an_abort_stays_behind_its_request(tmp_path: Path, byte_level: HFTextCodec) -> None:
    server = start_server(tmp_path, byte_level, num_tokenizer=1, tokenizer=True)
    to_backend, _ = server.handle([request(TextPrompt(text="x"), 1), AbortMsg(uid=1), request(TextPrompt(text="y"), 2)])
    server.close()
    kinds = [(type(message).__name__, message.uid) for message in to_backend]
    assert kinds.index(("UserMsg", 1)) < kinds.index(("AbortMsg", 1))


def test_a_crowd_of_prompts_does_not_silence_the_heartbeat(
    tmp_path: Path, byte_level: HFTextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding is slow (a megabyte a second): what has piled up is handled in parts, with a beat between them."""
    server = start_server(tmp_path, byte_level, num_tokenizer=1, tokenizer=True)
    waiting = [request(TextPrompt(text="x"), uid) for uid in range(1000)]
    monkeypatch.setattr(server._inbox, "receive", lambda _: waiting)
    encoded: list[int] = []

    def encode(self: HFTextCodec, texts: list[str], *, special: bool) -> list[list[int]]:
        encoded.append(len(texts))
        return [[5]] * len(texts)

    def beat() -> None:
        if encoded:
            raise SystemExit

    monkeypatch.setattr(HFTextCodec, "encode", encode)
    with pytest.raises(SystemExit):
        server.run(beat)
    assert sum(encoded) <= 64


@pytest.mark.parametrize("num_tokenizer", [0, 1])
def test_pings_go_round_once(tmp_path: Path, byte_level: HFTextCodec, num_tokenizer: int) -> None:
    """Tokenizer to scheduler, detokenizer to frontend; in one process, by turns."""
    tokenizer = start_server(tmp_path, byte_level, num_tokenizer=num_tokenizer, tokenizer=True)
    detokenizer = tokenizer
    if num_tokenizer:
        detokenizer = start_server(tmp_path, byte_level, num_tokenizer=1, tokenizer=False)
    for uid in (1, 2):
        assert tokenizer.handle([PingMsg(uid=uid)]) == ([PingMsg(uid=uid)], [])
        assert detokenizer.handle([PingMsg(uid=uid, back=True)]) == ([], [PingMsg(uid=uid, back=True)])
    tokenizer.close()
    if detokenizer is not tokenizer:
        detokenizer.close()


def test_encode_raises_for_callers_in_process(byte_level: HFTextCodec) -> None:
    with pytest.raises(RequestError):
        Tokenizer(CONFIG, byte_level).encode(TextPrompt(text=""))


def test_a_text_that_cannot_fit_is_refused_without_encoding_it(
    byte_level: HFTextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*args: object, **kwargs: object) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(HFTextCodec, "encode", encode)
    with pytest.raises(RequestError, match=r"maximum context length is \d+ tokens.* in at least \d+ tokens"):
        Tokenizer(CONFIG, byte_level).encode(TextPrompt(text="a b " * 1_000_000))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        HFTextCodec(str(tmp_path))
