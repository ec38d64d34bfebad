"""Reading `config.json`: RoPE, windows, ends, refusals; defaults and meanings are those of transformers."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from minisgl.config.families import FAMILIES, parse_model_config, read_model_config
from minisgl.config.model import DenseMLP, ModelConfig, MoE, PagedKV
from minisgl.config.rope import ROPE_TYPES
from minisgl.errors import ConfigError
from minisgl.utils.fields import Fields

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


GEMMA4 = {"architectures": ["Gemma4ForCausalLM"], "vocab_size_per_layer_input": 128}


def read(tmp_path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(tmp_path)


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    return tuple(layer.attention.window for layer in config.layers)


def num_kv_heads(config: ModelConfig) -> int:
    (heads,) = {layer.attention.cache.heads for layer in config.layers if isinstance(layer.attention.cache, PagedKV)}
    return heads


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.head_dim, num_kv_heads(config), config.dtype) == (8, 2, "bfloat16")
    (rope,) = config.ropes
    assert (rope.theta, rope.type, config.max_position) == (10000.0, "default", 1024)
    mlp, norms = config.layers[3].mlp, config.layers[3].norms
    assert isinstance(mlp, DenseMLP)
    assert not any((config.qkv_bias, config.o_bias, mlp.bias, norms.of_heads, config.tie_word_embeddings))
    assert config.layers[3].attention.window is None
    assert config.eos_token_ids == ()
    assert num_kv_heads(read(tmp_path, num_key_value_heads=...)) == 8


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


@pytest.mark.parametrize("wrong", [7.0, "7", True, -1, 128, [7], {"id": 7}, None])
def test_what_is_no_token_id_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, wrong: Any) -> None:
    assert read(tmp_path, {"eos_token_id": [5, wrong, 6]}, eos_token_id=9).eos_token_ids == (5, 6, 9)
    assert f"generation_config.json: eos_token_id {wrong!r} is no token id" in caplog.text
    assert "\n" not in caplog.records[-1].getMessage()


def test_the_text_model_s_end_counts_too(tmp_path: Path) -> None:
    """Qwen3.5 has it in the text model alone."""
    files = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": {**LLAMA, "eos_token_id": 9}}
    assert read(tmp_path, **files).eos_token_ids == (9,)
    assert read(tmp_path, {"eos_token_id": [5, 9]}, **files).eos_token_ids == (5, 9)
    assert read(tmp_path, {"eos_token_id": 5}, **files).eos_token_ids == (5,)  # as in transformers


ADDED = {"tokenizer.json": {"added_tokens": [{"id": 11, "content": "<|im_end|>"}], "model": {"vocab": {"</s>": 12}}}}
END = {"eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": END, **ADDED}, (7, 11)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}, **ADDED}, (7, 11)),
        ({"tokenizer_config.json": {"eos_token": "</s>"}, **ADDED}, (7, 12)),
        ({"tokenizer_config.json": END | {"added_tokens_decoder": {"13": {"content": "<|im_end|>"}}}}, (7, 13)),
        (
            {"tokenizer_config.json": END, "tokenizer.json": {"model": {"vocab": [["a", 0], ["<|im_end|>", -1]]}}},
            (7, 1),
        ),
        ({"tokenizer_config.json": END, "added_tokens.json": {"<|im_end|>": 14}}, (7, 14)),
        ({"tokenizer_config.json": END, "vocab.json": {"<|im_end|>": 7}}, (7,)),
        ({"special_tokens_map.json": END, "vocab.json": {"<|im_end|>": 0}}, (7, 0)),
        ({"tokenizer_config.json": {"eos_token": None}, **ADDED}, (7,)),
        ({"tokenizer_config.json": {"eos_token": "<|gone|>"}, **ADDED}, (7,)),
        ({"tokenizer_config.json": END, "vocab.json": {"<|im_end|>": 128}}, (7,)),
    ],
)
def test_the_tokenizer_s_end_counts_too(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read(tmp_path, eos_token_id=7).eos_token_ids == expected
    assert ("'<|gone|>' is not in the vocabulary" in caplog.text) == ("gone" in str(files))


@pytest.mark.parametrize("architecture", ["GlmForCausalLM", "Glm4ForCausalLM", "Qwen3NextForCausalLM"])
def test_no_part_of_a_head_is_all_of_it(tmp_path: Path, architecture: str) -> None:
    """In transformers the default stands for a key that is not there, and null for no such thing."""
    fields = {"architectures": [architecture], "head_dim": 16, "full_attention_interval": 2}
    share = transformers.CONFIG_MAPPING[FAMILIES[architecture].model_type]().rope_parameters["partial_rotary_factor"]
    assert read(tmp_path, **fields).ropes[0].rotary_dim == 16 * share
    assert read(tmp_path, **fields, partial_rotary_factor=None).ropes[0].rotary_dim == 0  # all


def test_rope_forms_agree(tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 256}
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    new = read(tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    assert old.ropes == new.ropes
    assert (new.ropes[0].theta, new.ropes[0].max_position, new.max_position) == (5e5, 256, 1024)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"type": "linear", "factor": 2.0}, 2048),
        ({"type": "dynamic", "factor": 2.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 900}, 3600),
        ({"type": "yarn", "factor": None, "original_max_position_embeddings": 256}, 1024),
        ({"type": "yarn", "factor": 4.0}, 4096),
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}, 2048),
        (
            {"type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
            | {"original_max_position_embeddings": 256},
            1024,
        ),
        ({"rope_type": "default"}, 1024),
    ],
)
def test_longest_sequence(tmp_path: Path, scaling: dict[str, Any], longest: int) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        assert read(tmp_path, **{key: scaling}).max_position == longest


RECIPE = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("architecture", "max_position", "scaling"),
    [  # as their model cards have it
        ("Qwen3ForCausalLM", 40960, {"rope_type": "yarn", **RECIPE}),
        ("Qwen3MoeForCausalLM", 40960, {"rope_type": "yarn", **RECIPE}),
        ("Qwen2ForCausalLM", 32768, {"type": "yarn", **RECIPE}),
    ],
)
def test_published_yarn_recipes(tmp_path: Path, architecture: str, max_position: int, scaling: dict[str, Any]) -> None:
    fields = {"architectures": [architecture], "max_position_embeddings": max_position, "rope_theta": 1e6}
    config = read(tmp_path, **fields, rope_scaling=scaling)
    assert (config.max_position, config.ropes[0].max_position, config.ropes[0].theta) == (131072, 32768, 1e6)


def test_rope_scaling_replaces_rope_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of them, `rope_theta` included, as transformers does; it is said, since it is hardly meant."""
    fields: dict[str, Any] = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    }
    config = read(tmp_path, **fields)
    hf = transformers.LlamaConfig(**{**LLAMA, **json.loads(json.dumps(fields))})
    assert (config.ropes[0].type, config.ropes[0].theta) == ("yarn", hf.rope_parameters["rope_theta"]) == ("yarn", 1e4)
    assert "rope_scaling replaces rope_parameters, rope_theta 500000.0 included" in caplog.text
    caplog.clear()
    assert read(tmp_path, **fields, rope_theta=7e5).ropes[0].theta == 7e5
    assert not caplog.text
    assert read(tmp_path, **fields | {"rope_scaling": {}}).ropes[0].type == "default"


