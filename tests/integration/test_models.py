"""Every family and variant against Hugging Face: the same greedy tokens, nearly the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.core import ScheduledReq, StepPlan
from minisgl.engine.engine import Engine
from minisgl.engine.runner import Runner
from tests.driver import GREEDY, engine_config, generate
from tests.models import FAMILIES, hf_generate, hf_logits, random_prompt, tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
HALF = ["full_attention", "sliding_attention", "full_attention"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-rope-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "llama-rope-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "llama-rope-dynamic-beyond": (  # generation leaves the original context, which prompts do not
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0},
            "max_position_embeddings": 64,
        },
    ),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "qwen3-rope-yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen2-rope-yarn-attention-factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "llama-rope-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2}},
    ),
    "llama-rope-yarn-untruncated": ("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "mistral-window": ("mistral", {"sliding_window": 17}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3-window-types": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 13, "layer_types": HALF, "attention_bias": True},
    ),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": False, "num_hidden_layers": 4, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 11}),
}


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Path:
    family, overrides = VARIANTS[request.param]
    return tiny_model(family, **overrides)


def engine_logits(path: Path, tokens: list[int], **overrides: Any) -> torch.Tensor:
    """Logits of every position of one sequence: [num_tokens, vocab]."""
    from minisgl.core import Admission, PageUpdate

    config = engine_config(path, **overrides)
    runner = Runner(config, rank=0)
    num_pages = -(-len(tokens) // config.page_size)
    admission = Admission(0, torch.tensor(tokens, dtype=torch.int32).numpy(), GREEDY)
    plan = StepPlan(
        0, (admission,), (PageUpdate(0, 0, tuple(range(num_pages))),), (ScheduledReq(0, 0, len(tokens), True),)
    )
    with torch.inference_mode():
        runner._tables.apply(plan)
        batch = runner._tables.build(plan)
        batch = type(batch)(**{**{f: getattr(batch, f) for f in batch.__slots__}, "logit_tokens": None})
        return runner.forward(batch).float()


def test_greedy_tokens_equal_hf(model: Path) -> None:
    prompts = [random_prompt(length, seed=length) for length in (1, 7, 40)]
    expected = [hf_generate(model, prompt, 64) for prompt in prompts]
    assert all(len(set(tokens)) > 8 for tokens in expected[1:]), "a degenerate sequence proves little"
    config = engine_config(model, page_size=4)
    engine = Engine(config)
    assert generate(engine, config, prompts, 64, chunk=13) == expected
    engine.close()


def test_logits_equal_hf(model: Path) -> None:
    tokens = random_prompt(50)
    torch.testing.assert_close(engine_logits(model, tokens), hf_logits(model, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision(family: str, dtype: str, tolerance: float) -> None:
    """Distributions stay close to those of fp32, and generation works."""
    path = tiny_model(family)
    tokens = random_prompt(30)
    logits, reference = engine_logits(path, tokens, dtype=dtype), hf_logits(path, tokens)
    error = (logits - reference).abs().mean() / reference.std()
    assert error < tolerance
    config = engine_config(path, dtype=dtype)
    engine = Engine(config)
    assert len(generate(engine, config, [tokens], 8)[0]) == 8
    engine.close()
