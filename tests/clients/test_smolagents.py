"""smolagents, with the built-in model: its agents of calls and of code, which send long prompts and demand calls."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server

ARGUMENTS = {"get_weather": ["city"], "final_answer": ["answer"]}


@pytest.fixture(scope="module")
def found(demo: Server) -> Any:
    return run_client("smolagents_client", f"{demo.url}/v1", MODEL)


def test_texts(found: Any) -> None:
    assert found["texts"] == ["3 + 4 = 7."] * 2


@pytest.mark.parametrize("how", ["calling", "streamed"])
def test_demanded_calls_are_of_its_tools(found: Any, how: str) -> None:
    made = found[how]
    assert made["calls"] and all(arguments == ARGUMENTS[name] for name, arguments in made["calls"])
    assert made["tokens"] > 0


def test_code_comes_in_a_schema(found: Any) -> None:
    assert found["coding"] == {"thought": "str", "code": "str"}


def test_a_prompt_that_is_too_long_is_its_error(found: Any) -> None:
    assert "maximum context length is 2048 tokens" in found["long"]
