"""What other clients send, body by body: of their documentation and sources, for those that are no package to install.

Each is accepted, and what they read in the answer is there.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.clients.prompts import GET_WEATHER, MODEL

PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
FILTERS = {"top_p": 0.9, "top_k": 20, "min_p": 0.05, "temperature": 0.7}
GUIDELLM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
PENALTIES = {"frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.05}
# Open WebUI sends calls back as its stream had them, each with its index.
CALL = {
    "id": "call_1",
    "index": 0,
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "X"}'},
}
CALLED = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
NATIVE = {"lora_path": None, "return_logprob": False, "return_routed_experts": False, "logprob_start_len": -1}
PARAMS = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "vllm": {"prompt": "Hi", "repetition_penalty": 1.0, "logprobs": None, "ignore_eos": True, **USAGE},
    "vllm with sampling": {"prompt": "Hi", "logprobs": 1, **FILTERS, **PENALTIES, **USAGE, "min_tokens": 4},
    "vllm of ids": {"prompt": [300, 301], "repetition_penalty": 1.0, "logprobs": None, **USAGE},
    "vllm of old": {"prompt": "Hi", "temperature": 0.0, "best_of": 1, "logprobs": None, "stream": True},
    "sglang": {"prompt": "Hi", "temperature": 0.0, "best_of": 1, "stream": True, "ignore_eos": True},
    "sglang, whole": {"prompt": "Hi", "temperature": 0.0, "best_of": 1, "stream": False, "ignore_eos": True},
    "GuideLLM": {"prompt": "Hi", "max_tokens": 4, "stop": None, "ignore_eos": True, **GUIDELLM},
    "lm-eval": {"prompt": [[300, 301]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True},
}
CHATS: dict[str, dict[str, Any]] = {
    "vllm": {"messages": PARTS, "max_completion_tokens": 4, **USAGE, "ignore_eos": True},
    "vllm with sampling": {"messages": PARTS, "max_completion_tokens": 4, **FILTERS, **PENALTIES, **USAGE},
    "sglang": {"messages": CHAT, "temperature": 0.0, "max_tokens": 4, "stream": True, "ignore_eos": True},
    "sglang, whole": {"messages": CHAT, "temperature": 0.0, "max_tokens": 4, "stream": False},
    "Open WebUI": {"messages": CHAT, **USAGE, **FILTERS, "seed": 1, "stop": ["###"], "logit_bias": {"5": 1}},
    "Open WebUI, a title": {"messages": CHAT, "stream": False, "max_completion_tokens": 1000},
    "Open WebUI, tools": {"messages": [*CHAT, *CALLED], "tools": [GET_WEATHER], **USAGE, "max_tokens": 40},
    "LibreChat": {"messages": CHAT, "stream": True, "user": "65b0", "max_tokens": 4},
    "lm-eval": {"messages": PARTS, "max_tokens": 4, "temperature": 0, "stop": ["\n\n", "<|im_end|>"], "seed": 1234},
}
GENERATE: dict[str, dict[str, Any]] = {
    "sglang": {"text": "Hi", "sampling_params": PARAMS, "stream": True, **NATIVE},
    "sglang of ids": {
        "input_ids": [300, 301],
        "sampling_params": PARAMS,
        "stream": False,
        **NATIVE,
        "image_data": None,
    },
    "sglang of late": {
        "text": "Hi",
        "sampling_params": {**PARAMS, "top_p": 1.0},
        "stream": True,
        **NATIVE,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
    },
}


def answers(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, or the one answer."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return [answer.json()]
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", body) for body in COMPLETIONS.values()]
    + [("/v1/chat/completions", body) for body in CHATS.values()],
    ids=[f"completions: {name}" for name in COMPLETIONS] + [f"chats: {name}" for name in CHATS],
)
def test_openai_s_api(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    limit = {} if "messages" in body else {"max_tokens": body.get("max_tokens", 4)}
    chunks = answers(http, path, {"model": MODEL, **limit, **body})
    if body.get("stream_options"):
        assert chunks[-1]["choices"] == [] and chunks.pop()["usage"]["completion_tokens"] >= 1
    for chunk in chunks:  # what they read first is always there
        (choice,) = chunk["choices"]
        assert isinstance(choice.get("text", choice.get("delta", choice.get("message"))), (str, dict))
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")


@pytest.mark.parametrize("body", GENERATE.values(), ids=GENERATE)
def test_the_native_api(http: httpx.Client, body: dict[str, Any]) -> None:
    chunks = answers(http, "/generate", body)
    assert all(isinstance(chunk["text"], str) for chunk in chunks)
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 4


@pytest.mark.parametrize(
    "field", [{"return_logprob": True}, {"top_logprobs_num": 2}, {"lora_path": "x"}, {"image_data": ["x"]}], ids=str
)
def test_what_native_fields_would_change_is_refused(http: httpx.Client, field: dict[str, Any]) -> None:
    answer = http.post("/generate", json={"text": "Hi", **field})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(field)))


def test_what_they_ask_for_beside(http: httpx.Client) -> None:
    """The model's name, whether the server is there, and an empty cache before a benchmark."""
    assert http.get("/v1/models").json()["data"][0]["id"] == MODEL
    for path in ("/health", "/server_info", "/version", "/metrics"):
        assert http.get(path).status_code == 200
    assert http.post("/flush_cache").status_code == 200
    key = {"authorization": "Bearer None"}  # of clients that have none
    assert http.get("/v1/models", headers=key).status_code == 200
