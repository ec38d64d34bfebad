"""Every family and variant against Hugging Face: the same greedy tokens, nearly the same logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minisgl.engine.engine import create_engine
from minisgl.kernel.ops import Tensor, TorchOps
from tests.driver import CPU_KERNELS, engine_config, engine_logits, generate
from tests.models import (
    BASE,
    EXTRA,
    FAMILIES,
    directory_of,
    hf_generate,
    hf_greedy,
    hf_logits,
    hf_model,
    random_prompt,
    randomize,
    tiny_model,
)

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1, 1.05, 1.1, 1.3, 1.6, 2.0],
    "long_factor": [1, 1.5, 2.5, 4.0, 6.5, 9.0],
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
    "phi3-longrope-short": (  # a server of 512 tokens at most, which the model was trained for
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512, "max_position_embeddings": 2048},
    ),
    "phi3-longrope-long": (  # by its formula the factor would be 3.3: scores so large that rounding decides
        "phi3",
        {
            "rope_parameters": {**LONGROPE, "attention_factor": 1.3},
            "original_max_position_embeddings": 2,
            "max_position_embeddings": 2048,
        },
    ),
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
    "exaone4-without-windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 5}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "granitemoe-scaled-by-its-heads": ("granitemoe", {"attention_multiplier": None}),
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


def test_greedy_tokens_equal_hf(model: Path) -> None:
    prompts = [random_prompt(length, seed=length) for length in (1, 7, 40)]
    for kernels in ({}, CPU_KERNELS):
        config = engine_config(model, page_size=4, **kernels)
        engine = create_engine(config)
        outputs = generate(engine, config, prompts, 64, chunk=13)
        engine.close()
        for prompt, output in zip(prompts, outputs, strict=True):
            has_length = any(rope.type in ("dynamic", "longrope") for rope in config.model.ropes)  # in its angles
            assert output == (hf_generate(model, prompt, 64) if has_length else hf_greedy(model, prompt, output))
        assert all(len(set(tokens)) > 8 for tokens in outputs[1:]), "a degenerate sequence proves little"


def test_logits_equal_hf(model: Path) -> None:
    tokens = random_prompt(50)
    expected = hf_logits(model, tokens)
    for kernels in ({}, CPU_KERNELS):
        torch.testing.assert_close(engine_logits(model, tokens, **kernels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "llama-bias", "gemma3_text"])
def test_biases_that_the_norm_ahead_adds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs have it from some tokens on; not where the product, with its bias, is normalised before it is added."""
    name, overrides = VARIANTS.get(family, (family, {}))
    model, tokens, added = tiny_model(name, **{**overrides, "attention_bias": True}), random_prompt(50), []
    norm = TorchOps.rms_norm

    def noting(ops: TorchOps, x: Tensor, weight: Tensor, eps: float, late: Tensor | None = None) -> Tensor:
        added.append(late is not None)
        return norm(ops, x, weight, eps, late)

    monkeypatch.setattr(TorchOps, "late_from", 50)
    monkeypatch.setattr(TorchOps, "rms_norm", noting)
    torch.testing.assert_close(engine_logits(model, tokens), hf_logits(model, tokens), atol=1e-4, rtol=1e-4)
    assert any(added) == (family != "gemma3_text")


TEXT = {**BASE, "num_hidden_layers": 4, "head_dim": 16}
SEEING: dict[str, dict[str, Any]] = {
    "Gemma4": {
        "text_config": {**TEXT, **EXTRA["gemma4_text"], "num_hidden_layers": 6, "vocab_size_per_layer_input": 256},
        "audio_config": None,
    },
    "Gemma3": {"text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 11}, "mm_tokens_per_image": 4},
    "Mistral3": {"text_config": {**TEXT, "model_type": "mistral"}},
    "Ministral3": {"text_config": {**TEXT, **EXTRA["ministral3"], "model_type": "ministral3"}},
    "Qwen3VL": {"text_config": {**TEXT, "model_type": "qwen3_vl_text"}},
    "Qwen3_5": {"text_config": {**TEXT, **EXTRA["qwen3_5_text"], "model_type": "qwen3_5_text"}},
    "Qwen3_5Moe": {"text_config": {**TEXT, **EXTRA["qwen3_5_moe_text"], "model_type": "qwen3_5_moe_text"}},
}


@pytest.mark.parametrize("name", SEEING)
def test_the_text_part_of_a_model_that_sees(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """What it has for images is left out, and for guessing ahead, and said so in one line."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {
        "image_size": 32,
        "patch_size": 8,
        "model_type": "siglip_vision_model" if name == "Gemma3" else "pixtral",
    }
    if "Qwen" in name:
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    kind = name.replace("Ministral3", "Mistral3")
    config = getattr(transformers, f"{kind}Config")(**SEEING[name], vision_config=vision, tie_word_embeddings=True)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.mtp = torch.nn.Linear(4, 4)  # as of those that guess tokens ahead
    randomize(model, 0)
    path, tokens = directory_of(model), random_prompt(40)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    for kernels in ({}, CPU_KERNELS):
        caplog.clear()
        torch.testing.assert_close(engine_logits(path, tokens, **kernels), expected, atol=1e-4, rtol=1e-4)
        assert sum("no part of the model" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_half_precision(family: str, dtype: str, tolerance: float) -> None:
    """Distributions stay close to those of fp32, and generation works."""
    path = tiny_model(family, seed=3)  # in which no router is undecided: rounding would choose another expert
    tokens = random_prompt(30)
    logits, reference = engine_logits(path, tokens, dtype=dtype), hf_logits(path, tokens)
    error = (logits - reference).abs().mean() / reference.std()
    assert error < tolerance
    config = engine_config(path, dtype=dtype)
    engine = create_engine(config)
    assert len(generate(engine, config, [tokens], 8)[0]) == 8
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_are_computed_with_in_float32(family: str) -> None:
    """The same weights, widened, give nearly the same logits; so they do with a bfloat16 cache."""
    path = tiny_model(family, dtype="bfloat16", seed=12)  # in which no router is undecided
    tokens = random_prompt(50)
    expected = hf_logits(path, tokens)
    for kv_dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-2)):
        logits = engine_logits(path, tokens, dtype="bfloat16", kv_cache_dtype=kv_dtype, **CPU_KERNELS)
        assert (logits - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_are_all_that_differs(family: str) -> None:
    """The logits are those of float32 computation on weights that were rounded: 8 bits, a scale for each output."""
    path, tokens = tiny_model(family), random_prompt(50)
    model = copy.deepcopy(hf_model(path))
    for name, weight in model.named_parameters():
        exact = "gate.weight", "router.weight", "router.layer.weight", "conv1d.weight", "conv.weight", "bias"
        if weight.ndim > 1 and ("per_layer" in name or not name.endswith(exact)):
            is_turned = family == "gpt_oss" and ".experts." in name
            scale = weight.data.abs().amax(-2 if is_turned else -1, keepdim=True) / 127
            weight.data = (weight.data / scale).round() * scale
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    logits = engine_logits(path, tokens, quantization="int8", **CPU_KERNELS)
    assert (logits - expected).norm() / expected.norm() < 2e-3
    assert (logits - hf_logits(path, tokens)).norm() / expected.norm() > 2e-3
