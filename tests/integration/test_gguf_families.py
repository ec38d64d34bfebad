"""GGUF files of all families, as llama.cpp's converter writes them: the logits of the checkpoints they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from minisgl.config.families import read_model_config
from minisgl.config.states import DeltaNet
from minisgl.errors import ConfigError
from minisgl.formats.gguf import open_slices
from minisgl.gguf.model import NAMES
from tests import gguf_converter, gguf_files
from tests.driver import CPU_KERNELS, engine_logits
from tests.gguf_converter import ARCHITECTURES, convert, rounded
from tests.integration.test_formats import SecondOfTwo
from tests.integration.test_gguf import load
from tests.integration.test_mtp import generate
from tests.models import hf_logits, random_prompt, tiny_model

PROMPT = random_prompt(40)
LAYER = "model.layers.1."  # of attention, in a hybrid
# What a file can say of a family: Gemma's scores have the size of a head, as those of all but two models.
SAYS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "lfm2": {"conv_bias": False},
    "glm": {"head_dim": 16},
    "qwen3_next": {"mlp_only_layers": []},
}


def made(family: str, folder: Path, kind: str = "F32", **overrides: Any) -> tuple[Path, Path]:
    """A file, and the checkpoint that has its values."""
    source = tiny_model(family, **{**SAYS.get(family, {}), **overrides})
    source = source if kind == "F32" else rounded(source, folder / "rounded", kind)
    return convert(source, folder / "model.gguf", kind), source


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


def test_every_architecture_is_tried() -> None:
    assert {*ARCHITECTURES.values(), *gguf_files.ARCHITECTURES.values()} == NAMES["architectures"].keys()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits(family: str, tmp_path: Path) -> None:
    path, source = made(family, tmp_path)
    assert distance(engine_logits(path, PROMPT), hf_logits(source, PROMPT)) < 1e-5
    ours, theirs = read_model_config(path), read_model_config(source)
    assert ours.architecture == theirs.architecture
    assert [layer.attention for layer in ours.layers] == [layer.attention for layer in theirs.layers] or any(
        isinstance(layer.attention.cache, DeltaNet)
        for layer in theirs.layers  # whose rows lie otherwise
    )


SIZES = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False}
ROPE = {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 50000.0}}
ROPE |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1234.0}}


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_k_eq_v": False, "num_global_key_value_heads": None, "tie_word_embeddings": True},
        {**SIZES, "tie_word_embeddings": True},
        {"rope_parameters": ROPE, "final_logit_softcapping": None},
    ],
    ids=["as E2B and E4B", "as 31B", "rotation"],
)
def test_models_of_gemma_4(changes: dict[str, Any], tmp_path: Path) -> None:
    """Numbers of heads and features of MLPs are lists where they differ by layer, and layers may share keys."""
    path, source = made("gemma4_text", tmp_path, **changes)
    assert distance(engine_logits(path, PROMPT), hf_logits(source, PROMPT)) < 1e-5


def test_gemma_4_without_divisors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A quarter of each head is rotated, as in all of its models."""
    monkeypatch.setattr(gguf_converter, "divisors", lambda *_: {})
    path, source = made("gemma4_text", tmp_path)
    assert distance(engine_logits(path, PROMPT), hf_logits(source, PROMPT)) < 1e-5


ROUNDED = ["qwen3_5_text", "qwen3_next", "lfm2", "gemma3_text", "gpt_oss", "phi3", "glm4"]
CASES = [*((family, "Q8_0", 32) for family in ROUNDED), ("gpt_oss", "MXFP4", 32)]
# Two heads of values in each block of 32 columns, whose order is undone where they multiply; and floats.
CASES += [
    ("gemma4_text", "Q8_0", 16),
    ("gemma4_text", "Q4_0", 32),
    ("qwen3_5_text", "Q8_0", 16),
    ("qwen3_5_text", "Q4_0", 16),
    ("qwen3_5_text", "F16", 16),
]


@pytest.mark.parametrize(("family", "kind", "size"), CASES)
def test_blocks_in_kernels(family: str, kind: str, size: int, tmp_path: Path) -> None:
    """Kernels round activations to 8 bits where that pays, and with them a router may choose other experts. Columns in
    another order would give logits that have nothing in common with these (1.4)."""
    key = "hidden_size_per_layer_input" if family.startswith("gemma4") else "linear_value_head_dim"
    sizes = {key: size} if family.startswith(("qwen3_", "gemma4")) else {}
    path, source = made(family, tmp_path, kind, **sizes)
    expected = hf_logits(source, PROMPT)
    assert distance(engine_logits(path, PROMPT), expected) < 1e-4
    rounds = 0.2 if family in ("qwen3_next", "gpt_oss") else 0.1 if kind == "Q4_0" else 0.05
    assert distance(engine_logits(path, PROMPT, **CPU_KERNELS), expected) < rounds


def test_heads_that_take_turns_have_one_rank(tmp_path: Path) -> None:
    path, _ = made("qwen3_5_text", tmp_path)
    with pytest.raises(ConfigError, match=r"ssm_out.weight cannot be shared .*: the heads of its columns take turns"):
        load(path, SecondOfTwo())
    path, _ = made("qwen3_5_text", tmp_path, linear_num_value_heads=2)
    assert all(part.columns is None for part in open_slices(path).values())  # and none to bring into order


