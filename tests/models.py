"""Tiny random checkpoints of all families of `config/families.yaml`, made with `transformers`, and what it computes.

`tiny_model("qwen3")` is a directory with `config.json` and safetensors, made once per process. Weights are
spread enough that greedy outputs vary, and biases and norms are random too, so that a test sees each of them.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from minisgl.config import families

FAMILIES = [family.model_type for family in families.FAMILIES.values() if not family.inner]
torch.set_num_threads(1)  # tiny operations, and other tests may keep the other cores busy
VOCAB_SIZE = 256
BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HYBRID: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "full_attention_interval": 2,
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
EXTRA: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral": {"head_dim": 16, "sliding_window": 15},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 24,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"partial_rotary_factor": 0.75},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
    },
    "granitemoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 4,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.4,
    },
    "granitemoehybrid": {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,  # as published files have it
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 96,
        "intermediate_size": 80,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32},
    "exaone4": {"sliding_window": 11, "num_hidden_layers": 5},
    "helium": {"head_dim": 16},
    "gemma": {"head_dim": 32},
    "vaultgemma": {"head_dim": 32, "sliding_window": 11, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 3.0},
    "seed_oss": {"head_dim": 24, "attention_out_bias": True},
    "smollm3": {"num_hidden_layers": 5},
    "glm": {"head_dim": 24},
    "glm4": {"head_dim": 24},
    "ernie4_5": {"head_dim": 24, "use_bias": True},
    "olmo3": {"sliding_window": 19, "num_hidden_layers": 5},
    "gpt_oss": {"head_dim": 32, "sliding_window": 11, "num_local_experts": 6, "num_experts_per_tok": 2},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 11,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "qwen3_5_text": {**HYBRID, "num_hidden_layers": 5},
    "qwen3_5_moe_text": {**HYBRID, **EXPERTS},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "block_multiple_of": 32},
    "lfm3": {
        "layer_types": ["conv", "sliding_attention", "full_attention", "conv", "sliding_attention"],
        "num_hidden_layers": 5,
        "head_dim": 24,
        "sliding_window": 11,
    },
    "qwen3_next": {**HYBRID, **EXPERTS, "mlp_only_layers": [1], "full_attention_interval": 3},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 11,
        "num_hidden_layers": 6,
        "layer_types": [*("sliding_attention", "full_attention") * 2, "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {"head_dim": 32, "sliding_window": 11, "num_hidden_layers": 7, "query_pre_attn_scalar": 48},
}


def tiny_model(family: str, *, seed: int = 0, dtype: str = "float32", shard: str = "1GB", **overrides: Any) -> Path:
    """A model directory; `overrides` are fields of the family's transformers configuration. `shard` is the largest
    file ("50KB" makes several)."""
    return _make(family, seed, dtype, shard, json.dumps(overrides, sort_keys=True))


@functools.cache
def _make(family: str, seed: int, dtype: str, shard: str, overrides: str) -> Path:
    import transformers  # here, and not by each process that is given a model, and imports a test's module

    fields = {**BASE, **EXTRA.get(family, {}), **json.loads(overrides)}
    if family == "gemma4_text":
        fields["vocab_size_per_layer_input"] = fields["vocab_size"]
    config = transformers.CONFIG_MAPPING[family](**fields)
    with torch.random.fork_rng(devices=[]):  # what a model begins with is random too, where `randomize` starts from it
        torch.manual_seed(seed)
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    randomize(model, seed)
    return directory_of(model.to(getattr(torch, dtype)), shard)


def directory_of(model: Any, shard: str = "1GB") -> Path:
    """Where a model of transformers is saved, until the process ends."""
    path = Path(tempfile.mkdtemp(dir=_directory(), prefix=f"{model.config.model_type}-"))
    model.save_pretrained(path, max_shard_size=shard)
    return path


@functools.cache
def _directory() -> str:
    path = tempfile.mkdtemp(prefix="minisgl-test-models-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random weights, biases and norms of a scale that keeps logits spread."""
    generator = torch.Generator().manual_seed(seed)
    tied = not any(name.startswith("lm_head") for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
        for name, param in sorted(model.named_parameters()):
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith("A_log"):
                param.copy_(noise - 2)  # so that states remember some tokens
            elif param.ndim == 1:
                param.copy_(0.3 * noise if name.endswith("bias") else param + 0.2 * noise)  # norms: from 1, or from 0
                if name.endswith("q_norm.weight") and model.config.model_type == "gemma4_text":
                    param.mul_(param.numel() ** -0.5)  # its scores have no other scale: near ties would decide
            elif "embed_tokens" in name:
                param.copy_(noise * (0.2 if tied else 1.0))  # a tied model would repeat its input
            else:
                param.copy_(noise * 1.5 / param.shape[-1] ** 0.5)


@functools.lru_cache(maxsize=64)  # most are a megabyte
def hf_model(path: Path, dtype: str = "float32") -> Any:
    """The same model in transformers, on the CPU."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    # Releases differ in what they do with soft-capped scores, which torch's attention has not.
    kind = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **kind)
    return model.eval()


def hf_generate(path: Path, prompt: Iterable[int], num_tokens: int, dtype: str = "float32") -> list[int]:
    """Greedy continuation by `generate()`, past end-of-sequence tokens. What was asked before is known."""
    return [*_hf_generate(path, tuple(prompt), num_tokens, dtype)]


@functools.cache
def _hf_generate(path: Path, prompt: tuple[int, ...], num_tokens: int, dtype: str) -> list[int]:
    ids = torch.tensor([prompt])
    output = hf_model(path, dtype).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def hf_greedy(path: Path, prompt: Iterable[int], output: Sequence[int], dtype: str = "float32") -> list[int]:
    """The most probable token of transformers after each prefix of `output`: all of them are its own exactly if it is
    what `generate()` gives, for the price of one step. (Not so where angles depend on how long a sequence is.)"""
    logits = hf_logits(path, [*prompt, *output[:-1]], dtype)
    return logits[-len(output) :].argmax(-1).tolist()  # type: ignore[no-any-return]


def hf_logits(path: Path, tokens: Iterable[int], dtype: str = "float32") -> torch.Tensor:
    """[num_tokens, vocab_size] of one sequence."""
    with torch.inference_mode():
        return hf_model(path, dtype)(torch.tensor([list(tokens)])).logits[0]  # type: ignore[no-any-return]


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that are not special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
