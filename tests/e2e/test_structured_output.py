"""Structured output over HTTP, with the stock client: what is asked for, what is refused, and who notices."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import psutil
import pytest

from tests.e2e.conftest import Server
from tests.forked import INJECTED

HELLO = [{"role": "user", "content": "Give me a person."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The built-in model."""
    log = tmp_path_factory.mktemp("logs") / "demo.log"
    flags = ["--port", "0", "--device", "cpu", "--dtype", "float32"]
    with Server.running(["-m", "minisgl", *flags], log, PATIENT="1", PYTHONPATH=INJECTED) as server:
        yield server


@pytest.fixture
def http(demo: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo.url, timeout=60) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_schema(demo: Server, stream: bool, temperature: float) -> None:
    with demo.client() as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=HELLO,
            seed=5,
            max_tokens=200,
            temperature=temperature,
            stream=stream,
            response_format=json_schema(SCHEMA),
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            assert answer.choices[0].finish_reason == "stop"
            text = answer.choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}, "max_tokens": 400, "temperature": 0}, r"\{.*\}"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "a|b"),
        ({"structured_outputs": {"json": {"enum": ["x", 2]}}}, '"x"|2'),
        ({"guided_regex": "(ab){2}"}, "abab"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'root ::= "u" "v"'}, "uv"),
        ({"guided_json": json.dumps({"const": None}), "guided_decoding_backend": "xgrammar"}, "null"),
    ],
)
def test_every_field(http: httpx.Client, fields: dict[str, Any], pattern: str) -> None:
    for path, prompt in (("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "It is"})):
        answer = http.post(path, json={**prompt, "max_tokens": 50, **fields})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        assert choice["finish_reason"] == "length" or re.fullmatch(pattern, text, re.DOTALL), text


def test_generate_takes_the_native_fields(http: httpx.Client) -> None:
    for fields, pattern in (
        ({"regex": "x{4}"}, "x{4}"),
        ({"ebnf": 'root ::= "q"'}, "q"),
        ({"json_schema": SCHEMA}, ""),
    ):
        answer = http.post("/generate", json={"text": "It is", "sampling_params": {"max_new_tokens": 90, **fields}})
        assert answer.status_code == 200, answer.text
        text = answer.json()["text"]
        if pattern:
            assert re.fullmatch(pattern, text)
        else:
            jsonschema.validate(json.loads(text), SCHEMA)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be an object"),
    ({"response_format": json_schema({"type": "strin"})}, "response_format", "Invalid type: strin"),
    ({"response_format": json_schema({"not": {}})}, "response_format", "not"),
    ({"response_format": json_schema({"enum": ["x" * 300_000]})}, "response_format", "characters"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag", "not supported"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "cannot both"),
    ({"guided_choice": []}, "guided_choice", "empty"),
    ({"guided_json": "{"}, "guided_json", "JSON"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "why"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_name_the_field(
    http: httpx.Client, fields: dict[str, Any], param: str, why: str, stream: bool
) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and why in error["message"], error


def test_nobody_notices_a_pathological_grammar(demo: Server) -> None:
    """It is refused within seconds. Meanwhile a stream goes on, and another grammar gets its turn."""
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(12_000)) + 'r12000: "a"'
    slow = json_schema({"type": "integer", "multipleOf": 9999991, "minimum": 0})
    refusals: list[openai.BadRequestError] = []

    def ask(**fields: Any) -> None:
        with demo.client() as client, pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=name, messages=HELLO, **fields)  # type: ignore[call-overload]
        refusals.append(caught.value)

    with demo.client() as client:
        name = client.models.list().data[0].id
        fields: dict[str, Any] = {"model": name, "prompt": "Once upon a time", "seed": 1, "stream": True}
        chunks = iter(client.completions.create(max_tokens=1500, extra_body={"ignore_eos": True}, **fields))
        next(chunks)
        threads = [threading.Thread(target=ask, kwargs={"response_format": slow})]
        threads.append(threading.Thread(target=ask, kwargs={"extra_body": {"guided_grammar": chain}}))
        for thread in threads:
            thread.start()
        num_meanwhile = 0
        while any(thread.is_alive() for thread in threads):
            if next(chunks, None) is None:  # it has come to its end; another one goes on
                chunks = iter(client.completions.create(max_tokens=1500, extra_body={"ignore_eos": True}, **fields))
            num_meanwhile += 1
        for thread in threads:
            thread.join()
        assert num_meanwhile >= 100, "the stream stood still"
        assert sorted(error.status_code for error in refusals) == [400, 400]
        assert any("takes more than 3 s" in error.message for error in refusals)
        fine = client.completions.create(
            model=name, prompt="a", max_tokens=9, extra_body={"structured_outputs": {"regex": "[ab]{3}"}}
        )
    assert re.fullmatch("[ab]{3}", fine.choices[0].text)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running(start: Callable[..., Server], tiny_path: Path, signum: int) -> None:
    """The processes that try grammars out end with the server, however that ends."""
    server = start(["-m", "minisgl", "--model", str(tiny_path), "--port", "0", "--max-seq-len", "256"])
    with httpx.Client(base_url=server.url, timeout=60) as http:
        answers = [http.post("/v1/completions", json={"prompt": "a", "guided_regex": f"a{{{i}}}"}) for i in (1, 2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    server.children = psutil.Process(server.process.pid).children(recursive=True)
    assert any("minisgl.grammar.store" in " ".join(child.cmdline()) for child in server.children)
    server.process.send_signal(signum)
    server.wait_exit()
    assert server.orphans() == []


def test_two_ranks(start: Callable[..., Server], tiny_path: Path, tmp_path: Path) -> None:
    """Rank 0 alone has the grammar, and both plan the same."""
    flags = ["--model", str(tiny_path), "--port", "0", "--tp", "2", "--max-seq-len", "256", "--device", "cpu"]
    walk = {"MINISGL_CHECK_INTEGRITY": "1", "MINISGL_INTEGRITY_FATAL": "1"}
    server = start(["-m", "minisgl", *flags], PYTHONPATH=INJECTED, RECORD_PLANS=str(tmp_path), **walk)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        answers: list[httpx.Response] = []

        def ask(**fields: Any) -> None:
            body = {"prompt": "It", "max_tokens": 40, "temperature": 1, **fields}
            answers.append(http.post("/v1/completions", json=body))

        threads = [threading.Thread(target=ask, kwargs={"guided_regex": f"[a-c]{{{5 + i}}}!"}) for i in range(4)]
        threads += [threading.Thread(target=ask) for _ in range(4)]
        threads += [threading.Thread(target=ask, kwargs={"guided_regex": "(a"})]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    texts = [answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200]
    assert len(texts) == 8 and sum(bool(re.fullmatch("[a-c]{5,8}!", text)) for text in texts) >= 4
    assert "Traceback" not in server.output()
    server.process.terminate()
    assert server.wait_exit() == 0
    first, second = ((tmp_path / f"TP{rank}.plans").read_text().splitlines() for rank in range(2))
    assert first == second and len(first) >= 40  # a step for each token, at least
