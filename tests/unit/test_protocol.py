"""Request bodies: what they become, and that nothing but a refusal comes of bad ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.core import MAX_COUNT, SamplingParams
from minisgl.errors import RequestError
from minisgl.message.codec import unpack_ids
from minisgl.message.tokenizer import ChatPrompt, IdsPrompt, TextPrompt
from minisgl.server.protocol import (
    ChatBody,
    CompletionBody,
    GenerateBody,
    choice_seeds,
    parse_chat,
    parse_completion,
    parse_generate,
)
from minisgl.server.protocol_sampling import SamplingFields

HELLO = [{"role": "user", "content": "hello"}]


def chat(**body: Any) -> Any:
    return parse_chat(json.dumps({"messages": HELLO, **body}).encode(), {})


def test_what_a_chat_becomes() -> None:
    body = {
        "model": "m",
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "stop": "END",
        "ignore_eos": True,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parsed = chat(**body)
    assert parsed.prompts == (ChatPrompt(messages=HELLO),)
    assert parsed.params == SamplingParams(9, 0.5, 7, 0.9, 0.1, 3, ("END",), True)
    assert (parsed.model, parsed.n, parsed.stream, parsed.include_usage) == ("m", 2, True, True)


def test_the_last_message_goes_on_if_the_client_says_so() -> None:
    said = {"role": "assistant", "content": "b"}
    plain, on, without = (
        chat(messages=[*HELLO, said], **fields).prompts[0]
        for fields in ({}, {"continue_final_message": True}, {"add_generation_prompt": False})
    )
    assert (plain.add_generation_prompt, plain.continue_final) == (True, False)
    assert on.continue_final
    assert (without.add_generation_prompt, without.continue_final) == (False, False)
    assert chat(messages=[*HELLO, said], continue_final_message=True, add_generation_prompt=False)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for last, fields in (
        (said, {"add_generation_prompt": True}),
        (HELLO[0], {}),
        ({"role": "assistant", "tool_calls": [call]}, {}),
    ):
        with pytest.raises(RequestError) as refused:
            chat(messages=[*HELLO, last], continue_final_message=True, **fields)
        assert refused.value.param == "continue_final_message"


def test_defaults_are_the_model_s_unless_the_client_says_otherwise() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    data = json.dumps({"messages": HELLO, "temperature": 0, "top_p": None}).encode()
    params = parse_chat(data, defaults).params
    assert (params.temperature, params.top_k, params.top_p) == (0, 20, 0.95)
    assert chat().params == SamplingParams()


@pytest.mark.parametrize(("fields", "limit"), [({}, 50), ({"max_tokens": 9}, 9), ({"min_tokens": 60}, 60)])
def test_the_model_s_default_of_max_tokens(fields: dict[str, Any], limit: int) -> None:
    data = json.dumps({"messages": HELLO, **fields}).encode()
    params = parse_chat(data, {"max_tokens": 50, "repetition_penalty": 1.05}).params
    assert (params.max_tokens, params.repetition_penalty) == (limit, 1.05)


def test_every_sampling_field_arrives() -> None:
    given: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": 3, "9": -100.0},
        "stop_token_ids": [4, 5],
        "include_stop_str_in_output": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
        "priority": -3,
        "max_tokens": 9,
    }
    expected = SamplingParams(**{**given, "logit_bias": ((7, 3.0), (9, -100.0)), "stop_token_ids": (4, 5)})
    assert chat(**given).params == expected
    native = json.dumps({"text": "a", "sampling_params": given}).encode()
    assert parse_generate(native, {}).params == expected
    assert chat(**dict.fromkeys(given)).params == SamplingParams()


def completion(**body: Any) -> Any:
    return parse_completion(json.dumps({"prompt": "a", **body}).encode(), {})


def test_what_log_probabilities_become() -> None:
    def wanted(parsed: Any) -> tuple[Any, ...]:
        return parsed.logprobs, parsed.params.logprobs, parsed.params.prompt_logprobs

    assert wanted(chat()) == wanted(completion()) == (False, None, None)
    assert wanted(chat(logprobs=True)) == (True, 0, None)
    assert wanted(chat(logprobs=True, top_logprobs=5)) == (True, 5, None)
    assert wanted(chat(logprobs=False, top_logprobs=0)) == (False, None, None)
    assert wanted(completion(logprobs=3)) == (True, 3, None)
    assert wanted(completion(logprobs=3, echo=True)) == (True, 3, 3)
    assert wanted(completion(echo=True, max_tokens=0)) == (False, None, None)
    assert wanted(completion(best_of=3)) == (False, 0, None)  # to choose by
    assert (completion(best_of=3).num_choices, completion(best_of=3, n=3).best_of) == (3, 0)


def test_parts_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parsed = chat(messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": None}])
    assert parsed.prompts[0].messages == [{"role": "system", "content": "ab"}, {"role": "assistant", "content": ""}]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_completions(prompt: Any, expected: list[Any]) -> None:
    parsed = parse_completion(json.dumps({"prompt": prompt}).encode(), {})
    shown = [unpack_ids(p.input_ids) if isinstance(p, IdsPrompt) else getattr(p, "text", None) for p in parsed.prompts]
    assert shown == expected
    assert parsed.params.max_tokens == 16


def test_generate_takes_text_or_ids_and_not_both() -> None:
    assert parse_generate(b'{"text": "a"}', {}).prompts == (TextPrompt(text="a"),)
    assert parse_generate(b'{"text": "a", "sampling_params": {"max_new_tokens": 3}}', {}).params.max_tokens == 3
    for body in (b"{}", b'{"text": "a", "input_ids": [1]}', b'{"text": "a", "temperature": 1}'):
        with pytest.raises(RequestError):
            parse_generate(body, {})


def test_seeds_of_choices() -> None:
    assert choice_seeds(SamplingParams(seed=2**63 - 1), 3) == [2**63 - 1, 0, 1]
    assert choice_seeds(SamplingParams(), 2) == [None, None]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(
    {*ChatBody.model_fields, *CompletionBody.model_fields, *GenerateBody.model_fields}
    | {"tools", "logprobs", "response_format", "logit_bias", "metadata", "best_of", "modalities", "tool_choice"}
)


@settings(deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    message=st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "x"]), JSON),
)
def test_any_json_is_taken_or_refused(body: dict[str, Any], message: dict[str, Any]) -> None:
    for data in (body, {"messages": [message], **body}, {"messages": HELLO, **body}, {"prompt": "a", **body}):
        for parse in (parse_chat, parse_completion, parse_generate):
            refusal = None
            try:
                parse(json.dumps(data).encode(), {})
            except RequestError as error:
                refusal = error
            assert refusal is None or (refusal.status == 400 and "\n" not in str(refusal))


@pytest.mark.parametrize("field", ["top_k", "max_tokens"])
def test_numbers_that_no_message_can_carry_are_refused(field: str) -> None:
    """A top_k of 2**63 would fail the step of everybody in the batch; 2**64 cannot even be sent."""
    for value in (2**63, 2**64, 10**40):
        with pytest.raises(RequestError) as refusal:
            chat(**{field: value})
        assert refusal.value.param == field
    assert getattr(chat(**{field: 2**63 - 1}).params, field) == 2**63 - 1


def test_one_request_makes_only_so_many_outputs() -> None:
    body = {"prompt": ["a"] * 100, "n": 21}
    with pytest.raises(RequestError, match="100 prompts with n=21"):
        parse_completion(json.dumps(body).encode(), {})


@pytest.mark.parametrize("name", SamplingFields.model_fields)
def test_documented_bounds_are_accepted(name: str) -> None:
    """That nothing beyond them is, schemathesis tests."""
    kinds = SamplingFields.model_json_schema()["properties"][name].get("anyOf", [])
    for bound in [kind[end] for kind in kinds for end in ("minimum", "maximum") if end in kind]:
        body = {"prompt": "a", "max_tokens": MAX_COUNT, name: bound}
        (value,) = [getattr(parse_completion(json.dumps(body).encode(), {}).params, name)]
        assert value == bound
