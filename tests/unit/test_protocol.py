"""Request bodies: what they become, and that nothing but a refusal comes of bad ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.core import MAX_COUNT, SamplingParams
from minisgl.errors import RequestError
from minisgl.message.messages import ChatPrompt, IdsPrompt, TextPrompt, unpack_ids
from minisgl.server.bodies.chat import ChatBody, CompletionBody, parse_chat, parse_completion
from minisgl.server.bodies.native import GenerateBody, parse_generate
from minisgl.server.bodies.responses import parse_responses
from minisgl.server.bodies.sampling import SamplingFields

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
    params = SamplingParams(seed=2**63 - 1)
    assert [params.of_choice(index).seed for index in range(3)] == [2**63 - 1, 0, 1]


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


def test_valid_values_however_they_are_written() -> None:
    assert chat(top_p=0).params == SamplingParams(temperature=0.0)
    assert chat(top_p=0.0, temperature=0.7).params.temperature == 0
    assert chat(seed=-1).params.seed is chat().params.seed is None
    seeds = [chat(seed=seed).params.seed for seed in (-2, -(2**63), 2**63 - 1, 7)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert chat(max_tokens=5, max_completion_tokens=9).params.max_tokens == 9
    both = {"text": "a", "sampling_params": {"max_tokens": 5, "max_new_tokens": 9}}
    assert parse_generate(json.dumps(both).encode(), {}).params.max_tokens == 9
    assert chat(stream_options={"include_usage": True}).stream is False
    assert chat(verbosity="low").params == SamplingParams()


def test_whole_numbers_may_have_a_fraction() -> None:
    body = {"max_tokens": 16.0, "n": 2.0, "seed": 7.0, "top_k": -1.0, "min_tokens": 1.0, "stop_token_ids": [5.0, 6]}
    parsed = chat(**body, logprobs=True, top_logprobs=3.0, priority=2.0)
    assert (
        parsed.params
        == chat(**json.loads(json.dumps(body).replace(".0", "")), logprobs=True, top_logprobs=3, priority=2).params
    )
    assert (parsed.n, parsed.params.max_tokens, parsed.params.stop_token_ids) == (2, 16, (5, 6))
    for prompt in ([1.0, 2], [[1, 2.0], [3.0]]):
        made = parse_completion(json.dumps({"prompt": prompt, "logprobs": 2.0, "best_of": 2.0}).encode(), {}).prompts
        assert [unpack_ids(p.input_ids) for p in made if isinstance(p, IdsPrompt)] in ([[1, 2]], [[1, 2], [3]])
    for bad in ({"max_tokens": 16.5}, {"max_tokens": 1e300}, {"n": True}, {"stop_token_ids": [5.5]}, {"seed": "7"}):
        with pytest.raises(RequestError) as refusal:
            chat(**bad)
        assert refusal.value.param is not None
        assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, {}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "minimal"}, {"reasoning_effort": "minimal"}),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False, "thinking": False}),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False, "thinking": False}),
        ({"enable_thinking": False}, {"enable_thinking": False, "thinking": False}),
        ({"think": True}, {"enable_thinking": True, "thinking": True}),
        ({"think": "high"}, {"reasoning_effort": "high"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}}, {"enable_thinking": True, "thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "none", "enable_thinking": True, "thinking": False},
        ),
    ],
    ids=str,
)
def test_what_templates_are_told_of_reasoning(body: dict[str, Any], told: dict[str, Any]) -> None:
    assert chat(**body).prompts[0].template_kwargs == told
    if "reasoning" in body or not body:
        data = json.dumps({"input": "hello", **body}).encode()
        prompt = parse_responses(data, {}).prompts[0]
        assert isinstance(prompt, ChatPrompt)
        assert prompt.template_kwargs == told


@pytest.mark.parametrize("body", [{"reasoning_effort": "a lot"}, {"reasoning": {"effort": "a\nlot"}}])
def test_efforts_that_nobody_knows_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="must be one of none, minimal, low"):
        chat(**body)


@pytest.mark.parametrize("name", SamplingFields.model_fields)
def test_documented_bounds_are_accepted(name: str) -> None:
    """That nothing beyond them is, schemathesis tests."""
    kinds = SamplingFields.model_json_schema()["properties"][name].get("anyOf", [])
    for bound in [kind[end] for kind in kinds for end in ("minimum", "maximum") if end in kind]:
        body = {"prompt": "a", "max_tokens": MAX_COUNT, name: bound}
        if (name, bound) in (("top_p", 0), ("seed", -(2**63))):
            continue  # they become something else
        parsed = parse_completion(json.dumps(body).encode(), {})
        assert getattr(parsed if name == "timeout" else parsed.params, name) == bound


def test_bodies_of_mini_sglang() -> None:
    """`prompt` and `max_tokens` of /generate, and `prompt` in place of a chat's messages."""
    parsed = parse_generate(b'{"prompt": "a", "max_tokens": 3, "ignore_eos": true}', {})
    assert parsed.prompts == (TextPrompt(text="a"),)
    assert (parsed.params.max_tokens, parsed.params.ignore_eos) == (3, True)
    said = parse_chat(b'{"model": "x", "prompt": "Hello", "top_k": -1, "max_tokens": 16}', {})
    assert said.prompts[0].messages == [{"role": "user", "content": "Hello"}]
    for body in (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', b'{"prompt": ["a"]}', b"{}"):
        with pytest.raises(RequestError):
            parse_chat(body, {})