@pytest.mark.parametrize("length", [32, 128], ids=["short", "long"])
def test_longrope(length: int, tmp_path: Path) -> None:
    """Factors of short and of long sequences are tensors of the file, and the temperature one of its numbers."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "attention_factor": 1.3}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    rope |= {"original_max_position_embeddings": 64}
    path, source = made("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=64)
    prompt = random_prompt(length)
    found = engine_logits(path, prompt, max_seq_len=max(64, length))
    assert distance(found, hf_logits(source, prompt)) < 1e-5


def test_scaling_of_layers_that_see_all(tmp_path: Path) -> None:
    far = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    rope = {"full_attention": far, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    path, source = made("gemma3_text", tmp_path, rope_parameters=rope)
    assert distance(engine_logits(path, PROMPT), hf_logits(source, PROMPT)) < 1e-5


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_what_a_file_does_not_say_of_positions(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not scaled, and the base is 10,000, whatever is usual in the family."""
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda self, value: None)
    path, source = made(family, tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert distance(engine_logits(path, PROMPT), hf_logits(source, PROMPT)) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3", "qwen3_moe"])
def test_numbers_of_each_layer(family: str, tmp_path: Path) -> None:
    """A file may say of each layer what is the same in all; that says nothing of windows."""
    source = tiny_model(family, **SAYS.get(family, {}))
    config, start = json.loads((source / "config.json").read_text()), f"{ARCHITECTURES[family]}__"
    keys = {"attention__head_count_kv": "num_key_value_heads", "feed_forward_length": "intermediate_size"}
    lists = {start + key: [config[ours]] * config["num_hidden_layers"] for key, ours in keys.items()}
    path = convert(source, tmp_path / "model.gguf", **lists)
    assert distance(engine_logits(path, PROMPT), hf_logits(source, PROMPT)) < 1e-5


def test_layers_of_which_none_has_a_window_are_rotated(tmp_path: Path) -> None:
    path, source = made("exaone4", tmp_path, sliding_window=None, layer_types=["full_attention"] * 5)
    assert distance(engine_logits(path, PROMPT), hf_logits(source, PROMPT)) < 1e-5


@pytest.mark.parametrize(("family", "layers", "scalar"), [("gemma2", 46, 144), ("gemma3_text", 62, 168)])
def test_scores_of_the_largest_gemma(family: str, layers: int, scalar: int, tmp_path: Path) -> None:
    """Known by the number of layers, as in llama.cpp."""
    numbers = {"num_hidden_layers": layers, "query_pre_attn_scalar": scalar}
    path, source = made(family, tmp_path, **numbers)
    ours, theirs = (read_model_config(one).ropes[0].scale for one in (path, source))
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("glm4", {"glm4__rope__dimension_sections": [4, 6, 2, 0]}, "rope_sections must be 0, not "),
        ("mixtral", {"llama__expert_gating_func": 2}, "expert_gating_func must be 0 or 1, not 2"),
        ("qwen2_moe", {"qwen2moe__expert_weights_scale": 2.5}, "expert_weights_scale must be 0 or 1, not 2.5"),
        ("qwen3_moe", {"qwen3vlmoe__expert_group_count": 2}, "expert_group_count must be 0 or 1, not 2"),
        ("gemma3_text", {"gemma3__attention__causal": False}, "is_causal must be true, not False"),
        ("gemma4_text", {"gemma4__expert_count": 8}, "architecture not supported: Gemma 4 with experts .missing: "),
        ("gemma4_text", {"gemma4__attention__shared_kv_layers": 5}, "num_kv_shared_layers must be fewer, with a layer"),
        ("lfm2", {"lfm2__attention__sliding_window": 64}, "sliding_window must be 0, not 64"),
        ("lfm2", {"lfm2__attention__head_count": 65}, "2 key-value heads do not divide 65 attention heads"),
    ],
)
def test_what_is_not_computed(family: str, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = convert(tiny_model(family, **SAYS.get(family, {})), tmp_path / "model.gguf", **changes)
    with pytest.raises(ConfigError, match=f"^{path}/config.json: {told}"):
        read_model_config(path)


@pytest.mark.parametrize(
    ("family", "texts", "ends"),
    [
        ("gpt_oss", ["<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"], {6, 7, 8}),
        ("gemma4_text", ["<|turn>", "<eos>", "<turn|>", "<|tool_response>"], {6, 7, 8}),
    ],
)
def test_what_ends_a_turn(family: str, texts: list[str], ends: set[int], tmp_path: Path) -> None:
    """A message of gpt-oss does not, and Gemma 4 waits for what a tool answers."""
    tokens = [f"t{i}" for i in range(256)]
    tokens[5:9] = texts
    says = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__eos_token_id": 6}
    path = convert(tiny_model(family), tmp_path / "model.gguf", **says)
    assert {*read_model_config(path).eos_token_ids} == ends


def test_a_head_that_foretells(tmp_path: Path) -> None:
    """The same drafts as those of the checkpoint."""
    source = shutil.copytree(tiny_model("qwen3_5_text"), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    of_layer = {name.removeprefix(LAYER): weight for name, weight in weights.items() if name.startswith(LAYER)}
    head = {f"mtp.layers.0.{name}": weight.clone() for name, weight in of_layer.items()}
    head["mtp.fc.weight"] = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) / 8
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        head[f"mtp.{name}.weight"] = weights["model.norm.weight"].clone()
    save_file(weights | head, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    path = convert(source, tmp_path / "model.gguf")
    assert distance(engine_logits(path, PROMPT), hf_logits(tiny_model("qwen3_5_text"), PROMPT)) < 1e-5
    told, drafts = generate(path, "mtp")
    assert (told, drafts) == generate(source, "mtp")
    assert len(drafts) > 5
