"""Everything that can be combined on a CPU computes what transformers does, and the rest is refused by one line.

What: our kernels or torch × `--dtype` × `--quantization` × `--attention-backend` × `--kv-cache-dtype` (the table is in
docs/engine.md), with both prefix caches and pages of several sizes, in chunks, with prefixes that are in the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl import LLM, SamplingParams
from minisgl.errors import ConfigError
from minisgl.llm import RequestOutput
from tests.integration.test_llm import with_tokenizer
from tests.models import hf_logits, random_prompt, tiny_model

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
SMALL = {"max_prefill_length": 16, "max_running_requests": 8, "num_pages": 512, "cpu_threads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "qwen3_moe": {"num_experts_per_tok": 8},  # all of them: rounding may choose another one
}
DTYPES = ("float32", "bfloat16", "float16")

# (kernels, dtype, quantization, attention, KV cache): what a log-probability may be off by. The checkpoint is in
# bfloat16, so that neither float32 nor bfloat16 weights round it. Where it is exact, tokens must be transformers'.
EXACT, KV16, KV8, INT8, TORCH_BFLOAT16, TORCH_FLOAT16 = 1e-4, 0.1, 0.2, 0.6, 0.3, 0.05
Combination = tuple[bool, str, str | None, str, str]
ACCEPTED: dict[Combination, float] = {
    **{(True, dtype, None, attention, "float32"): EXACT for dtype in DTYPES[:2] for attention in ("cpu", "sdpa")},
    **{(True, dtype, None, "cpu", "bfloat16"): KV16 for dtype in DTYPES[:2]},
    **{(True, "bfloat16", None, attention, "float16"): KV16 / 5 for attention in ("cpu", "sdpa")},
    **{(True, "bfloat16", None, attention, "int8"): KV8 for attention in ("cpu", "sdpa")},
    **{(True, dtype, "int8", attention, "float32"): INT8 for dtype in DTYPES[:2] for attention in ("cpu", "sdpa")},
    **{(True, dtype, "int8", "cpu", "bfloat16"): INT8 for dtype in DTYPES[:2]},
    (False, "float32", None, "sdpa", "float32"): EXACT,
    (False, "bfloat16", None, "sdpa", "bfloat16"): TORCH_BFLOAT16,
    (False, "float16", None, "sdpa", "float16"): TORCH_FLOAT16,
    (False, "float32", None, "sdpa", "float16"): KV16 / 5,
    (False, "float32", None, "sdpa", "int8"): KV8,
}
# With float16, torch computes even if there are kernels.
ACCEPTED[True, "float16", None, "sdpa", "float16"] = TORCH_FLOAT16
REFUSED = [
    combination
    for combination in itertools.product((True, False), DTYPES, (None, "int8"), ("cpu", "sdpa"), ("float16", "fp8"))
    if combination[4] == "fp8"
    or (not (combination[0] and combination[1] != "float16") and combination[2:4] != (None, "sdpa"))
]


def checkpoint(family: str) -> Path:
    return with_tokenizer(tiny_model(family, vocab_size=512, dtype="bfloat16", **MODELS[family]))


def prompts() -> list[list[int]]:
    """Of 1 to 60 tokens; two share 40."""
    shared = random_prompt(40, 1)
    return [shared + random_prompt(20, 2), shared + random_prompt(7, 3), random_prompt(1, 4), random_prompt(33, 5)]


def options(combination: Combination, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    kernels, dtype, quantization, attention, kv = combination
    monkeypatch.setenv("MINISGL_DISABLE_CPU_KERNELS", "0" if kernels else "1")
    chosen = {"dtype": dtype, "attention_backend": attention, "kv_cache_dtype": kv, "quantization": quantization}
    return {**SMALL, **chosen}


def check(path: Path, outputs: list[RequestOutput], limit: float) -> None:
    """Against transformers in float32, after the tokens that were there. A token must be a best one within that too."""
    for output in outputs:
        assert len(output.token_ids) == NUM_TOKENS
        assert output.error is None
        text = [*output.prompt_token_ids, *output.token_ids[:-1]]
        logits = hf_logits(path, text)[len(output.prompt_token_ids) - 1 :].log_softmax(-1)
        if limit == EXACT:
            assert output.token_ids == logits.argmax(-1).tolist()
        own = logits.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        reported = torch.tensor([token.logprob for token in output.logprobs])
        assert float((reported - own).abs().max()) < limit
        assert float((logits.amax(1) - own).max()) < 2 * limit


def of_attention(combination: Combination) -> tuple[bool, str, str]:
    """What computes it, and the cache that it reads."""
    kernels, dtype, _, attention, kv = combination
    return kernels and dtype != "float16", attention, kv


def in_turn() -> Iterator[tuple[Combination, str, int]]:
    """All combinations, and each way to compute attention with every page size: the weights that are beside it, which
    pages are nothing to, take turns."""
    sizes, ways = [("radix", 1), ("radix", 16), ("naive", 5)], dict[Any, list[Combination]]()
    for combination in ACCEPTED:
        ways.setdefault(of_attention(combination), []).append(combination)
    for alike in ways.values():
        for turn in range(max(len(alike), len(sizes))):
            yield alike[turn % len(alike)], *sizes[turn % len(sizes)]


@pytest.mark.parametrize(("combination", "cache", "page_size"), [*in_turn()], ids=str)
def test_what_can_be_combined(
    monkeypatch: pytest.MonkeyPatch, combination: Combination, cache: str, page_size: int
) -> None:
    path = checkpoint("qwen3")
    with LLM(str(path), cache_type=cache, page_size=page_size, **options(combination, monkeypatch)) as llm:
        engine = llm.config.engine
        assert engine.cpu_kernels == (combination[0] and combination[1] != "float16")
        chosen = (engine.dtype, engine.quantization, engine.decode_backend, engine.kv_cache_dtype)
        assert chosen == combination[1:]
        for _ in range(2):  # the second time, all of it is in the cache
            outputs = llm.generate(prompts(), GREEDY)
            check(path, outputs, ACCEPTED[combination])
        cached = [output.cached_tokens for output in outputs]
        assert min(cached[0], cached[3]) >= 32 if cache == "radix" else cached == [0] * 4


def one_of_each(family: str, what: Callable[[Combination], Any]) -> list[tuple[str, Combination]]:
    return [(family, combination) for combination in {what(made): made for made in ACCEPTED}.values()]


@pytest.mark.parametrize(
    ("family", "combination"),
    one_of_each("mistral", of_attention) + one_of_each("qwen3_moe", lambda made: made[:3]),
    ids=str,
)
def test_windows_and_experts(monkeypatch: pytest.MonkeyPatch, family: str, combination: Combination) -> None:
    path = checkpoint(family)
    with LLM(str(path), page_size=4, **options(combination, monkeypatch)) as llm:
        for _ in range(2):
            check(path, llm.generate(prompts(), GREEDY), ACCEPTED[combination])


@pytest.mark.parametrize(
    "combination", [(True, "bfloat16", "int8", "sdpa", "float32"), (True, "bfloat16", None, "cpu", "bfloat16")]
)
def test_ranks(monkeypatch: pytest.MonkeyPatch, combination: Combination) -> None:
    path = checkpoint("qwen3")
    with LLM(str(path), tp=2, **options(combination, monkeypatch)) as llm:
        for _ in range(2):
            check(path, llm.generate(prompts(), GREEDY), ACCEPTED[combination])


@pytest.mark.parametrize("combination", REFUSED, ids=str)
def test_what_cannot_be_combined(monkeypatch: pytest.MonkeyPatch, combination: Combination) -> None:
    with pytest.raises(ConfigError, match=r"^--(attention-backend|kv-cache-dtype|quantization) \w+: \w") as caught:
        LLM(str(checkpoint("qwen3")), **options(combination, monkeypatch))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_what_is_left_out_fits(
    monkeypatch: pytest.MonkeyPatch, kernels: bool, dtype: str, attention: str | None
) -> None:
    """`auto` is one of the accepted combinations."""
    monkeypatch.setenv("MINISGL_DISABLE_CPU_KERNELS", "0" if kernels else "1")
    with LLM(str(checkpoint("qwen3")), dtype=dtype, attention_backend=attention, **SMALL) as llm:
        engine = llm.config.engine
        chosen = (kernels, engine.dtype, None, engine.decode_backend, engine.kv_cache_dtype)
        check(checkpoint("qwen3"), llm.generate(prompts(), GREEDY), ACCEPTED[chosen])
