"""LlamaIndex, with the built-in model. It runs in a process of its own, with the packages of `apart/older.txt`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server

PERSON = {"name": "Anna", "age": 31}


@pytest.fixture(scope="module")
def found(demo: Server) -> Any:
    return run_client("llama_index_client", f"{demo.url}/v1", MODEL, apart="older")


def test_it_has_an_older_release_of_the_library(found: Any) -> None:
    assert found["openai"].startswith("2.")


def test_texts(found: Any) -> None:
    assert found["texts"] == ["3 + 4 = 7."] * 5
    whole, streamed = found["completions"]
    assert whole == streamed != ""


def test_tools(found: Any) -> None:
    assert found["calls"] == [["get_weather", {"city": "Paris"}]] * 2
    made = found["agents"]
    assert made["called"] == ["get_weather"]
    weather, later = made["outputs"]
    assert "sunny in Paris" in weather and later == "3 + 4 = 7."


def test_output_types(found: Any) -> None:
    assert [*found["persons"], found["agents"]["person"]] == [PERSON] * 5


def test_errors(found: Any) -> None:
    assert found["missing"] == ["NotFoundError", "model_not_found"]
    assert found["long"] == ["BadRequestError", "context_length_exceeded"]
