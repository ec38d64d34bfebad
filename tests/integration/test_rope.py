"""Inverse frequencies against transformers' own, for every scaling; angles that depend on the position alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minisgl.config.families import FAMILIES, parse_model_config
from minisgl.config.model import RopeConfig
from minisgl.kernel.ops import RopeAngles
from minisgl.layers.rope import AngleTables, RotaryEmbedding, inverse_frequencies
from minisgl.utils.fields import Fields

CPU = torch.device("cpu")
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.2},
]


def read(**fields: Any) -> tuple[LlamaConfig, RopeConfig]:
    file = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 4096, **fields}
    hf = LlamaConfig(**copy.deepcopy(file))
    shape = {"vocab_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
    return hf, parse_model_config(Fields({**file, **shape}, "test")).ropes[0]


def old_spelling(scaling: dict[str, Any]) -> dict[str, Any]:
    """As files have it that transformers 4 wrote."""
    rest = {key: value for key, value in scaling.items() if key not in ("rope_type", "rope_theta")}
    return {"rope_theta": scaling["rope_theta"], "rope_scaling": {"type": scaling["rope_type"], **rest}}


@pytest.mark.parametrize("original", ["inside", "outside", "both", "none"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_frequencies_equal_transformers(scaling: dict[str, Any], old: bool, original: str) -> None:
    scaling = {**scaling, "rope_theta": 500000.0}
    if original in ("inside", "both") and scaling["rope_type"] in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = 1024
    fields = old_spelling(scaling) if old else {"rope_parameters": scaling}
    if original in ("outside", "both"):
        fields["original_max_position_embeddings"] = 2048
    hf, config = read(**fields)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](hf, CPU)
    inv_freq, factor = inverse_frequencies(config, 128)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor)


NEEDS: dict[str, dict[str, Any]] = {
    "lfm2": {"full_attn_idxs": [1]},
    "gemma4": {"vocab_size_per_layer_input": 32, "head_dim": 64, "global_head_dim": 64},
    "granitemoehybrid": {
        "layer_types": ["attention"] * 24,
        "position_embedding_type": "rope",
        "num_local_experts": 0,
    },
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_makes_of_it(architecture: str) -> None:
    """Nothing is said of rotation; where kinds of layers have their own, one is told, and where all of them begin."""
    family = FAMILIES[architecture]
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 24}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    shape |= NEEDS.get(family.model_type.removesuffix("_text"), {})
    yarn = {"rope_type": "yarn", "rope_theta": 3e4, "factor": 4.0, "original_max_position_embeddings": 128}
    near = {"rope_type": "default", "rope_theta": 2e4}
    own = {"original_max_position_embeddings": 64}
    own |= {"rope_parameters": {"full_attention": yarn, "sliding_attention": near}}
    for told in ({}, own) if family.ropes_by_layer else ({},):
        fields = copy.deepcopy({family.inner: {**shape, **told}} if family.inner else {**shape, **told})
        file = {**copy.deepcopy(fields), "architectures": [architecture]}
        hf = CONFIG_MAPPING[family.model_type](**fields).get_text_config()
        hf.allow_global_per_layer_attribute_access = True
        ropes = parse_model_config(Fields(file, "test")).ropes
        kinds = ["full_attention", "sliding_attention"][: len(ropes)] if family.ropes_by_layer else [None]
        for rope, kind in zip(ropes, kinds, strict=False):
            theirs = hf.rope_parameters if kind is None else hf.rope_parameters[kind]
            assert (rope.type, rope.theta) == (theirs["rope_type"], theirs["rope_theta"])
            if rope.type == "yarn":
                dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
                expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](hf, CPU, layer_type=kind)
                inv_freq, factor = inverse_frequencies(rope, dim)
                torch.testing.assert_close(inv_freq, expected, rtol=1e-5, atol=0)
                assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("more", [{}, {"factor": 8.0}, {"factor": 0.5}, {"attention_factor": 1.2}], ids=str)
def test_longrope_chooses_by_the_longest_sequence(more: dict[str, Any]) -> None:
    factors = {"short_factor": [1 + i / 64 for i in range(64)], "long_factor": [1 + i for i in range(64)]}
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 1024}
    hf, config = read(rope_parameters={**scaling, **factors, **more})
    for longest in (1, 1024, 1025, 4096):
        expected, expected_factor = ROPE_INIT_FUNCTIONS["longrope"](hf, CPU, seq_len=longest)
        inv_freq, factor = inverse_frequencies(config, 128, longest)
        torch.testing.assert_close(inv_freq, expected, rtol=1e-5, atol=0)
        assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("name", ["yarn", "su", "longrope"])
def test_what_phi3_calls_yarn_is_longrope(name: str) -> None:
    shape = {"vocab_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "architectures": ["Phi3ForCausalLM"]}
    scaling: dict[str, Any] = {"type": name, "short_factor": [1] * 64, "long_factor": [2.5] * 64}
    scaling["original_max_position_embeddings"] = 512
    file = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 4096, "rope_scaling": scaling}
    hf = Phi3Config(**copy.deepcopy(file), original_max_position_embeddings=512)
    config = parse_model_config(Fields({**file, **shape, "original_max_position_embeddings": 512}, "test")).ropes[0]
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](hf, CPU, seq_len=513)
    assert hf.rope_parameters["rope_type"] == config.type == "longrope"
    torch.testing.assert_close(inverse_frequencies(config, 128, 513)[0], expected)
    assert config.scaling["attention_factor"] == pytest.approx(factor)


def test_dynamic_angles_are_those_of_the_length_that_ends_there() -> None:
    hf, config = read(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    positions = torch.tensor([0, 100, 4095, 4096, 9000])
    rope = RotaryEmbedding(config, 128, CPU)(positions)
    for i, position in enumerate(positions.tolist()):
        inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](hf, CPU, seq_len=max(position + 1, 4096))
        angles = position * inv_freq
        torch.testing.assert_close(rope.cos[i, 0, :64], angles.cos(), atol=2e-3, rtol=0)
        torch.testing.assert_close(rope.sin[i, 0, 64:], angles.sin(), atol=2e-3, rtol=0)


def test_dynamic_angles_do_not_depend_on_the_batch() -> None:
    _, config = read(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    rope = RotaryEmbedding(config, 128, CPU)
    together = rope(torch.tensor([5, 9000])).cos[0]
    torch.testing.assert_close(together, rope(torch.tensor([5])).cos[0], rtol=0, atol=0)


def test_angles_of_a_step_grow_with_its_longest_sequence() -> None:
    ropes = [RotaryEmbedding(RopeConfig(theta), 8, CPU) for theta in (10.0, 1e6)]
    used: dict[int, RopeAngles] = {}
    tables = AngleTables(ropes, lambda index, cos, sin: used.update({index: RopeAngles(cos, sin)}))
    first = used[0]
    for length in (1, len(first.cos), len(first.cos) + 1, 3 * len(first.cos)):
        tables.reach(length)
        for index, rope in enumerate(ropes):
            positions = torch.arange(length)
            assert torch.equal(used[index].cos[:length], rope(positions).cos)
            assert torch.equal(used[index].sin[:length], rope(positions).sin)
        assert (used[0] is first) == (length <= len(first.cos))