@pytest.mark.parametrize("scaling", [{"factor": 2.0}, {"type": "linear", "factor": 4.0}, {"rope_theta": 2e5}])
@pytest.mark.parametrize("full", [None, {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5}])
@pytest.mark.parametrize(("name", "config"), [("Gemma3", "Gemma3TextConfig"), ("Olmo3", "Olmo3Config")])
def test_of_layers_with_tables_of_their_own_rope_scaling_changes_what_it_names(
    tmp_path: Path, name: str, config: str, full: dict[str, Any] | None, scaling: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {**LLAMA, "num_hidden_layers": 6, "rope_scaling": scaling, "sliding_window": 8}
    if full is not None:
        fields["rope_parameters"] = {"full_attention": full, "sliding_attention": {"rope_type": "default"}}
    hf = getattr(transformers, config)(**json.loads(json.dumps(fields))).rope_parameters["full_attention"]
    rope = read(tmp_path, **{**fields, "architectures": [f"{name}ForCausalLM"]}).ropes[0]
    told = rope.type, rope.theta, rope.scaling.get("factor") if rope.type == "linear" else hf.get("factor")
    assert told == (hf["rope_type"], hf["rope_theta"], hf.get("factor"))


@pytest.mark.parametrize(("name", "theta"), [("Gemma4", 1e4), ("Lfm3", 1e6)])
@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 2.0}])
def test_where_rope_parameters_are_of_each_kind_of_layer_rope_scaling_replaces_them(
    tmp_path: Path, name: str, theta: float, scaling: dict[str, Any]
) -> None:
    """The family's own, which have another type, and the file's."""
    fields: dict[str, Any] = {**LLAMA, "num_hidden_layers": 6, "vocab_size_per_layer_input": LLAMA["vocab_size"]}
    fields |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "rope_scaling": scaling}
    own = {"full_attention": {"rope_type": "proportional", "rope_theta": 3e5, "partial_rotary_factor": 0.5}}
    for more in ({}, {"rope_parameters": {**own, "sliding_attention": {"rope_type": "default"}}}):
        rope = read(tmp_path, **{**fields, **more, "architectures": [f"{name}ForCausalLM"]}).ropes[0]
        assert (rope.type, rope.scaling, rope.theta) == ("linear", {"factor": scaling["factor"]}, theta)


