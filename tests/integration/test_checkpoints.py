"""Checkpoints as people write them: names, fused and stacked tensors, formats and files; the same tokens each time."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisgl.config.families import read_model_config
from minisgl.distributed.comm import Communicator
from minisgl.engine.cpu import CpuRunner
from minisgl.engine.engine import create_engine
from minisgl.errors import ConfigError
from minisgl.kernel.ops import TorchOps
from minisgl.layers.base import LayerEnv
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderModel
from tests.driver import engine_config, generate
from tests.models import hf_generate, random_prompt, tiny_model

Tensors = dict[str, torch.Tensor]
PROMPT = random_prompt(9)
BIASED = {"attention_bias": True, "mlp_bias": True}


def tokens_of(path: Path, **options: object) -> list[int]:
    config = engine_config(path, **options)
    engine = create_engine(config)
    output = generate(engine, config, [PROMPT], 12)[0]
    engine.close()
    return output


def rewritten(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of the model with other tensors."""
    shutil.copytree(source, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def renamed(rule: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rule(name): tensor for name, tensor in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """As Phi-3 has it."""
    return together(together(tensors, "qkv_proj", "q_proj k_proj v_proj"), "gate_up_proj", "gate_proj up_proj")


def together(tensors: Tensors, whole: str, parts: str) -> Tensors:
    first, *rest = parts.split()
    made = dict(tensors)
    for name in tensors:
        if f".{first}." in name:
            made[name.replace(first, whole)] = torch.cat([made.pop(name.replace(first, p)) for p in (first, *rest)])
    return made


def stacked(*parts: str, end: str = "") -> Callable[[Tensors], Tensors]:
    """Experts along a first dimension."""

    def change(tensors: Tensors) -> Tensors:
        made = dict(tensors)
        for layer in range(3):
            for part in parts:
                names = [f"model.layers.{layer}.mlp.experts.{i}.{part}.weight" for i in range(8)]
                stack = torch.stack([made.pop(name) for name in names])
                made[f"model.layers.{layer}.mlp.experts.{part}{end}"] = stack
        return made

    return change


def transformers_5(tensors: Tensors) -> Tensors:
    return stacked("gate_up_proj", "down_proj")(together(tensors, "gate_up_proj", "gate_proj up_proj"))


def with_buffers(tensors: Tensors) -> Tensors:
    buffers = "rotary_emb.inv_freq rotary_emb.cos_cached rotary_emb.sin_cached masked_bias bias _extra_state k_scale"
    names = [f"model.layers.0.self_attn.{name}" for name in buffers.split()]
    names += [
        "model.rotary_emb.inv_freq",
        "model.position_ids",
        "v_head.summary.weight",
        "model.layers.7.mlp.up.weight",
    ]
    return {**tensors, **{name: torch.ones(4) for name in names}}


CHANGES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "no prefix": ("llama", renamed(lambda name: name.removeprefix("model."))),
    "language_model.": ("qwen3", renamed(lambda name: f"language_model.{name}")),
    "model.language_model.": (
        "qwen2",
        renamed(lambda name: name.replace("model.", "model.language_model.") if "lm_head" not in name else name),
    ),
    "language_model. without model.": ("llama", renamed(lambda name: "language_model." + name.removeprefix("model."))),
    "module.": ("mistral", renamed(lambda name: f"module.{name}")),
    "fused": ("llama", fused),
    "fused and without prefix": ("qwen2", lambda tensors: renamed(lambda n: n.removeprefix("model."))(fused(tensors))),
    "buffers": ("qwen3", with_buffers),
    "experts as transformers 5 has them": ("qwen3_moe", transformers_5),
    "experts stacked": ("qwen3_moe", stacked("gate_proj", "up_proj", "down_proj")),
    "experts stacked as weights": ("qwen3_moe", stacked("gate_proj", "up_proj", "down_proj", end=".weight")),
    "each expert fused": ("qwen3_moe", lambda tensors: together(tensors, "gate_up_proj", "gate_proj up_proj")),
    "all fused": ("qwen3_moe", lambda tensors: transformers_5(together(tensors, "qkv_proj", "q_proj k_proj v_proj"))),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_names_and_layouts(tmp_path: Path, kind: str) -> None:
    family, change = CHANGES[kind]
    source = tiny_model(family, **BIASED) if family == "llama" else tiny_model(family)
    assert tokens_of(rewritten(source, tmp_path / "model", change)) == hf_generate(source, PROMPT, 12)


def test_scales_of_a_cache_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["model.layers.0.self_attn.attn.v_scale", "model.layers.0.self_attn.k_scale"]
    path = rewritten(tiny_model("qwen3"), tmp_path / "model", lambda t: {**t, **{n: torch.ones(1) for n in names}})
    assert tokens_of(path) == tokens_of(tiny_model("qwen3"))
    assert f"are left out: {', '.join(names)}" in caplog.text


class SecondOfTwo(Communicator):
    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, 2


@pytest.mark.parametrize(("family", "change"), [("llama", fused), ("qwen3_moe", transformers_5)])
def test_a_rank_finds_its_share_of_fused_tensors(
    tmp_path: Path, family: str, change: Callable[[Tensors], Tensors]
) -> None:
    source = tiny_model(family, **BIASED) if family == "llama" else tiny_model(family)
    weights = []
    for path in (source, rewritten(source, tmp_path / "model", change)):
        env = LayerEnv(SecondOfTwo(), TorchOps(), torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            model = DecoderModel(env, read_model_config(path))
            weights.append({slot.name: slot.target for part in model.parts() for slot in part.slots})
            load_weights(model.parts(), Checkpoint(path))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_head_of_its_own_under_a_tied_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in transformers: what the file has counts, not what the configuration says about it."""
    tied = tiny_model("llama", tie_word_embeddings=True)
    head = load_file(tiny_model("llama", seed=5) / "model.safetensors")["lm_head.weight"]
    path = rewritten(tied, tmp_path / "model", lambda tensors: {**tensors, "lm_head.weight": head})
    output = tokens_of(path)
    assert output == hf_generate(path, PROMPT, 12) != hf_generate(tied, PROMPT, 12)
    assert "whose lm_head differs" in caplog.text
    only_head = rewritten(tied, tmp_path / "head", renamed(lambda name: name.replace("model.embed_tokens", "lm_head")))
    assert tokens_of(only_head) == hf_generate(only_head, PROMPT, 12) == hf_generate(tied, PROMPT, 12)


@pytest.mark.parametrize("kinds", ["fsf", "sfs", "fff", None])
def test_mistral_with_layer_types(tmp_path: Path, kinds: str | None) -> None:
    shutil.copytree(tiny_model("mistral", sliding_window=4), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    names = {"f": "full_attention", "s": "sliding_attention"}
    config = {**json.loads(file.read_text()), "layer_types": kinds and [names[kind] for kind in kinds]}
    file.write_text(json.dumps(config))
    assert tokens_of(tmp_path / "model") == hf_generate(tmp_path / "model", PROMPT, 12)


def test_a_whole_file_comes_before_a_stale_index(tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), path)
    stale = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert tokens_of(path) == hf_generate(path, PROMPT, 12)


def test_layers_that_have_others_keys_and_values(tmp_path: Path) -> None:
    """Some files have keys and values of their own for them, which nobody uses. What others lack is missing."""
    source = tiny_model("gemma4_text")

    def with_unused(tensors: Tensors) -> Tensors:
        of_first = {name: tensor for name, tensor in tensors.items() if ".layers.0.self_attn." in name}
        unused = ("k_proj", "v_proj", "k_norm")
        more = {n.replace(".0.", ".4."): t for n, t in of_first.items() if any(part in n for part in unused)}
        assert len(more) == 3 and not more.keys() & tensors.keys()
        return tensors | more

    assert tokens_of(rewritten(source, tmp_path / "more", with_unused)) == tokens_of(source)
    path = rewritten(
        source, tmp_path / "fewer", lambda tensors: {n: t for n, t in tensors.items() if ".0.self_attn.v_" not in n}
    )
    with pytest.raises(ConfigError, match=r"missing: model\.layers\.0\.self_attn\.v_proj\.weight$"):
        tokens_of(path)


def test_values_that_are_keys(tmp_path: Path) -> None:
    """As in transformers: a file's own values of such layers are not used."""
    source = tiny_model("gemma4_text")
    name = "model.layers.1.self_attn.k_proj.weight"
    path = rewritten(source, tmp_path / "model", lambda t: {**t, name.replace("k_proj", "v_proj"): t[name].flip(0)})
    assert tokens_of(path) == tokens_of(source) == hf_generate(path, PROMPT, 12)


@pytest.mark.parametrize("kind", ["one file", "shards", "an older file"])
def test_files_of_torch(tmp_path: Path, kind: str) -> None:
    source, path = tiny_model("qwen3"), tmp_path / "model"
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if kind == "shards":
        names = list(tensors)
        files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, part in files.items():
            torch.save({name: tensors[name] for name in part}, path / file)
        index = {name: file for file, part in files.items() for name in part}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        whole = {**tensors, "lm_head.weight": tensors["lm_head.weight"]}
        torch.save(whole, path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "one file")
    assert tokens_of(path) == hf_generate(source, PROMPT, 12)


class Malice:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_a_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_model("llama") / "config.json", tmp_path)
    for save in (torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))):
        save({"model.norm.weight": Malice()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=r"cannot read .*pytorch_model\.bin") as caught:
            Checkpoint(tmp_path)
        assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


QKV = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (f"{QKV}.weight", torch.zeros(64, 64, dtype=torch.int8), rf"quantized \({QKV}.weight is I8\)"),
        (f"{QKV}.weight", torch.zeros(64, 64, dtype=torch.float8_e4m3fn), rf"quantized \({QKV}.weight is F8_E4M3\)"),
        (f"{QKV}.qweight", torch.zeros(8, 64, dtype=torch.int32), rf"quantized \({QKV}.qweight is I32\)"),
        (f"{QKV}.weight_scale", torch.zeros(64), rf"quantized \({QKV}.weight_scale is float32\)"),
        (f"{QKV}.weight.absmax", torch.zeros(64), rf"quantized \({QKV}.weight.absmax is float32\)"),
        (f"{QKV}.lora_A.weight", torch.zeros(4, 64), rf"unexpected: {QKV}.lora_A.weight"),
        (f"{QKV}.bias", torch.zeros(64), rf"unexpected: {QKV}.bias"),
        (
            f"{QKV}.weight",
            torch.zeros(32, 64),
            r"wrong shape: model.layers.0.self_attn.q_proj.weight is \[32, 64\], not",
        ),
        ("model.layers.0.mlp.gate_up_proj.weight", torch.zeros(9, 64), r"unexpected: model.layers.0.mlp.gate_up_proj"),
        ("model.norm.weight", torch.zeros(0), r"wrong shape: model.norm.weight is \[0\], not \[64\]"),
        ("model.norm.weight", torch.full((64,), torch.nan), r"safetensors: tensor model.norm.weight: it holds NaN"),
        (
            "model.layers.1.input_layernorm.weight",
            torch.arange(64.0) / 0,
            r"model.safetensors: tensor model.layers.1.input_layernorm.weight: it holds NaN or infinity$",
        ),
    ],
)
def test_weights_that_are_not_what_they_should_be(tmp_path: Path, name: str, tensor: torch.Tensor, says: str) -> None:
    path = rewritten(tiny_model("llama"), tmp_path / "model", lambda tensors: {**tensors, name: tensor})
    with pytest.raises(ConfigError, match=says) as caught:
        CpuRunner(engine_config(path), 0)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("glm", f"{QKV}.weight"),  # the two features of a pair lie side by side
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),  # transposed, and rows take turns
        ("qwen3_next", "model.layers.0.linear_attn.conv1d.weight"),
        ("gemma", "model.norm.weight"),  # to which one is added
    ],
)
def test_integers_are_named_where_tensors_are_changed_on_the_way(tmp_path: Path, family: str, name: str) -> None:
    path = rewritten(tiny_model(family), tmp_path / "model", lambda tensors: {**tensors, name: tensors[name].char()})
    with pytest.raises(ConfigError, match=rf"quantized \({name} is I8\)"):
        CpuRunner(engine_config(path), 0)


