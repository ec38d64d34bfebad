"""OpenAI's `prediction` with the stock client: the same answer in fewer steps, and what bad ones get."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Server

ASKED: Any = {
    "model": "minisgl-demo",
    "messages": [{"role": "user", "content": "What is continuous batching?"}],
    "temperature": 0,
    "max_tokens": 60,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The built-in model, whose words become the same tokens again."""
    args = ["-m", "minisgl", "--port", "0", "--device", "cpu", "--max-seq-len", "1024", "--speculate", "off"]
    with Server.running(args, tmp_path_factory.mktemp("demo") / "server.log") as server:
        yield server


def counted(server: Server, name: str) -> dict[str, float]:
    """By drafter."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(rf"^minisgl:{name}_total{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
    return {re.findall(r'drafter="(\w+)"', labels)[0]: float(value) for labels, value in found}


def details(usage: Any) -> tuple[int, int]:
    told = usage and usage.completion_tokens_details
    return (told.accepted_prediction_tokens or 0, told.rejected_prediction_tokens or 0) if told else (0, 0)


def test_a_prediction_that_is_right_is_accepted(demo: Server) -> None:
    with demo.client() as client:
        plain = client.chat.completions.create(**ASKED)
        assert details(plain.usage) == (0, 0), "nobody drafts without being asked"
        text = plain.choices[0].message.content
        predicted: list[Any] = [text, [{"type": "text", "text": text[:20]}, {"type": "text", "text": text[20:]}]]
        total = [0, 0]
        for content in predicted:
            answer = client.chat.completions.create(**ASKED, prediction={"type": "content", "content": content})
            assert answer.choices[0].message.content == text
            right, wrong = details(answer.usage)
            assert right > plain.usage.completion_tokens // 2
            total = [total[0] + right, total[1] + wrong]
        assert counted(demo, "spec_decode_num_accepted_tokens") == {"prediction": total[0]}
        assert counted(demo, "spec_decode_num_draft_tokens") == {"prediction": sum(total)}


def test_a_prediction_that_is_wrong_changes_nothing(demo: Server) -> None:
    with demo.client() as client:
        text = client.chat.completions.create(**ASKED).choices[0].message.content
        assert text is not None
        for guess in ("", "Quite another thing.", text.replace("e", "a"), f"Well: {text}"):
            told, usage = "", None
            with client.chat.completions.create(
                **ASKED,
                prediction={"type": "content", "content": guess},
                stream=True,
                stream_options={"include_usage": True},
            ) as stream:
                for chunk in stream:
                    told += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    usage = chunk.usage or usage
            assert told == text
            assert guess != f"Well: {text}" or details(usage)[0] > 10, "it finds its place after what was left out"


@pytest.mark.parametrize(
    ("prediction", "why"),
    [
        ("text", "prediction: "),
        ({"type": "text", "content": "x"}, "prediction.type: "),
        ({"content": "x"}, "prediction.type is required"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": 3}, "prediction.content"),
        (
            {"type": "content", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "this model is text-only and cannot take images",
        ),
        ({"type": "content", "content": "word " * 2000}, "Please reduce the length of the prediction"),
        ({"type": "content", "content": "word " * 1_000_000}, "Please reduce the length of the prediction"),
    ],
)
def test_a_bad_prediction_is_refused_by_name(demo: Server, prediction: Any, why: str) -> None:
    with demo.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED, prediction=prediction)
    assert why in refused.value.message
    assert str(refused.value.param).startswith("prediction")


def test_requests_without_drafts_stay_so(demo: Server) -> None:
    """`speculate: 0` is of a request's own draft, too."""
    with demo.client() as client:
        text = client.chat.completions.create(**ASKED).choices[0].message.content
        guess: Any = {"type": "content", "content": text}
        answer = client.chat.completions.create(**ASKED, prediction=guess, extra_body={"speculate": 0})
        assert details(answer.usage) == (0, 0)


def test_by_default_predictions_come_before_what_the_head_says(tmp_path: Path) -> None:
    args = ["-m", "minisgl", "--port", "0", "--device", "cpu", "--dtype", "float32", "--max-seq-len", "1024"]
    with Server.running(args, tmp_path / "server.log") as server, server.client() as client:
        plain = client.chat.completions.create(**ASKED)
        of_head = counted(server, "spec_decode_num_accepted_tokens")
        assert of_head == {"mtp": details(plain.usage)[0]} and of_head["mtp"] > plain.usage.completion_tokens // 2
        guess: Any = {"type": "content", "content": plain.choices[0].message.content}
        answer = client.chat.completions.create(**ASKED, prediction=guess)
        assert answer.choices[0].message.content == plain.choices[0].message.content
        total = counted(server, "spec_decode_num_accepted_tokens")
        assert total["prediction"] > plain.usage.completion_tokens // 2 > total["mtp"] - of_head["mtp"]


def test_a_question_asked_again_is_guessed_by_the_tree(tmp_path: Path) -> None:
    """The output stays the same; nobody is told what another tenant has asked."""
    asked: Any = {**ASKED, "messages": [{"role": "user", "content": "What is a token?"}]}
    flags = ["--device", "cpu", "--dtype", "float32", "--max-seq-len", "1024", "--speculate", "ngram"]
    with Server.running(["-m", "minisgl", "--port", "0", *flags], tmp_path / "server.log") as server:
        with server.client() as client:
            first = client.chat.completions.create(**asked, extra_body={"cache_salt": "a"})
            before = counted(server, "spec_decode_num_draft_tokens").get("tree", 0)
            other = client.chat.completions.create(**asked, extra_body={"cache_salt": "b"})
            assert counted(server, "spec_decode_num_draft_tokens").get("tree", 0) == before == 0
            again = client.chat.completions.create(**asked, extra_body={"cache_salt": "a"})
        answers = {answer.choices[0].message.content for answer in (first, other, again)}
        assert len(answers) == 1
        right = counted(server, "spec_decode_num_accepted_tokens")["tree"]
        assert right == counted(server, "spec_decode_num_draft_tokens")["tree"]
        assert again.usage is not None and right > again.usage.completion_tokens // 2
        assert details(other.usage)[0] < right <= details(again.usage)[0]
