"""Instructor, with the built-in model. It runs in a process of its own, with the packages of `apart/older.txt`."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server

PERSON = {"name": "Anna", "age": 31}


@pytest.fixture(scope="module")
def found(demo: Server) -> Any:
    """What `instructor_client.py` says."""
    return run_client("instructor_client", f"{demo.url}/v1", MODEL, apart="older")


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA"])
def test_modes(found: Any, mode: str) -> None:
    made = found[mode]
    assert made["whole"] == PERSON
    assert made["partial"][-1] == PERSON
    assert made["partial"][0] == {"name": None, "age": None}
    assert made["tool_calls"] == mode.startswith("TOOLS")
    assert made["total_tokens"] > 0


def test_the_async_client(found: Any) -> None:
    assert found["async"] == PERSON


def test_complaints_are_taken(found: Any) -> None:
    """As a message of role `tool` after our own, which comes back."""
    assert found["attempts"] == 2


def test_it_has_another_release_of_the_library(found: Any) -> None:
    assert found["openai"] != openai.__version__