def test_qwen_windows(tmp_path: Path) -> None:
    fields = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}
    assert windows(read(tmp_path, **fields, use_sliding_window=False)) == (None,) * 4
    config = read(tmp_path, **fields, use_sliding_window=True, max_window_layers=3)
    assert windows(config) == (None, None, None, 32)
    assert config.qkv_bias and read(tmp_path, **fields, qkv_bias=False, always=False, attention_bias=False).qkv_bias
    assert not config.o_bias
    kinds = ["sliding_attention", "full_attention"] * 2
    config = read(tmp_path, **fields, use_sliding_window=True, layer_types=kinds)
    assert windows(config) == (32, None, 32, None)


def test_mistral_window(tmp_path: Path) -> None:
    arch = {"architectures": ["MistralForCausalLM"]}
    assert windows(read(tmp_path, **arch, sliding_window=16)) == (16,) * 4
    assert windows(read(tmp_path, **arch, sliding_window=None)) == (None,) * 4


def test_layer_types_say_which_layers_slide(tmp_path: Path) -> None:
    """In the families that have them; as for transformers, Mistral with them is Ministral."""
    kinds = ["sliding_attention", "full_attention", "attention", "sliding_attention"]
    for name in ("MistralForCausalLM", "MinistralForCausalLM"):
        fields = {"architectures": [name], "sliding_window": 16}
        assert windows(read(tmp_path, **fields, layer_types=kinds)) == (16, None, None, 16)
        assert windows(read(tmp_path, **fields, layer_types=None)) == (16,) * 4
        assert windows(read(tmp_path, **fields, layer_types=["full_attention"] * 4)) == (None,) * 4
    assert windows(read(tmp_path, layer_types=kinds, sliding_window=16)) == (None,) * 4
    moe = {"architectures": ["Qwen3MoeForCausalLM"], "use_sliding_window": True, "sliding_window": 16}
    assert windows(read(tmp_path, **moe, layer_types=kinds)) == (16,) * 4
    with pytest.raises(ConfigError, match="layer_types has 3 entries, but num_hidden_layers is 4"):
        read(tmp_path, architectures=["MistralForCausalLM"], layer_types=kinds[:3])


