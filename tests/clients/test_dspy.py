"""DSPy, with the built-in model: typed programs through its own transport (lm15) and through LiteLLM.

Its prompts are beyond a small model, so what is asserted of the answers is their types.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import run_client
from tests.clients.prompts import MODEL
from tests.e2e.conftest import Server


@pytest.fixture(scope="module")
def answers(demo: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("dspy"))
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DSPY_CACHEDIR": folder}
    return run_client("dspy_client", f"{demo.url}/v1", MODEL, **environment)


@pytest.fixture(params=["lm15", "litellm"])
def found(answers: Any, request: pytest.FixtureRequest) -> Any:
    """Of one transport."""
    return answers[request.param]


def test_texts(found: Any) -> None:
    assert found["texts"] == [["3 + 4 = 7."]] * 2
    assert found["usage"] > 0


def test_typed_answers(found: Any) -> None:
    """Asked for in its own format and, since that fails, by a schema; by a schema at once, whole and streamed."""
    assert found["types"] == [["bool", "Guest"]] * 3


def test_calls(found: Any) -> None:
    """Demanded; the second time beside a schema for the answer."""
    assert found["calls"] == [["get_weather", ["city"]]] * 2


def test_errors(found: Any) -> None:
    assert found["missing"][0] == "LMUnsupportedModelError"
    assert found["long"][0] == "ContextWindowExceededError"
