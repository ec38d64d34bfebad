"""Reading `config.json`: both forms of RoPE, windows, EOS ids, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minisgl.config.model import ModelConfig, read_model_config
from minisgl.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def read(tmp_path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(tmp_path)


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (8, 2, "bfloat16")
    assert (config.rope.theta, config.rope.type, config.max_position) == (10000.0, "default", 1024)
    assert not any((config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings))
    assert config.sliding_window(3) is None
    assert config.eos_token_ids == ()
    assert read(tmp_path, num_key_value_heads=...).num_kv_heads == 8


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [7, 9]}, 7, (7, 9)),
        ({"eos_token_id": 7}, [8, 9], (7, 8, 9)),
        ({}, 5, (5,)),
        (None, [5, 6], (5, 6)),
        ({"eos_token_id": 0}, None, (0,)),
    ],
)
def test_eos_ids(tmp_path: Path, generation: Any, model: Any, expected: tuple[int, ...]) -> None:
    assert read(tmp_path, generation, eos_token_id=model).eos_token_ids == expected


def test_rope_forms_agree(tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 256}
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    new = read(tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    assert old.rope == new.rope
    assert (new.rope.theta, new.rope.max_position, new.max_position) == (5e5, 256, 1024)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"type": "linear", "factor": 2.0}, 2048),
        ({"type": "dynamic", "factor": 2.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "default"}, 1024),
    ],
)
def test_longest_sequence(tmp_path: Path, scaling: dict[str, Any], longest: int) -> None:
    assert read(tmp_path, rope_scaling=scaling).max_position == longest


def test_qwen_windows(tmp_path: Path) -> None:
    fields = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}
    assert read(tmp_path, **fields, use_sliding_window=False).sliding_windows == ()
    config = read(tmp_path, **fields, use_sliding_window=True, max_window_layers=3)
    assert config.sliding_windows == (None, None, None, 32)
    assert config.qkv_bias
    assert not config.o_bias
    kinds = ["sliding_attention", "full_attention"] * 2
    config = read(tmp_path, **fields, use_sliding_window=True, layer_types=kinds)
    assert config.sliding_windows == (32, None, 32, None)


def test_mistral_window(tmp_path: Path) -> None:
    arch = {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, **arch, sliding_window=16).sliding_windows == (16,) * 4
    assert read(tmp_path, **arch, sliding_window=None).sliding_windows == ()


def test_moe_layers(tmp_path: Path) -> None:
    arch = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 16}
    config = read(tmp_path, **arch, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [config.is_sparse(i) for i in range(4)] == [False, True, False, False]
    assert config.qk_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel .supported: LlamaForCausalLM"),
        ({"architectures": ...}, "none given"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .awq."),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope'.*llama3"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention not supported"),
        ({"hidden_size": ...}, "hidden_size missing"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_broken_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        read_model_config(tmp_path)


def test_sizes(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.kv_bytes_per_token("float32") == 2 * 4 * 2 * 8 * 4
    assert config.kv_bytes_per_token("bfloat16", tp_size=4) == 2 * 4 * 1 * 8 * 2
    layer = 64 * (64 + 32 + 64) + 3 * 64 * 96 + 2 * 64
    assert config.weight_bytes("float32") == 4 * (2 * 128 * 64 + 4 * layer)


def test_reader_needs_no_torch() -> None:
    code = "import minisgl.config.families, minisgl.config.model, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "python"})
