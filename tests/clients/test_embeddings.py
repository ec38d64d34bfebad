"""The stock clients of embeddings, with the built-in model: `openai` and LangChain; and what the how-to page shows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from tests.clients.prompts import MODEL
from tests.e2e.conftest import ROOT, Server
from tests.tokenizers_fixture import add_labels, make_byte_level

PAGE = (ROOT / "docs" / "howto" / "embeddings.md").read_text(encoding="utf-8")
TEXTS = ["A lighthouse by the sea.", "A red fox.", "größer 你好"]


def serve(task: str, folder: Path, *more: str) -> Server:
    flags = ["--task", task, "--served-model-name", MODEL, "--port", "0", "--device", "cpu", *more]
    return Server(["-m", "minisgl", *flags], folder / "server.log")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = serve("embed", tmp_path_factory.mktemp("logs"))
    yield running
    running.close()


def test_the_clients_agree(embedding: Server) -> None:
    with openai.OpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS)
        listed = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    vectors = [one.embedding for one in answer.data]
    np.testing.assert_allclose([one.embedding for one in listed.data], vectors, atol=1e-4)
    options = {"base_url": f"{embedding.url}/v1", "api_key": "none", "model": MODEL}
    langchain = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    np.testing.assert_allclose(langchain.embed_documents(TEXTS), vectors, atol=1e-4)
    short = OpenAIEmbeddings(**options, check_embedding_ctx_length=False, dimensions=8)
    assert len(short.embed_query(TEXTS[0])) == 8


async def test_concurrent_requests(embedding: Server) -> None:
    options = {"base_url": f"{embedding.url}/v1", "api_key": "none", "model": MODEL, "chunk_size": 2}
    async with httpx.AsyncClient() as own:
        langchain = OpenAIEmbeddings(**options, check_embedding_ctx_length=False, http_async_client=own)
        found = await langchain.aembed_documents(TEXTS)
    np.testing.assert_allclose(found, langchain.embed_documents(TEXTS), atol=1e-4)


def test_what_the_documents_show(embedding: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for shown in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE):
        exec(shown.replace("http://127.0.0.1:1919", embedding.url).replace("minisgl-demo", MODEL), {})
    cosine, size = capsys.readouterr().out.split()
    assert -1 <= float(cosine) <= 1 and int(size) > 32


def test_reranking_and_scores(tmp_path: Path) -> None:
    from tests.models import tiny_model  # which imports torch

    model = shutil.copytree(tiny_model("qwen3", vocab_size=512), tmp_path / "model")
    server = serve("score", tmp_path, "--model", str(add_labels(make_byte_level(model), yes=500, no=501)))
    try:
        documents, query = [*TEXTS, "What is red? A red fox."], "What is red?"
        ranked = httpx.post(f"{server.url}/v1/rerank", json={"query": query, "documents": documents}, timeout=60).json()
        scores = [result["relevance_score"] for result in ranked["results"]]
        assert scores == sorted(scores, reverse=True) and 0 <= min(scores) < max(scores) <= 1
        order = [result["index"] for result in ranked["results"]]
        assert [result["document"]["text"] for result in ranked["results"]] == [documents[i] for i in order]
        objects = [{"text": text} for text in documents]
        body = {"query": query, "documents": objects, "top_n": 2}
        for path, given in (("/rerank", objects), ("/v2/rerank", [*documents[:2], *objects[2:]])):
            body |= {"documents": given, "return_documents": False}
            best = httpx.post(server.url + path, json=body, timeout=60).json()["results"]
            assert [(one["index"], "document" in one) for one in best] == [(i, False) for i in order[:2]]
        for text_1 in (query, [query] * 4):
            answer = httpx.post(f"{server.url}/v1/score", json={"text_1": text_1, "text_2": documents}, timeout=60)
            given = [one["score"] for one in answer.json()["data"]]
            np.testing.assert_allclose([given[i] for i in order], scores, atol=1e-5)
        for first, second in (("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):  # vLLM's, too
            answer = httpx.post(f"{server.url}/v1/score", json={first: query, second: documents}, timeout=60)
            np.testing.assert_allclose([one["score"] for one in answer.json()["data"]], given, atol=1e-5)
        answer = httpx.post(f"{server.url}/v1/rerank", json={**body, "top_n": None, "top_k": 1}, timeout=60)  # Voyage's
        assert len(answer.json()["results"]) == 1
        wrong = {"text_1": [query] * 3, "text_2": documents}, {"text_1": query, "text_2": []}
        for body in wrong:
            answer = httpx.post(f"{server.url}/v1/score", json=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == ("text_1" if body["text_2"] else "text_2")
        for path, body in (("rerank", {"query": "a", "documents": ["b"]}), ("score", {"text_1": "a", "text_2": "b"})):
            answer = httpx.post(f"{server.url}/v1/{path}", json={**body, "use_activation": False})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "use_activation")
        many = {"query": "a" * 5000, "documents": ["b"] * 2000}  # a body of 15 KB
        answer = httpx.post(f"{server.url}/rerank", json=many, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "documents"
        too_long = {"query": query, "documents": ["a b " * 20_000]}
        answer = httpx.post(f"{server.url}/rerank", json=too_long, timeout=60)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert answer.json()["error"]["param"] == "documents"
        assert httpx.post(f"{server.url}/v1/embeddings", json={"input": "a"}).status_code == 400
    finally:
        server.close()
