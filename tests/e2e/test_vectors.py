"""/v1/embeddings by the stock client, beside generation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.e2e.conftest import Server, real
from tests.waiting import poll

TEXTS = ["Hello world", "größer 你好世界 🙂", "The quick brown fox jumps over the lazy dog."]


@pytest.fixture(scope="module")
def server(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--task", "embed", "--max-seq-len", "64", "--max-prefill-length", "32", "--api-key", "secret")
    running = Server(real(tiny_path, *flags), tmp_path_factory.mktemp("logs") / "server.log")
    yield running
    running.close()
    assert "Traceback" not in running.output()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=60) as made:
        yield made


def vectors(client: openai.OpenAI, given: Any, **options: Any) -> np.ndarray[Any, Any]:
    answer = client.embeddings.create(model="tiny", input=given, **options)
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.array([one.embedding for one in answer.data])


def test_all_kinds_of_input_and_encodings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # the client asks for base64
    assert answer.object == "list" and answer.model == "tiny"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    expected = np.array([one.embedding for one in answer.data])
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors(client, TEXTS, encoding_format="float"), expected, atol=1e-6)
    np.testing.assert_allclose(vectors(client, TEXTS[0], extra_body={"normalize": True})[0], expected[0], atol=1e-5)
    ids = [
        client.post("/../tokenize", body={"prompt": text}, cast_to=httpx.Response).json()["tokens"] for text in TEXTS
    ]
    np.testing.assert_allclose(vectors(client, ids), expected, atol=1e-5)
    np.testing.assert_allclose(vectors(client, ids[1])[0], expected[1], atol=1e-5)
    short = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(vectors(client, TEXTS, dimensions=8), short, atol=1e-5)


def test_truncation(client: openai.OpenAI) -> None:
    text = TEXTS[2] * 9
    with pytest.raises(openai.BadRequestError) as refused:
        vectors(client, ["a", text])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    ids = client.post("/../tokenize", body={"prompt": TEXTS[2]}, cast_to=httpx.Response).json()["tokens"]
    for most in (5, 64, -1):
        got = vectors(client, text, extra_body={"truncate_prompt_tokens": most})
        np.testing.assert_allclose(got, vectors(client, (ids * 9)[: most % 65 or 64]), atol=1e-5)
    got = vectors(client, text * 1000, extra_body={"truncate_prompt_tokens": 5})  # of what could never fit
    np.testing.assert_allclose(got, vectors(client, ids[:5]), atol=1e-5)


@pytest.mark.parametrize("given", ["word " * 65, [7] * 65, [7] * 650, "word " * 9000])
def test_what_is_too_long_is_told_the_context(client: openai.OpenAI, given: Any) -> None:
    """As it is: nothing is needed for an output."""
    assert len(vectors(client, [7] * 64)) == 1
    with pytest.raises(openai.BadRequestError) as refused:
        vectors(client, given)
    assert "context length is 64 tokens" in refused.value.message and "output" not in refused.value.message


def test_salts_and_times_are_a_requests_own(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        body = {"model": "tiny", "input": "a secret that takes several pages of the cache", "cache_salt": salt}
        answer = client.post("/embeddings", body=body, cast_to=httpx.Response).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached("a"), cached("b")] == [0, 0] and min(cached("a"), cached("b")) > 15
    with pytest.raises(openai.APIStatusError) as late:
        vectors(client, TEXTS * 600, extra_body={"timeout": 0.01})
    assert late.value.status_code == 504


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 3]}, "input[1]"),
        ({"input": [[1, -1]]}, "input"),
        ({"input": [399, 400]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": "a", "encoding_format": "ubinary"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "prompt_name": "query"}, "prompt_name"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({"input": "a", "embedding_types": ["int8"]}, "embedding_types"),
        ({"input": "a", "cache_salt": ""}, "cache_salt"),
        ({"input": "a", "timeout": 0}, "timeout"),
        ({"input": "a", "model": "other"}, "model"),
    ],
)
def test_what_is_wrong_is_named(server: Server, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, headers={"authorization": "Bearer secret"})
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400), error
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_keys_other_tasks_and_what_is_counted(server: Server, client: openai.OpenAI) -> None:
    assert httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}).status_code == 401
    with pytest.raises(openai.BadRequestError, match="--task score"):
        client.post("/rerank", body={"query": "a", "documents": ["b"]}, cast_to=httpx.Response)
    before, after = (metrics(server), vectors(client, ["a b c", "d"]), metrics(server))[::2]
    name = "minisgl:prompt_tokens_total"
    assert after[name] > before[name]


def metrics(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer secret"}).text
    rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, value in rows}


def test_beside_generation_and_when_clients_go_away(server: Server, client: openai.OpenAI) -> None:
    def write() -> str:
        said = client.completions.create(model="tiny", prompt="Hello", max_tokens=40, temperature=0)
        return said.choices[0].text

    expected, wanted = write(), vectors(client, TEXTS)
    with ThreadPoolExecutor() as threads:
        written = [threads.submit(write) for _ in range(4)]
        found = [threads.submit(vectors, client, TEXTS) for _ in range(8)]
        gone = threads.submit(client.with_options(timeout=0.02).embeddings.create, model="tiny", input=TEXTS * 600)
        assert [one.result() for one in written] == [expected] * 4
        for one in found:
            np.testing.assert_allclose(one.result(), wanted, atol=1e-4)
        with pytest.raises(openai.APITimeoutError):
            gone.result()
    np.testing.assert_allclose(vectors(client, TEXTS), wanted, atol=1e-4)
    headers = {"authorization": "Bearer secret"}
    load = lambda: httpx.get(f"{server.url}/server_info", headers=headers).json()["load"]  # noqa: E731
    poll(lambda: load()["num_requests_in_flight"] <= 1, "what nobody waits for is still computed")
