"""The HTTP API, through real processes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Server, fake
from tests.waiting import poll

CONTEXT = 256  # --max-seq-len of the session's server
PAST_EOS = {"ignore_eos": True}  # random weights may say at any time that it is over
HELLO: Any = [{"role": "user", "content": "hello"}]


def chat(client: openai.OpenAI, **options: Any) -> Any:
    defaults = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "extra_body": PAST_EOS}
    return client.chat.completions.create(**{**defaults, **options})


def test_chat(client: openai.OpenAI) -> None:
    answer = chat(client, temperature=0)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert abs(answer.created - time.time()) < 60
    assert len(answer.choices) == 1
    choice = answer.choices[0]
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content
    usage = answer.usage
    assert usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + 8
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_chat_streams_the_same(client: openai.OpenAI) -> None:
    options: Any = {"seed": 5, "max_tokens": 64}  # tokens that come together share a chunk
    whole = chat(client, **options)
    chunks = list(chat(client, **options, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 64
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len(chunks) > 5


def test_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="Once upon", max_tokens=8, seed=5, extra_body=PAST_EOS)
    assert whole.id.startswith("cmpl-")
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "length")
    chunks = list(
        client.completions.create(
            model="tiny", prompt="Once upon", max_tokens=8, seed=5, stream=True, extra_body=PAST_EOS
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_completion_takes_all_forms_of_prompts(client: openai.OpenAI) -> None:
    ids = [40, 41, 42]

    def texts(prompt: Any) -> list[str]:
        made = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, seed=1, extra_body=PAST_EOS)
        assert [choice.index for choice in made.choices] == list(range(len(made.choices)))
        assert made.usage is not None
        assert made.usage.completion_tokens == 4 * len(made.choices)
        return [choice.text for choice in made.choices]

    assert texts(["Once", "upon a"]) == texts("Once") + texts("upon a")
    assert texts([ids, [50]]) == texts(ids) + texts([50])


def test_default_length_of_completions_is_openai_s(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="Once", extra_body=PAST_EOS)
    assert made.usage is not None
    assert made.usage.completion_tokens == 16


def test_n_choices_differ_and_count_the_prompt_once(client: openai.OpenAI) -> None:
    one = chat(client, seed=3)
    four = chat(client, seed=3, n=4)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    texts = [choice.message.content for choice in four.choices]
    assert texts[0] == one.choices[0].message.content
    assert len(set(texts)) == 4
    assert texts[2] == chat(client, seed=5).choices[0].message.content
    assert four.usage.prompt_tokens == one.usage.prompt_tokens
    assert four.usage.completion_tokens == 32
    streamed = ["", "", "", ""]
    ends = []
    for chunk in chat(client, seed=3, n=4, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts
    assert sorted(ends) == [0, 1, 2, 3]


def test_seed_and_greedy_are_reproducible(client: openai.OpenAI) -> None:
    def text(**options: Any) -> str:
        return chat(client, **options).choices[0].message.content

    assert text(seed=11) == text(seed=11) != text(seed=12)
    assert text(temperature=0) == text(temperature=0, seed=99)
    assert len({text() for _ in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text(client: openai.OpenAI, stream: bool) -> None:
    whole = chat(client, temperature=0, max_tokens=40).choices[0].message.content
    stop = next(whole[i : i + 3] for i in range(4, 60) if "\ufffd" not in whole[i : i + 3])
    answer = chat(client, temperature=0, max_tokens=40, stop=["never this", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    else:
        text, reasons = answer.choices[0].message.content, [answer.choices[0].finish_reason]
    assert text == whole[: whole.index(stop)]
    assert reasons == ["stop"]


def test_long_max_tokens_end_at_the_context(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=100000)
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"
    unlimited = chat(client, max_tokens=openai.NOT_GIVEN)
    assert unlimited.usage.total_tokens == CONTEXT


def test_64_streams_at_once(client: openai.OpenAI) -> None:
    alone = {seed: chat(client, seed=seed, max_tokens=32).choices[0].message.content for seed in (1, 64)}

    def run(seed: int) -> str:
        return "".join(c.choices[0].delta.content or "" for c in chat(client, seed=seed, max_tokens=32, stream=True))

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(run, range(1, 65)))
    assert all(texts)
    assert (texts[0], texts[63]) == (alone[1], alone[64])


def test_generate(http: httpx.Client) -> None:
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = http.post("/generate", json={"text": "Hello", "sampling_params": sampling}).json()
    assert len(whole["output_ids"]) == 6
    assert whole["meta_info"]["finish_reason"] == "length"
    assert whole["meta_info"]["completion_tokens"] == 6
    by_ids = http.post("/generate", json={"input_ids": [40, 41], "sampling_params": sampling})
    assert by_ids.json()["meta_info"]["prompt_tokens"] == 2
    body = {"text": "Hello", "sampling_params": sampling, "stream": True}
    events = http.post("/generate", json=body).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [token for chunk in chunks for token in chunk["output_ids"]] == whole["output_ids"]


def test_models(client: openai.OpenAI, http: httpx.Client, tiny_path: Path) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert models[0].owned_by == "minisgl"
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == CONTEXT
    assert client.models.retrieve("tiny").id == "tiny"
    for name in (tiny_path.name, str(tiny_path)):
        assert chat(client, model=name).choices
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-9")
    assert caught.value.code == "model_not_found"
    assert http.get("/v1").json()["status"] == "ok"
    assert http.get("/health").status_code == 200


def test_openapi_describes_the_bodies(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, name in {
        "/v1/chat/completions": "ChatBody",
        "/v1/completions": "CompletionBody",
        "/generate": "GenerateBody",
        "/v1/responses": "ResponsesBody",
        "/v1/messages": "MessagesBody",
        "/v1/messages/count_tokens": "MessagesBody",
        "/tokenize": "TokenizeBody",
        "/detokenize": "DetokenizeBody",
        "/abort_request": "AbortBody",
    }.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content["application/json"]["schema"]["$ref"] == f"#/components/schemas/{name}"
        assert name in document["components"]["schemas"]
    others = {"401", "403", "404", "409", "429", "503", "504"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            expected = {"200", "400", "413", "415", "500"} if "requestBody" in operation else {"200", "500"}
            queries = ("get", "/v1/responses/{response_id}"), ("get", "/trace"), ("get", "/trace/live")
            has_query = path.endswith(("/input_items", "/cancel")) or (method, path) in queries
            expected |= {"400"} if has_query else set()
            assert expected == set(operation["responses"]) - others, (method, path)
            assert operation["description"]


def test_sse_headers_and_framing(http: httpx.Client) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 64}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: {") and "\n" not in event for event in events)


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function.name"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"top_p": -0.1}, "top_p"),
    ({"reasoning_effort": "a lot"}, "reasoning_effort"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stream": "yes"}, "stream"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"stop_token_ids": [400]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ({"priority": 1}, "priority"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"use_beam_search": True}, "use_beam_search"),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_bad_chat_is_a_400_that_names_the_field(
    http: httpx.Client, body: dict[str, Any], param: str, stream: bool
) -> None:
    if stream and not ({"stream", "stream_options"} & set(body)):
        body = {**body, "stream": True}
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param.split(".")[-1].split("[")[0] in error["message"]
    assert "\n" not in error["message"]


def test_a_prompt_that_is_too_long_is_told_both_lengths(http: httpx.Client) -> None:
    def completion(length: int) -> httpx.Response:
        return http.post("/v1/completions", json={"prompt": [5] * length, "ignore_eos": True})

    answer = completion(600)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT} tokens" in answer.json()["error"]["message"]
    assert "600" in answer.json()["error"]["message"]
    assert str(CONTEXT) in answer.json()["error"]["message"]
    assert completion(CONTEXT).status_code == 400
    assert completion(CONTEXT - 1).json()["usage"]["completion_tokens"] == 1
    answer = http.post("/v1/chat/completions", json={"messages": HELLO * 200, "stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [400], [-1], [2**40], ["a", 5], None, [True]])
def test_bad_prompts_of_completions(http: httpx.Client, prompt: Any) -> None:
    answer = http.post("/v1/completions", json={"prompt": prompt})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("prompt")


def test_values_that_change_nothing_are_accepted(http: httpx.Client) -> None:
    same = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": None,
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "stop": None,
        "seed": None,
        "parallel_tool_calls": True,
    }
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, **same})
    assert answer.status_code == 200, answer.text


def test_text_parts_and_messages_of_ours_are_accepted(client: openai.OpenAI) -> None:
    first = chat(client, messages=[{"role": "user", "content": [{"type": "text", "text": "hel"}]}])
    again = chat(client, messages=[*HELLO, first.choices[0].message.model_dump(), *HELLO])
    assert again.choices[0].message.content
    assert chat(client, messages=[{"role": "developer", "content": "be nice"}, *HELLO]).choices


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"{\xff\xfe", b'{"messages": NaN}', b"[" * 5000])
def test_malformed_json_is_a_400(http: httpx.Client, data: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/generate"):
        answer = http.post(path, content=data, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_http_errors_have_openai_s_shape(http: httpx.Client) -> None:
    for answer, status in (
        (http.get("/nope"), 404),
        (http.get("/v1/chat/completions"), 405),
        (http.post("/v1/completions", content=b" " * (64 * 2**20 + 1)), 413),
        (http.post("/v1/completions", data={"prompt": "a"}), 415),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_frees_the_scheduler(
    start: Callable[..., Server], model_path: Path, stream: bool
) -> None:
    """The scheduler runs two requests at once, and each would take half a minute: unless they are aborted, they are
    still there when the next one has ended."""
    server = start(fake(model_path, delay=0.05, max_running=2, num_tokenizer=1))
    body = {"messages": HELLO, "max_tokens": 490, "n": 2, "stream": stream}

    def abandon(_: int) -> None:
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.Client(base_url=server.url, timeout=0.5) as leaving,
            leaving.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            next(answer.iter_bytes())

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(abandon, range(3)))
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}, timeout=60)
    assert answer.status_code == 200
    load = httpx.get(f"{server.url}/server_info", timeout=60).json()["load"]
    assert load["num_running_requests"] == load["num_waiting_requests"] == load["num_requests_in_flight"] == 0
    lines = server.output().splitlines()
    assert [line for line in lines if " in " not in line or " id " not in line] == lines[:1]  # that it serves
    assert sum(" 499 in " in line for line in lines) == 3 or stream


def test_health_answers_while_requests_run(client: openai.OpenAI, http: httpx.Client) -> None:
    thread = threading.Thread(target=lambda: chat(client, max_tokens=120))
    thread.start()
    assert http.get("/health").status_code == 200
    thread.join()


def test_a_client_that_goes_away_while_it_sends_is_no_error(server: Server, http: httpx.Client) -> None:
    url, before = httpx.URL(server.url), server.output().count("POST /v1/completions ")
    with socket.create_connection((url.host, url.port)) as leaving:
        leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert http.get("/health").status_code == 200
    poll(lambda: server.output().count("POST /v1/completions ") > before, "its line is not in the log")
    assert "Traceback" not in server.output()


def test_unknown_fields_are_ignored_and_told(
    start: Callable[..., Server], http: httpx.Client, model_path: Path
) -> None:
    """Unless the server is told to be strict."""
    asked = {"/v1/chat/completions": {"messages": [{**HELLO[0], "id": "m"}]}, "/v1/completions": {"prompt": "a"}}
    asked |= {"/v1/responses": {"input": "a"}, "/generate": {"text": "a"}, "/tokenize": {"prompt": "a"}}
    strict = start(fake(model_path, strict_requests=True))
    for path, body in asked.items():
        more = {**body, "rid": "r", "max_tokns": 3, "n": None}
        answer = http.post(path, json={**more, "stream": True})
        assert answer.status_code == 200, answer.text
        names = answer.headers["x-minisgl-ignored"].split(", ")
        assert {"rid", "max_tokns"} <= set(names)
        assert ("messages[].id" in names) == ("messages" in body)
        refused = httpx.post(strict.url + path, json=more, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_parameter")
        if "messages" not in body:
            assert httpx.post(strict.url + path, json={**body, "n": None}, timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [2000, 100_000], ids=["counted", "by its characters"])
def test_each_endpoint_says_in_openai_s_words_that_a_prompt_is_too_long(
    http: httpx.Client, length: int, stream: bool
) -> None:
    """Which clients look for."""
    text = "hello " * length
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/completions": {"prompt": text},
        "/v1/responses": {"input": text},
        "/generate": {"text": text},
    }
    for path, body in bodies.items():
        error = http.post(path, json={**body, "stream": stream}).json()["error"]
        assert error["code"] == "context_length_exceeded", path
        assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, your ")
        assert error["param"] in body or error["param"] == "prompt"


def test_valid_values_that_others_refuse(http: httpx.Client) -> None:
    greedy = {"messages": HELLO, "max_tokens": 6.0, "ignore_eos": True}
    answer = http.post("/v1/chat/completions", json={**greedy, "temperature": 0}).json()
    texts = []
    for more in ({"top_p": 0}, {"top_p": 0, "seed": -1, "temperature": 2}, {"temperature": 0, "seed": -(2**63)}):
        made = http.post("/v1/chat/completions", json={**greedy, **more})
        assert made.status_code == 200, made.text
        texts.append(made.json()["choices"][0]["message"]["content"])
    assert set(texts) == {answer["choices"][0]["message"]["content"]}
    assert answer["usage"]["completion_tokens"] == 6


def test_half_of_a_surrogate_pair_is_a_replacement_character(http: httpx.Client) -> None:
    """As text that was cut in the middle of one has it; a whole pair is the character."""
    for text, meant in (('"a\\ud83d"', "a\ufffd"), ('"a\\ud83d\\ude00"', "a😀")):
        data = f'{{"prompt": {text}, "max_tokens": 2, "echo": true}}'.encode()
        answer = http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"].startswith(meant)


def test_histories_that_no_model_should_have_made(http: httpx.Client) -> None:
    """Their values pass between processes, and nobody else notices."""
    for arguments in ("{", "[1]", None, {"a": 10**30}, f'{{"a": {10**400}}}', '{"a": NaN}', "\ud800"):
        call = {"id": None, "function": {"name": "f", "arguments": arguments}}
        said = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_details": []}
        messages = [*HELLO, said, {"role": "tool", "content": None}]
        data = json.dumps({"messages": messages, "max_tokens": 2}).encode()
        answer = http.post("/v1/chat/completions", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
        data = json.dumps({"input": [*HELLO, item], "max_output_tokens": 2}).encode()
        answer = http.post("/v1/responses", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
