"""Schemathesis makes requests of the OpenAPI document, right and wrong ones: each gets an answer that is documented."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.e2e.conftest import Server

schemathesis = pytest.importorskip("schemathesis")  # of the extra `clients`

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,  # so the document names all ranges
]
KEY = {"authorization": "Bearer sk-of-this-test"}
EXAMPLES = 14  # for each operation and mode
SECONDS = 20  # that any answer may take
FORMS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
# What excludes each other, and what needs something else beside it: bodies made of the schema have it all at once.
EXCLUSIVE = (
    ("max_tokens", "max_completion_tokens", "max_new_tokens"),
    ("text", "input_ids"),
    ("prompt", "messages"),
    ("rid", "abort_all"),
)
SELDOM = (
    *(
        "model",
        "priority",
        "min_tokens",
        "top_logprobs",
        "stream_options",
        "best_of",
        "tools",
        "tool_choice",
        "metadata",
        "prompt_name",
        "dimensions",
    ),
    *("continue_final_message", "add_generation_prompt"),
    *("chat_template_kwargs", "stop_token_ids", "logit_bias", "json_schema", "regex", "ebnf", "add_special_tokens"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The built-in model, with room for short answers only."""
    log = tmp_path_factory.mktemp("logs") / "server.log"
    flags = ["--port", "0", "--max-seq-len", "96", "--api-key", "sk-of-this-test", "--task", "embed"]
    running = Server(["-m", "minisgl", *flags], log, LOG_LEVEL="WARNING")
    yield running
    running.close()
    assert "Traceback" not in running.output()


@pytest.fixture(scope="module")
def operations(server: Server) -> list[Any]:
    """Of the document as it is, but that no answer may have a field that is not in it."""
    document = httpx.get(f"{server.url}/openapi.json", headers=KEY).json()
    for name, schema in document["components"]["schemas"].items():
        if name != "ModelResponse":  # the request's fields come back in it
            schema.setdefault("additionalProperties", False)
    api = schemathesis.openapi.from_dict(document)
    api.config.update(base_url=server.url)
    return [result.ok() for result in api.get_all_operations()]


LEAST = {"/generate": {"text": "a"}, "/tokenize": {"prompt": "a"}, "/abort_request": {"rid": "a"}}


def take_time(body: Any) -> None:
    """No answer is late: what has a limit of nothing gets a 504, as documented, and tells nothing."""
    if isinstance(body, dict) and isinstance(body.get("timeout"), int | float) and body["timeout"] > 0:
        body["timeout"] = 600


def soften(body: Any, path: str, chance: random.Random) -> None:
    """Take out of a body what would most likely have it refused."""
    if not isinstance(body, dict):
        return
    if all(value is None for value in body.values()):
        body.update(LEAST.get(path, {}))
    for part in (body, body.get("sampling_params")):
        if isinstance(part, dict):
            given_names = ([name for name in names if part.get(name) is not None] for names in EXCLUSIVE)
            drop = [name for names in given_names for name in names[1:]]
            drop += [name for name in (*SELDOM, *FORMS) if chance.random() < 0.9]
            for name in drop:
                part.pop(name, None)
    for name in ("prompt", "input_ids", "tokens"):
        if isinstance(body.get(name), list):
            body[name] = [int(item) % 4096 if isinstance(item, int | float) else item for item in body[name]] or [1]
    if isinstance(body.get("input"), list):
        body["input"] = str(body["input"])[:30]
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and chance.random() < 0.9:
            message["content"] = str(message.get("content"))[:30]
            for name in [name for name in message if name not in ("role", "content")]:
                del message[name]
            if message.get("role") == "tool":
                message["tool_call_id"] = "call-1"


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::hypothesis.errors.HypothesisWarning")
def test_every_answer_is_documented(server: Server, operations: list[Any]) -> None:
    chance = random.Random(1)
    answered: Counter[tuple[str, int]] = Counter()

    def check(operation: Any, mode: Any) -> None:
        @seeded(1)
        @settings(
            max_examples=EXAMPLES if operation.body else 3,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(mode))
        def run(case: Any) -> None:
            take_time(case.body)
            if mode.is_positive:
                soften(case.body, operation.path, chance)
            answer = case.call(headers=KEY, timeout=SECONDS)
            answered[operation.path, answer.status_code] += 1
            case.validate_response(answer, checks=CHECKS)

        run()

    for operation in operations:
        for mode in schemathesis.GenerationMode:
            if mode.is_positive or operation.body:
                check(operation, mode)
    assert httpx.get(f"{server.url}/health").status_code == 200
    load = httpx.get(f"{server.url}/server_info", headers=KEY).json()["load"]
    assert load["num_running_requests"] == load["num_waiting_requests"] == 0
    seldom = [
        operation.path for operation in operations if answered[operation.path, 200] < (3 if operation.body else 1)
    ]
    # An id cannot be made up, and a model for scores gives no vectors; the others were answered.
    assert seldom == [path for path in seldom if "{" in path or path.endswith(("/rerank", "/score"))]


def test_without_a_key_all_but_health_is_a_documented_401(server: Server, operations: list[Any]) -> None:
    for operation in operations:
        answer = httpx.request(operation.method, server.url + operation.path)
        documented = operation.definition.raw["responses"]
        assert str(answer.status_code) in documented
        assert (answer.status_code == 401) == ("401" in documented) == (not operation.path.startswith("/health"))
