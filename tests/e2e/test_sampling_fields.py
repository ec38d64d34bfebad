"""Sampling fields and log-probabilities over HTTP, with the stock client."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minisgl.tokenizer.tokenize import HFTextCodec
from tests.e2e.conftest import Server, real
from tests.models import hf_logits

HELLO: Any = [{"role": "user", "content": "hello"}]
PROMPT = [60, 70, 80, 90, 75, 66]


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    extra = {name: options.pop(name) for name in list(options) if name in EXTENSIONS}
    given = {"model": "tiny", "max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(prompt=prompt, extra_body={"ignore_eos": True, **extra}, **given)


EXTENSIONS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "min_tokens",
    "repetition_penalty",
    "skip_special_tokens",
    "stop_token_ids",
)


@pytest.fixture(scope="module")
def codec(tiny_path: Path) -> HFTextCodec:
    return HFTextCodec(str(tiny_path))


@pytest.fixture
def ids(client: openai.OpenAI, http: httpx.Client) -> list[int]:
    """What the model makes of `PROMPT`, greedily."""
    body = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_tokens": 12, "ignore_eos": True}}
    found: list[int] = http.post("/generate", json=body).json()["output_ids"]
    return found


def test_stop_token_ids_end_the_output(client: openai.OpenAI, ids: list[int], codec: HFTextCodec) -> None:
    """Also of a request that ignores end-of-sequence tokens; its text comes with include_stop_str_in_output."""
    num = ids.index(ids[5])
    answer = complete(client, stop_token_ids=[ids[5]])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == codec.decode(ids[:num])
    assert answer.usage.completion_tokens == num + 1
    answer = complete(client, stop_token_ids=[ids[5]], include_stop_str_in_output=True)
    assert answer.choices[0].text == codec.decode(ids[: num + 1])


def test_min_tokens_come_before_any_end(client: openai.OpenAI, ids: list[int], codec: HFTextCodec) -> None:
    answer = complete(client, stop_token_ids=ids, min_tokens=6)
    assert answer.usage.completion_tokens >= 7
    text = codec.decode(ids)
    answer = complete(client, stop=text[2:4], min_tokens=12)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_string_stays_if_asked_for(client: openai.OpenAI, codec: HFTextCodec, stream: bool, ids: Any) -> None:
    text = codec.decode(ids)
    stop = text[3:6]
    answer = complete(client, stop=stop, include_stop_str_in_output=True, stream=stream)
    found = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert found == text[: text.index(stop) + 3]


def test_special_tokens_are_text_if_asked_for(client: openai.OpenAI) -> None:
    only = {"logit_bias": {"1": 100}, "max_tokens": 2}
    assert complete(client, **only).choices[0].text == ""
    assert complete(client, **only, skip_special_tokens=False).choices[0].text == "<|im_start|>" * 2


def test_biases_and_penalties(client: openai.OpenAI, codec: HFTextCodec) -> None:
    both = {"logit_bias": {"70": 100, "71": 99.5}, "logprobs": 0}
    tokens = [codec.decode([70]), codec.decode([71])]

    def first_two(**options: Any) -> list[str]:
        found: list[str] = complete(client, **both, **options).choices[0].logprobs.tokens
        assert set(found) <= set(tokens)
        return found

    plain = first_two()
    assert len(set(plain)) == 1 or plain != first_two(frequency_penalty=2)
    assert len(set(first_two(frequency_penalty=2))) == 2
    banned = complete(client, logit_bias={str(token): -100 for token in range(399)}, logprobs=0)
    assert set(banned.choices[0].logprobs.tokens) == {banned.choices[0].logprobs.tokens[0]}
    free, penalized = (complete(client, max_tokens=60, repetition_penalty=p, logprobs=0) for p in (1.0, 50.0))
    counts = [len(set(answer.choices[0].logprobs.tokens)) for answer in (free, penalized)]
    assert counts[1] > counts[0]


def values_of(path: Path, tokens: list[int]) -> Any:
    return hf_logits(path, tokens).log_softmax(-1)


def test_logprobs_of_completions_equal_hugging_face_s(
    client: openai.OpenAI, tiny_path: Path, ids: list[int], codec: HFTextCodec
) -> None:
    for options in ({"echo": True}, {"echo": True, "max_tokens": 0}, {}, {"echo": True}):  # the last one is cached
        answer = complete(client, logprobs=3, **options).choices[0]
        shown = answer.logprobs
        output = [] if options.get("max_tokens") == 0 else ids
        tokens = PROMPT + output if "echo" in options else output
        expected = values_of(tiny_path, PROMPT + output)
        begin = 0 if "echo" in options else len(PROMPT)
        for i, token in enumerate(tokens):
            if begin + i == 0:
                assert (shown.token_logprobs[0], shown.top_logprobs[0]) == (None, None)
                continue
            row = expected[begin + i - 1]
            assert abs(shown.token_logprobs[i] - float(row[token])) < 1e-3
            top = sorted(shown.top_logprobs[i].values(), reverse=True)[:3]
            assert top == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
            assert shown.top_logprobs[i][shown.tokens[i]] == shown.token_logprobs[i]
        assert answer.text == codec.decode(tokens)
        assert len(shown.tokens) == len(shown.text_offset) == len(tokens)
        for text, offset in zip(shown.tokens, shown.text_offset, strict=True):
            if not text.startswith("bytes:"):
                assert answer.text[offset:].startswith(text)


def test_logprobs_of_chats(client: openai.OpenAI, tiny_path: Path, codec: HFTextCodec) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, "logprobs": True}
    more = {"extra_body": {"ignore_eos": True}, "top_logprobs": 4}
    answer = client.chat.completions.create(**options, **more).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    content = answer.logprobs.content
    assert len(content) == 8
    assert b"".join(bytes(token.bytes or []) for token in content).decode(errors="replace") == answer.message.content
    for token in content:
        assert [len(token.top_logprobs), token.top_logprobs[0].logprob] == [4, token.logprob]
        assert token.top_logprobs[0].token == token.token
        assert (
            token.token == bytes(token.bytes or []).decode()
            if "\\x" not in token.token
            else re.match(r"\\x", token.token)
        )
    streamed = []
    for chunk in client.chat.completions.create(**options, **more, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += (logprobs.content or []) if logprobs is not None else []
    assert streamed == content
    bare = client.chat.completions.create(**options).choices[0].logprobs
    assert bare is not None and bare.content is not None
    assert all(token.top_logprobs == [] for token in bare.content)


def test_streamed_logprobs_of_completions_add_up(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=2, echo=True).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(client, logprobs=2, echo=True, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(chunk.logprobs, name) for chunk in chunks]
        assert [value for part in parts for value in part] == getattr(whole.logprobs, name)
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_best_of_gives_the_most_probable_ones(client: openai.OpenAI) -> None:
    options: Any = {"temperature": 1.5, "seed": 7}
    every = complete(client, n=6, logprobs=0, **options).choices
    ranked = sorted(every, key=lambda c: sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens), reverse=True)
    best = complete(client, n=2, best_of=6, **options)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == 6 * 12
    for refused in ({"best_of": 1, "n": 2}, {"best_of": 3, "stream": True}):
        with pytest.raises(openai.BadRequestError, match="best_of"):
            complete(client, **refused)


def test_several_prompts_are_echoed_and_scored(client: openai.OpenAI) -> None:
    """In the ways that `lm-eval` asks for log-likelihoods: lists of token ids, one token of output."""
    prompts = [[60, 61, 62], [70, 71], [80]]
    answer = complete(client, prompts, echo=True, logprobs=1, max_tokens=1)
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [4, 3, 2]
    assert [choice.logprobs.token_logprobs[0] for choice in answer.choices] == [None] * 3
    assert answer.usage.prompt_tokens == 6


def test_log_likelihoods_as_an_evaluation_reads_them(client: openai.OpenAI, tiny_path: Path) -> None:
    """Of continuations, and whether they are what greedy decoding gives: what comes after the context and before the
    one token of output. Contexts repeat, as those of multiple-choice tasks do."""
    context = [60, 61, 90, 75]
    best = int(values_of(tiny_path, context)[-1].argmax())
    ends = [[best], [best, 99], [70, 80, 90], [int(values_of(tiny_path, [*context, 5])[-1].argmax())]]
    answer = complete(client, [context + end for end in ends], echo=True, logprobs=1, max_tokens=1, seed=1234)
    for choice, end in zip(sorted(answer.choices, key=lambda c: c.index), ends, strict=True):
        values = choice.logprobs.token_logprobs[len(context) : -1]
        tops = choice.logprobs.top_logprobs[len(context) : -1]
        expected = values_of(tiny_path, context + end)[len(context) - 1 : -1]
        likelihood = sum(float(row[token]) for row, token in zip(expected, end, strict=True))
        assert sum(values) == pytest.approx(likelihood, abs=1e-3)
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        assert greedy == (expected.argmax(-1).tolist() == end)


def test_offsets_are_in_the_text_however_the_prompt_begins(client: openai.OpenAI) -> None:
    """Special tokens of the prompt are no text, and have log-probabilities."""
    choice = complete(client, [0, 1, 60, 61], echo=True, logprobs=0, max_tokens=2).choices[0]
    assert choice.logprobs.tokens[:2] == ["<|endoftext|>", "<|im_start|>"]
    assert choice.logprobs.text_offset[:4] == [0, 0, 0, 1]
    assert choice.text.startswith("".join(choice.logprobs.tokens[2:4]))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"best_of": 129}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_bad_completions_are_400s_that_name_the_field(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_priorities_need_the_policy(start: Callable[..., Server], tiny_path: Path, http: httpx.Client) -> None:
    """The order itself is the planner's, and tested there."""
    body = {"prompt": "a", "max_tokens": 2, "priority": -3}
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
    server = start(real(tiny_path, "--schedule-policy", "priority"))
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