def test_a_fused_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> Tensors:
        name = "model.layers.1.self_attn.qkv_proj.weight"
        made = fused(tensors)
        return {**made, name: made[name][:100]}

    path = rewritten(tiny_model("llama"), tmp_path / "model", cut)
    with pytest.raises(
        ConfigError, match=r"wrong shape: .*1.self_attn.qkv_proj.weight is \[100, 64\], not \[128, 64\]$"
    ):
        CpuRunner(engine_config(path), 0)


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda made: {**made, DOWN: made[DOWN][:7]}, r"missing: model.layers.1.mlp.experts.7.down_proj.weight$"),
        (
            lambda made: {**made, DOWN: torch.cat((made[DOWN], made[DOWN][:1]))},
            r"unexpected: model.layers.1.mlp.experts.8.down_proj.weight$",
        ),
        (
            lambda made: {**made, DOWN.replace("experts", "experts.0") + ".weight": made[DOWN][0]},
            r"unexpected: model.layers.1.mlp.experts.down_proj$",
        ),
        (
            lambda made: {**made, DOWN: made[DOWN].transpose(1, 2).contiguous()},
            r"wrong shape: model.layers.1.mlp.experts.down_proj is \[32, 64\], not \[64, 32\] for each expert$",
        ),
        (lambda made: {**made, DOWN: torch.zeros(1 << 40, 0)}, r"unexpected: model.layers.1.mlp.experts.down_proj$"),
    ],
    ids=["fewer", "more", "beside others", "transposed", "of nothing"],
)
def test_a_stack_of_other_experts_is_named(tmp_path: Path, change: Callable[[Tensors], Tensors], says: str) -> None:
    path = rewritten(tiny_model("qwen3_moe"), tmp_path / "model", lambda tensors: change(transformers_5(tensors)))
    with pytest.raises(ConfigError, match=says):
        CpuRunner(engine_config(path), 0)


def test_a_stack_without_rows_in_a_file_of_pytorch(tmp_path: Path) -> None:
    path = rewritten(tiny_model("qwen3_moe"), tmp_path / "model", transformers_5)
    torch.save({DOWN: torch.tensor(1.0)}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"unexpected: model.layers.1.mlp.experts.down_proj$"):
        CpuRunner(engine_config(path), 0)
