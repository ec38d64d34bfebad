"""Structured output through the whole of `LLM`: outputs match, and neighbours in the batch do not feel it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisgl import LLM, SamplingParams
from minisgl.core import FinishReason, Grammar
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner
from tests.schemas import schemas

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", max_running_requests=16, num_pages=4096, page_size=1) as llm:
        yield llm


def params(schema: Any, **fields: Any) -> SamplingParams:
    grammar = schema if isinstance(schema, Grammar) else Grammar("json", json.dumps(schema))
    return SamplingParams(**{"max_tokens": 200, "temperature": 1.0, "seed": 1, **fields}, grammar=grammar)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=st.lists(schemas(), min_size=1, max_size=6), seed=st.integers(0, 99), hot=st.booleans())
def test_every_output_validates(llm: LLM, batch: list[dict[str, Any]], seed: int, hot: bool) -> None:
    """Also of a model that has no idea what it is asked for (`hot`)."""
    prompts = [[5 + (seed * 31 + i * 7) % 4000 for i in range(4 + index)] for index in range(len(batch))]
    each = [params(schema, seed=seed, temperature=3.0 if hot else 0.0) for schema in batch]
    for schema, output in zip(batch, llm.generate(prompts, each, progress=False), strict=True):
        if output.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(output.text), schema, format_checker=jsonschema.FormatChecker())
        else:
            assert output.finish_reason is FinishReason.LENGTH and len(output.token_ids) == 200


def test_plain_requests_get_the_same_tokens_in_a_mixed_batch(llm: LLM) -> None:
    prompts = ["Once upon a time", "The capital of France is", "1, 2, 3,", "A list:"]
    plain = [SamplingParams(max_tokens=40, temperature=t, seed=7) for t in (0.0, 0.8, 1.0, 0.0)]
    alone = [llm.generate(p, q, progress=False)[0].token_ids for p, q in zip(prompts, plain, strict=True)]
    mixed_prompts = [p for prompt in prompts for p in (prompt, "Give me a person.")]
    mixed = [p for one in plain for p in (one, params(PERSON, ignore_eos=True))]
    outputs = llm.generate(mixed_prompts, mixed, progress=False)
    assert [output.token_ids for output in outputs[::2]] == alone
    for output in outputs[1::2]:
        assert output.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(output.text), PERSON)


def test_retraction_keeps_the_place_in_the_grammar() -> None:
    """Too few pages for all: some are sent back to the queue in the middle of their output, and go on from there."""
    grammar = Grammar("regex", "([a-z]{5}-){12}end")
    with LLM(device="cpu", dtype="float32", num_pages=160, page_size=1, max_seq_len=150, cache_type="naive") as llm:
        prompts = [[10 + i, 20 + i, 30 + i] for i in range(6)]
        outputs = llm.generate(prompts, params(grammar, max_tokens=120), progress=False)
        alone = [llm.generate([prompt], params(grammar, max_tokens=120), progress=False)[0] for prompt in prompts]
    for output, single in zip(outputs, alone, strict=True):
        assert re.fullmatch("([a-z]{5}-){12}end", output.text)
        assert output.token_ids == single.token_ids


@pytest.fixture(scope="module")
def speculating() -> Iterator[LLM]:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_running_requests": 16, "page_size": 1}
    with LLM(speculate="ngram", num_pages=4096, **options) as llm:
        yield llm


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing(llm: LLM, speculating: LLM, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """Tokens that a grammar prescribes come several in a step, and guesses are verified with masks."""
    kinds = [PERSON, Grammar("regex", "(abc[0-9]def){12}"), Grammar("choice", '["yes, of course", "no, never"]')]
    each = [params(kinds[i % 3], seed=i, temperature=temperature) for i in range(6)]
    each += [replace(each[i], grammar=None, max_tokens=60) for i in range(2)]
    prompts = [[10 + i, 20 + i, 30, 10 + i, 20 + i] for i in range(8)]
    expected = llm.generate(prompts, each, progress=False)
    num_drafted, plan = [0], Planner.plan

    def watched(planner: Planner) -> Planned | None:
        planned = plan(planner)
        if planned is not None:
            shares = zip(planned.reqs, planned.plan.reqs, strict=True)
            num_drafted[0] += sum(share.num_samples > 1 for req, share in shares if req.params.grammar is not None)
        return planned

    monkeypatch.setattr(Planner, "plan", watched)
    outputs = speculating.generate(prompts, each, progress=False)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert num_drafted[0] > 20, "nothing was drafted"


def test_an_abort_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream("A person:", params(PERSON, max_tokens=100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    output = llm.generate("A person:", params(PERSON), progress=False)[0]
    jsonschema.validate(json.loads(output.text), PERSON)
    assert not llm.transport.grammars.outputs  # type: ignore[union-attr]


def test_kinds(llm: LLM) -> None:
    grammars = {
        r"[0-9]{3}-[0-9]{4}": Grammar("regex", r"[0-9]{3}-[0-9]{4}"),
        "positive|negative": Grammar("choice", '["positive", "negative"]'),
        r"(1\+)*1": Grammar("grammar", 'start: "1" ("+" "1"){0,20}'),
        r"a+b": Grammar("grammar", 'root ::= x "b"\nx ::= "a" | "a" x'),
    }
    outputs = llm.generate("Say:", progress=False, sampling_params=params(grammars[r"a+b"]))
    outputs += llm.generate(["Say:"] * 3, [params(g) for g in list(grammars.values())[:3]], progress=False)
    for pattern, output in zip([r"a+b", *list(grammars)[:3]], outputs, strict=True):
        assert output.finish_reason is FinishReason.LENGTH or re.fullmatch(pattern, output.text), output.text


def test_a_refused_grammar_is_an_error_of_its_own(llm: LLM) -> None:
    bad = params(Grammar("regex", "(a", param="guided_regex"))
    refused, fine = llm.generate(["x", "y"], [bad, params(PERSON)], progress=False)
    assert refused.finish_reason is FinishReason.ERROR and "guided_regex" in (refused.error or "")
    assert fine.finish_reason is FinishReason.STOP


def test_stop_strings_and_limits_hold_within_a_grammar(llm: LLM) -> None:
    grammar = Grammar("regex", "[0-9]{50}")
    output = llm.generate("Digits:", params(grammar, max_tokens=3), progress=False)[0]
    assert output.finish_reason is FinishReason.LENGTH and len(output.token_ids) == 3
    stopped = llm.generate("Digits:", replace(params(Grammar("regex", "1{5}x1{5}")), stop=("x",)), progress=False)[0]
    assert (stopped.text, stopped.finish_reason) == ("11111", FinishReason.STOP)