def test_gemma_4_s_layers_differ(tmp_path: Path) -> None:
    """Sizes of heads by kind of layer, in either form; keys and values of the last layers are those of others."""
    kinds = ["sliding_attention", "full_attention"] * 2
    fields = {**GEMMA4, "head_dim": 8, "layer_types": kinds, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    new, padded = [{"per_layer_config": {key: {"head_dim": 16} for key in keys}} for keys in ("13", ("01", "03"))]
    for sizes in ({"global_head_dim": 16, "num_global_key_value_heads": 1}, new, padded):
        config = read(tmp_path, **fields, **sizes)
        specs = [layer.attention for layer in config.layers]
        assert [spec.cache for spec in specs] == [PagedKV(2, 8, 8), PagedKV(2, 16, 16)] * 2
        assert [spec.source for spec in specs] == [None, None, 0, 1]
        assert [spec.window for spec in specs] == [512, None] * 2
        assert [layer.mlp.active_features for layer in config.layers] == [96, 96, 192, 192]
        assert config.kv_bytes_per_token("float32") == 4 * 2 * 2 * (8 + 16)
    config = read(tmp_path, **fields, attention_k_eq_v=True, global_head_dim=16, num_global_key_value_heads=1)
    assert config.layers[1].attention.cache == PagedKV(1, 16, 16)
    assert [layer.attention.values_are_keys for layer in config.layers] == [False, True] * 2
    last = read(tmp_path, **GEMMA4, num_hidden_layers=7).layers[-1].attention
    assert (last.window, last.cache) == (None, PagedKV(2, 512, 512))


def test_the_architecture_may_be_told_otherwise(tmp_path: Path) -> None:
    for fields in (
        {"architectures": None, "model_type": "qwen3"},
        {"architectures": [], "model_type": "qwen3"},
        {"architectures": ["Qwen3Model"]},
        {"architectures": ["SomethingElse", "Qwen3ForCausalLM"]},
    ):
        assert read(tmp_path, **fields).architecture == "Qwen3ForCausalLM"


def test_an_override_is_merged_before_anything_is_read(tmp_path: Path) -> None:
    read(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    override = {"max_position_embeddings": 100, "rope_scaling": {"factor": 3.0}, "num_key_value_heads": None}
    config = read_model_config(tmp_path, override)
    assert (config.max_position, config.ropes[0].type, num_kv_heads(config)) == (300, "linear", 8)


def test_moe_layers(tmp_path: Path) -> None:
    arch = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 16}
    config = read(tmp_path, **arch, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [isinstance(layer.mlp, MoE) for layer in config.layers] == [False, True, False, False]
    assert all(layer.norms.of_heads == "each" for layer in config.layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel .supported: Llama, Mistral"),
        ({"architectures": ...}, "none given"),
        (
            {"architectures": ["Gemma3nForCausalLM"]},
            "Gemma3nForCausalLM .missing: several residual streams.*; supported: Ll",
        ),
        ({**GEMMA4, "enable_moe_block": True}, "enable_moe_block must be false, not True"),
        (
            {
                "architectures": ["Gemma4ForConditionalGeneration"],
                "text_config": {"model_type": "gemma4_text", "enable_moe_block": True},
            },
            r"json: text_config\.enable_moe_block must be false, not True",
        ),
        ({**GEMMA4, "use_bidirectional_attention": "all"}, 'must be false or "vision", not .all.'),
        ({**GEMMA4, "num_kv_shared_layers": 3}, "num_kv_shared_layers must be fewer, with a layer of each kind"),
        ({**GEMMA4, "num_kv_shared_layers": 4}, "num_kv_shared_layers must be a whole number, 0 to 3"),
        ({**GEMMA4, "vocab_size_per_layer_input": 99}, "vocab_size_per_layer_input must be vocab_size, 128"),
        ({**GEMMA4, "per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config must be one head_dim"),
        ({**GEMMA4, "per_layer_config": {"3": {"sliding_window": 4}}}, "per_layer_config must be one head_dim"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "missing: attention within chunks"),
        ({"architectures": ..., "model_type": "llama4_text"}, "llama4_text .missing: attention within chunks"),
        ({"architectures": ..., "model_type": "deepseek_v3"}, "deepseek_v3 .missing: compressed keys"),
        ({"architectures": ..., "model_type": "nemotron_h"}, "not supported: nemotron_h .supported: Llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be false, not True"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "awq: version gemv is not .*gemm"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "gptq: bits 3 is not supported ..4, 8."),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"group_0": {"weights": {"num_bits": 4, "actorder": "group"}}},
                }
            },
            "pack-quantized: actorder group is not supported",
        ),
        ({"quantization_config": {"quant_method": "gptq", "dynamic": {"+:.*down.*": {}}}}, r"dynamic \+:.\*down"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes. is not supported; .* int4"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq. is not supported; take .* AWQ"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "NVFP4. is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"weight_block_size \[64, 64",
        ),
        ({"compression_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}}, "marlin-24. is not"),
        ({"quantization_config": {"quant_method": 3}}, "quantization_config.quant_method must be a string"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope type 'su'.*llama3"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.short_factor must be a list of .* numbers above 0"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "yarn", "factor": 2}},
            "short_factor must be a list",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention not supported"),
        ({"architectures": ["GptOssForCausalLM"], "swiglu_limit": 5.0}, "swiglu_limit must be 7, not 5.0"),
        ({"architectures": ["GptOssForCausalLM"], "swiglu_alpha": 1}, "swiglu_alpha must be 1.702, not 1"),
        ({"hidden_size": ...}, "hidden_size missing"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


FULL: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 3,
    "model_type": "llama",
    "rope_theta": 1e4,
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
    "use_sliding_window": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
WRONG = (
    *(
        "",
        "64",
        "yarn",
        0,
        1,
        -1,
        2,
        3,
        8,
        64,
        0.5,
        -0.5,
        1.5,
        8.0,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        True,
        False,
    ),
    *(None, [], [0], [3, 1], ["x"], [None], [["x"]], {}, {"x": 1}, {"x": {}}, ["full_attention"] * 3),
)


class Spy(dict[str, Any]):
    """Notes the keys that are asked for."""

    def __init__(self, data: dict[str, Any], asked: set[str]) -> None:
        super().__init__(data)
        self._asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)


OWN = [name for name, family in FAMILIES.items() if not family.inner]


@functools.cache
def keys_read(architecture: str) -> tuple[dict[str, Any], bool, frozenset[str], frozenset[str]]:
    """A whole configuration, whether its rotations differ by layer; the keys that are read of it, and of a rotation."""
    full = {**FULL, "architectures": [architecture], "model_type": FAMILIES[architecture].model_type}
    full |= {"full_attention_interval": 2} if "linear" in FAMILIES[architecture].kind else {}
    full |= {"vocab_size_per_layer_input": full["vocab_size"]} if "gemma4" in full["model_type"] else {}
    full |= {"hidden_act": "gelu"} if full["model_type"] == "gemma" else {}
    full |= {"use_sliding_window": False} if full["model_type"] == "smollm3" else {}
    if full["model_type"] == "granitemoehybrid":
        full |= {"num_local_experts": 0, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"}
    top: set[str] = set()
    inner: set[str] = set()
    by_layer = FAMILIES[architecture].ropes_by_layer
    full["rope_parameters"] = with_factors(full, full["rope_parameters"], by_layer)
    for kind, (needed, _) in ROPE_TYPES.items():
        given = with_factors(full, {"rope_type": kind, **dict.fromkeys(needed, 2.0)}, by_layer)
        rope: dict[str, Any] = Spy(given, inner)
        rope = {"full_attention": rope} if by_layer else rope
        parse_model_config(Fields(Spy({**full, "rope_parameters": rope}, top), "config.json"))
    assert len(top) > 20 and len(inner) > 10
    return full, by_layer, frozenset(top - {"window_period"}), frozenset(inner)  # which GGUF files alone have


@pytest.mark.parametrize("architecture", OWN)
def test_wrong_values_are_one_line_or_mean_what_transformers_makes_of_them(architecture: str) -> None:
    """Every key that is read, at the top or in `rope_parameters`, with every kind of value. Of a key that most families
    read, one has the odd values, the next the even ones."""
    full, by_layer, top, inner = keys_read(architecture)
    readers = Counter(key for name in OWN for keys in keys_read(name)[2:] for key in keys)

    def values(key: str) -> tuple[Any, ...]:
        return WRONG[OWN.index(architecture) % 2 :: 2] if readers[key] > len(OWN) // 2 else WRONG

    changed = [{**full, key: value} for key in sorted(top) for value in values(key)]
    ropes = [{**full["rope_parameters"], key: value} for key in sorted(inner) for value in values(key)]
    changed += [{**full, "rope_parameters": {"full_attention": rope} if by_layer else rope} for rope in ropes]
    num_read = 0
    for config in changed:
        ours = result_of(lambda config=config: parse_model_config(Fields(config, "config.json")))
        if isinstance(ours, ModelConfig):
            num_read += 1
            compare_with_transformers(ours, config)
        else:
            line, _, _ = ours.partition(
                "; supported: " if "nearest" in ours else "(supported: "
            )  # of which there are many
            assert line.startswith("config.json: ") and "\n" not in ours and len(line) < 200
    assert num_read > 100


def with_factors(full: dict[str, Any], rope: dict[str, Any], by_layer: bool) -> dict[str, Any]:
    """Of longrope, and what Phi-3 calls so, one for each pair of features."""
    config = {**full, "rope_parameters": {"full_attention": rope} if by_layer else rope}
    told = result_of(lambda: parse_model_config(Fields(config, "config.json")))
    num = re.search(r"a list of (\d+) numbers above 0", told) if isinstance(told, str) else None
    return rope if num is None else rope | dict.fromkeys(("short_factor", "long_factor"), [1.5] * int(num[1]))


def result_of(read: Callable[[], ModelConfig]) -> ModelConfig | str:
    """Or the error's line."""
    try:
        return read()
    except ConfigError as error:
        return str(error)


def compare_with_transformers(ours: ModelConfig, config: dict[str, Any]) -> None:
    """Where transformers refuses, we may be more lenient: null as if left out, an even division that it insists on."""
    kind = {f.model_type: f for f in FAMILIES.values()}
    model_type = config["model_type"] if config["model_type"] in kind else FAMILIES[ours.architecture].model_type
    if ours.architecture != next((n for n, f in FAMILIES.items() if f.model_type == model_type), None):
        return
    try:
        hf = transformers.CONFIG_MAPPING[model_type](**copy.deepcopy(config))
        hf.standardize_rope_params()
        hf.allow_global_per_layer_attribute_access = True
    except Exception:
        return
    theirs = hf.rope_parameters
    if model_type == "lfm3" and "full_attention" not in theirs:
        return  # nor does a model whose layers look for an object of their own
    theirs = theirs.get("full_attention", theirs)
    needed = "num_key_value_heads", "head_dim", "residual_multiplier", "num_local_experts"
    if None in theirs.values() or None in [getattr(hf, key, 0) for key in needed]:
        return  # such a model computes nothing
    assert num_kv_heads(ours) == hf.num_key_value_heads, config
    assert ours.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads), config
    eps = getattr(hf, FAMILIES[ours.architecture].keys.get("rms_norm_eps", "rms_norm_eps"))
    assert ours.rms_norm_eps == eps / getattr(hf, "residual_multiplier", 1) ** 2, config
    assert ours.tie_word_embeddings == hf.tie_word_embeddings, config
    assert (ours.ropes[0].type, ours.ropes[0].theta) == (theirs["rope_type"], theirs["rope_theta"]), config
    kinds, window = getattr(hf, "layer_types", None) or [], getattr(hf, "sliding_window", None) or None
    if {"layer_types", "sliding_window"} <= FAMILIES[ours.architecture].defaults.keys() and "full_attention" in kinds:
        assert windows(ours) == tuple(window if kind == "sliding_attention" else None for kind in kinds), config
    if ours.ropes[0].type in ("yarn", "longrope"):
        original = theirs.get("original_max_position_embeddings", hf.max_position_embeddings)
        assert ours.ropes[0].max_position == original, config
    moe = next((layer.mlp for layer in ours.layers if isinstance(layer.mlp, MoE)), None)
    if moe is not None and hf.num_experts is not None:
        sums_to_1 = model_type in ("mixtral", "qwen3_5_moe_text", "gpt_oss", "granitemoe") or hf.norm_topk_prob
        num_experts = hf.num_local_experts if model_type == "granitemoe" else hf.num_experts
        assert (moe.num_experts, moe.sums_to_1) == (num_experts, sums_to_1), config


@pytest.mark.parametrize("architecture", [name for name, family in FAMILIES.items() if family.inner])
def test_what_transformers_leaves_out_of_an_inner_model(architecture: str) -> None:
    """All that has the default of its class, sizes included: Gemma 3 is published so."""
    family = FAMILIES[architecture]
    full = {**transformers.CONFIG_MAPPING[family.model_type]().to_dict(), "architectures": [architecture]}
    inner = full[family.inner]
    defaults = transformers.CONFIG_MAPPING[inner["model_type"]]().to_dict()
    kept = "model_type", "head_dim"  # of Mistral the latter's default hangs on others: it gets lost, there as here
    short = {key: value for key, value in inner.items() if key in kept or value != defaults[key]}
    assert len(short) < len(inner) / 2
    models = [parse_model_config(Fields({**full, family.inner: text}, "config.json")) for text in (inner, short)]
    assert models[0] == models[1]


def test_gemma_3_is_made_for_what_its_file_says(tmp_path: Path) -> None:
    """Its positions are divided by 8, and the longest is a scaled one."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "model_type": "gemma3_text"}
    sizes = dict.fromkeys(LLAMA, ...)
    config = read(tmp_path, **{**sizes, "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (config.vocab_size, config.num_qo_heads, config.head_dim, config.max_position) == (262208, 8, 256, 131072)
    assert [(rope.type, rope.theta) for rope in config.ropes] == [("linear", 1e6), ("default", 1e4)]


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("GraniteMoeHybrid", {"layer_types": ["mamba", "attention", "mamba"]}, "layer_types mamba not supported"),
        ("GraniteMoeHybrid", {"layer_types": None}, "layer_types mamba not supported"),  # as all are by default
        ("GraniteMoeHybrid", {"num_local_experts": 4}, "num_local_experts must be 0, not 4"),
        ("GraniteMoeHybrid", {"num_local_experts": None}, "num_local_experts must be 0, not None"),  # 8 by default
        ("GraniteMoeHybrid", {"position_embedding_type": "nope"}, "position_embedding_type must be"),
        ("GraniteMoeHybrid", {"position_embedding_type": None}, "position_embedding_type must be"),
        ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv must be null, not 8.0"),
        ("Gemma", {"hidden_act": "relu"}, "hidden_act must be"),
        ("Gemma4", {"attention_multiplier": 0.5}, "attention_multiplier must be 1, not 0.5"),
        ("Lfm3", {"attention_bias": True}, "attention_bias must be false, not True"),
        ("Lfm3", {"rms_norm_eps": 1e-6}, "rms_norm_eps must be null, not 1e-06"),
        ("Olmo3", {"rope_local_base_freq": 1e4}, "rope_local_base_freq must be 500000, not 10000.0"),
        ("SmolLM3", {"use_sliding_window": True}, "use_sliding_window must be false, not True"),
    ],
)
def test_what_a_family_does_not_compute_is_refused_by_name(
    architecture: str, changes: dict[str, Any], told: str
) -> None:
    config, *_ = keys_read(f"{architecture}ForCausalLM")
    parse_model_config(Fields(config, "config.json"))
    with pytest.raises(ConfigError, match=told):
        parse_model_config(Fields({**config, **changes}, "config.json"))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        *((name, {"sliding_window_pattern": 1}) for name in ("Gemma2", "VaultGemma", "Gemma4", "GptOss", "Qwen2Moe")),
        ("Olmo3", {"sliding_window_pattern": "LLG"}),
        ("SmolLM3", {"max_window_layers": 1}),
        ("Gemma3", {"attn_logit_softcapping": 5.0}),
        ("Qwen3_5Moe", {"mlp_only_layers": [0], "decoder_sparse_step": 2}),
        ("Lfm2", {"hidden_act": "gelu_pytorch_tanh"}),
        ("Lfm3", {"hidden_act": "relu"}),
        ("Llama", {"": 2, "sliding_window": 4, "num_experts": 2}),
    ],
)
def test_what_transformers_does_not_read_changes_nothing(architecture: str, changes: dict[str, Any]) -> None:
    config, *_ = keys_read(f"{architecture}ForCausalLM")
    expected = parse_model_config(Fields(config, "config.json"))
    assert parse_model_config(Fields({**config, **changes}, "config.json")) == expected


@pytest.mark.parametrize("key", ["eos_token", "added_tokens_decoder", "vocab", "added_tokens"])
def test_wrong_values_of_a_tokenizer_are_no_traceback(tmp_path: Path, key: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x"}))
    for value in WRONG:
        if key in ("vocab", "added_tokens"):
            tokenizer = {"added_tokens": value} if key == "added_tokens" else {"model": {"vocab": value}}
            (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        else:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x", key: value}))
        config = result_of(lambda: read(tmp_path))
        assert isinstance(config, ModelConfig) or f"tokenizer_config.json: {key}" in config


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
    assert config.kv_bytes_per_token("int8") == 2 * 4 * 2 * (8 + 4)  # and a scale
    layer = 64 * (64 + 32 + 64) + 3 * 64 * 96 + 2 * 64
    assert config.weight_bytes("float32") == 4 * (2 * 128 * 64 + 4 * layer)


def test_reader_needs_no_torch() -> None:
    code = "import minisgl.config.families, minisgl.config.model, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "python"})


def test_flat_rope_parameters_are_those_of_all_layers(tmp_path: Path) -> None:
    """LFM3's layers have an object each for their kind, or one for all; Gemma 3's have older names besides, as ever."""
    fields = {"architectures": ["Lfm3ForCausalLM"], "model_type": "lfm3", "head_dim": 64, "num_hidden_layers": 4}
    fields |= {"layer_types": ["conv", "sliding_attention", "full_attention", "conv"]}
    flat = read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **fields)
    assert [(rope.type, rope.theta) for rope in flat.ropes] == [("default", 5e5)] * 2
    assert [(rope.type, rope.theta) for rope in read(tmp_path, **fields).ropes] == [
        ("proportional", 1e6),
        ("default", 1e4),
    ]
