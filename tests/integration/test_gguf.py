"""Models in GGUF files: the same logits as transformers with the values that the blocks stand for."""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from minisgl.config.families import read_model_config
from minisgl.config.locate import locate_model
from minisgl.config.model import RopeConfig
from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.formats.base import Shard
from minisgl.formats.gguf import Gguf
from minisgl.gguf.model import KINDS, Kind
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.ops import TorchOps
from minisgl.layers.base import LayerEnv
from minisgl.layers.rope import inverse_frequencies
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderModel
from tests.driver import CPU_KERNELS, engine_logits
from tests.gguf_files import write_gguf
from tests.integration.test_formats import SecondOfTwo
from tests.integration.test_tensor_parallel import run_ranks
from tests.models import hf_logits, random_prompt, tiny_model
from tests.real_model import real_model

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
MIXED = {"v_proj": "Q8_0", "down_proj": "F16", "embed_tokens": "BF16", "": "Q4_0"}
PROMPT = random_prompt(24)
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values()])
def test_every_type(kind: str, tmp_path: Path) -> None:
    path, reference = write_gguf(tiny_model("qwen3", **WIDE), tmp_path, kind)
    torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)


def test_sizes_of_blocks() -> None:
    for number, kind in KINDS.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (theirs.name, *gguf.GGML_QUANT_SIZES[theirs]) == kind[:3]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("kernels", [{}, CPU_KERNELS], ids=["torch", "kernels"])
def test_every_family(family: str, kernels: dict[str, Any], tmp_path: Path) -> None:
    """With the types that a file mixes in one layer. Kernels round activations to 8 bits where that pays, and with them
    a router may choose other experts."""
    path, reference = write_gguf(tiny_model(family), tmp_path, MIXED)
    expected = hf_logits(reference, PROMPT)
    error = (engine_logits(path, PROMPT, **kernels) - expected).square().mean().sqrt() / expected.std()
    rounded = 0.2 if family == "qwen3_moe" else 0.05
    assert error < (rounded if kernels else 1e-4)


def test_biases_are_in_the_order_of_their_rows(tmp_path: Path) -> None:
    path, reference = write_gguf(tiny_model("llama", attention_bias=True, mlp_bias=True), tmp_path, "Q8_0")
    torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)


def test_a_tied_head(tmp_path: Path) -> None:
    path, reference = write_gguf(tiny_model("qwen3", tie_word_embeddings=True), tmp_path, "Q8_0")
    assert read_model_config(path).tie_word_embeddings
    torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("num_parts", [2, 5])
def test_parts(num_parts: int, tmp_path: Path) -> None:
    """A model in several files is found by the first, or in its directory; what is missing is named."""
    first, reference = write_gguf(tiny_model("llama"), tmp_path, "Q8_0", parts=num_parts)
    last = first.with_name(f"model-{num_parts:05}-of-{num_parts:05}.gguf")
    assert first.name == f"model-00001-of-{num_parts:05}.gguf"
    assert locate_model(str(tmp_path), "huggingface") == first
    for path in (first, last):
        torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)
    last.unlink()
    with pytest.raises(ConfigError, match=rf"{first.name}' is incomplete: {last.name} missing"):
        read_model_config(first)


def test_a_part_of_another_model(tmp_path: Path) -> None:
    first, _ = write_gguf(tiny_model("llama"), tmp_path, "Q8_0", parts=3)
    shutil.copy(first, first.with_name("model-00002-of-00003.gguf"))
    with pytest.raises(ConfigError, match=f"{first}: its parts have .* tensors, not 30"):
        read_model_config(first)


def test_a_directory_with_several(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = write_gguf(tiny_model("llama"), tmp_path, "Q8_0")
    (tmp_path / "mmproj-F16.gguf").touch()
    assert locate_model(str(tmp_path), "huggingface") == path
    path.with_name("other.gguf").touch()
    with pytest.raises(ConfigError, match=rf"{tmp_path}' holds several models, give one: model.gguf, other.gguf"):
        locate_model(str(tmp_path), "huggingface")
    (tmp_path / "model.safetensors").touch()
    with caplog.at_level("INFO"):
        assert locate_model(str(tmp_path), "huggingface") == tmp_path
    assert caplog.messages == [
        f"{tmp_path} holds GGUF files, too, which are not loaded: to have one of them, give its name"
    ]


REPO = ["a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a.Q8_0.gguf", "mmproj-Q8_0.gguf", "BF16/a-BF16-00001-of-00002.gguf"]
REPO += ["BF16/a-BF16-00002-of-00002.gguf", "README.md", "config.json"]


@pytest.mark.parametrize(
    ("which", "name"), [("Q4_K_M", REPO[0]), ("q4_k_s", REPO[1]), ("Q8_0", REPO[2]), ("BF16", REPO[4])]
)
def test_one_of_a_repo(which: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("org/name", "v1")
        for file in filter_repo_objects(REPO, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo_id, revision: REPO)
    assert locate_model(f"org/name:{which}", "huggingface", "v1") == tmp_path / name
    taken = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.gguf")}
    assert taken == ({name} if which != "BF16" else {REPO[4], REPO[5]})
    for wrong in (":Q3_K", ""):
        with pytest.raises(
            ConfigError, match=r"org/name.*say which .*, as in org/name:Q4_K_M; there are a-Q4_K_M.gguf, "
        ):
            locate_model(f"org/name{wrong}", "huggingface", "v1")


def test_a_file_that_is_not_there_is_no_repo() -> None:
    with pytest.raises(ConfigError, match=r"--model models/x.gguf: no directory, no GGUF file, and no repo id"):
        locate_model("models/x.gguf", "huggingface")


def test_two_ranks(tmp_path: Path) -> None:
    """Of a vocabulary that they do not share evenly, and of experts."""
    sizes = {"vocab_size": 255, "intermediate_size": 128}
    models = tiny_model("llama", **sizes), tiny_model("qwen3_moe", moe_intermediate_size=64, **sizes)
    paths = [write_gguf(model, tmp_path / str(i), "Q4_0")[0] for i, model in enumerate(models)]
    found = run_ranks([(path, size) for path in paths for size in (1, 2)])
    for case in (0, 2):
        assert found[case, 0] == found[case + 1, 0] == found[case + 1, 1]


def load(path: Path, comm: Communicator | None = None, ops: TorchOps | None = None) -> DecoderModel:
    env = LayerEnv(comm or Communicator(), ops or TorchOps(), torch.float32, CPU, Gguf(path, torch.float32, CPU))
    with torch.inference_mode():
        model = DecoderModel(env, read_model_config(path))
        load_weights(model.parts(), Checkpoint(path))
    return model


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.values > 1], ids=str)
def test_ranks_cut_between_blocks(kind: Kind, tmp_path: Path) -> None:
    """Half of 96 columns is no whole number of 32, and half of 768 none of 256."""
    sizes = {"intermediate_size": 3 * kind.values, "hidden_size": 2 * kind.values}
    path, _ = write_gguf(tiny_model("llama", **sizes), tmp_path, kind.name)
    reason = f"has blocks of {kind.values} columns, and the ranks' parts begin at column {3 * kind.values // 2}"
    says = rf"{path}: tensor blk.0.ffn_down.weight cannot be shared .*: {kind.name} {reason}"
    with pytest.raises(ConfigError, match=says):
        load(path, SecondOfTwo())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llama.attention.head_count_kv": 1}, r"wrong shape: .*k_proj.weight is \[32, 64\], not \[16, 64\]"),
        ({"llama.attention.key_length": 32}, r"wrong shape: .*q_proj.weight is \[64, 64\], not \[128, 64\]"),
        ({"llama.block_count": 4}, r"missing: model.layers.3.self_attn.q_proj.weight, "),
        ({"llama.feed_forward_length": 64}, r"wrong shape: .*gate_proj.weight is \[96, 64\], not \[64, 64\]"),
    ],
)
def test_tensors_that_contradict_the_metadata(changes: dict[str, int], reason: str, tmp_path: Path) -> None:
    path, _ = write_gguf(tiny_model("llama"), tmp_path, "Q8_0")
    data = bytearray(path.read_bytes())
    for key, value in changes.items():
        at = data.index(key.encode()) + len(key) + 4
        data[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"^the weights in '{path}' do not fit its configuration; .*{reason}"):
        load(path)


def test_weights_are_not_copied_before_they_are_packed(tmp_path: Path) -> None:
    path, _ = write_gguf(tiny_model("qwen3"), tmp_path, "Q4_0")
    weight_format, tensors = Gguf(path, torch.float32, CPU), dict[str, torch.Tensor]()
    (slot,) = weight_format.slots("model.layers.1.self_attn.o_proj.", tensors, Shard((64, 128), (0, 64)))
    assert slot.rows == (0, 0), "nothing is read"
    (data,) = tensors.values()
    stored = path.read_bytes().find(data.numpy().tobytes())
    assert stored > 0
    maps = Path("/proc/self/maps").read_text().splitlines()
    (line,) = [line for line in maps if str(path) in line]
    begin, end = (int(address, 16) for address in line.split()[0].split("-"))
    assert data.data_ptr() == begin + stored < end


@pytest.mark.parametrize(("kind", "at"), [(kind, at) for kind in KINDS.values() for at in kind.scales], ids=str)
def test_scales_that_are_no_numbers(kind: Kind, at: int, tmp_path: Path) -> None:
    """Of each type, of each number that a block has: in a block in the middle."""
    path, _ = write_gguf(tiny_model("qwen3", **WIDE), tmp_path, kind.name)
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_down.weight")
    scale = np.float16(-math.inf if at else math.nan)
    tensor.data.reshape(-1, kind.num_bytes)[5, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    says = f"^{path}: tensor blk.1.ffn_down.weight has scales that are infinite, or not a number$"
    with pytest.raises(ConfigError, match=says):
        load(path, ops=CpuOps(1))


def test_a_norm_that_is_no_number(tmp_path: Path) -> None:
    path, _ = write_gguf(tiny_model("qwen3"), tmp_path, "Q8_0")
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.attn_q_norm.weight")
    tensor.data[3] = math.inf
    with pytest.raises(
        ConfigError, match=f"{path}: tensor model.layers.1.self_attn.q_norm.weight: it holds NaN or inf"
    ):
        load(path)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.3},
]


@pytest.mark.parametrize("rope", ROPES, ids=["linear", "yarn", "yarn with attention_factor"])
def test_ropes(rope: dict[str, Any], tmp_path: Path) -> None:
    names = {"rope_type": "type", "original_max_position_embeddings": "original_context_length"}
    metadata = {f"llama__rope__scaling__{names.get(key, key)}": value for key, value in rope.items()}
    if "attention_factor" in rope:  # in files it comes on top of what follows from the factor
        del metadata["llama__rope__scaling__attention_factor"]
        metadata["llama__rope__scaling__attn_factor"] = rope["attention_factor"] / (0.1 * math.log(4) + 1)
    model = tiny_model("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    path, reference = write_gguf(model, tmp_path, "F32", **metadata)
    torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"scaling__factor": 2.0}, 2.0),
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling__type": "linear", "scale_linear": 2.0}, 2.0),
        ({"scaling__type": "none", "scaling__factor": 2.0}, 1.0),
        ({"scaling__type": "linear"}, 1.0),
        ({"scaling__factor": 0.0}, 1.0),
    ],
    ids=str,
)
def test_ropes_of_older_files(metadata: dict[str, Any], factor: float, tmp_path: Path) -> None:
    """A factor without a type is linear, as in llama.cpp; one without a value is none."""
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    named = {f"llama__rope__{key}": value for key, value in metadata.items()}
    path, reference = write_gguf(tiny_model("llama", rope_parameters=rope), tmp_path, "F32", **named)
    torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("low", "high", "factor"), [(1.0, 4.0, 8.0), (1.0, 4.0, 32.0), (0.5, 5.0, 4.0)])
def test_frequencies_of_llama_3(low: float, high: float, factor: float, tmp_path: Path) -> None:
    """A file has the factor of each frequency, in a tensor."""
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope |= {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    model = tiny_model("llama", hidden_size=256, max_position_embeddings=131072, rope_parameters=rope)
    numbers = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
    wanted, _ = inverse_frequencies(RopeConfig(500000.0, "llama3", 8192, numbers), 64)
    plain, _ = inverse_frequencies(RopeConfig(500000.0), 64)
    path, reference = write_gguf(model, tmp_path, "F32", rope_freqs=(plain / wanted).numpy())
    found = read_model_config(path).ropes[0]
    torch.testing.assert_close(inverse_frequencies(found, 64)[0], wanted, rtol=1e-4, atol=0)
    prompt = random_prompt(300)
    torch.testing.assert_close(engine_logits(path, prompt), hf_logits(reference, prompt), atol=2e-3, rtol=2e-3)


def test_factors_of_any_kind(tmp_path: Path) -> None:
    """Of one frequency each, as transformers has them for what it calls longrope."""
    factors = np.array([1, 8, 2, 1, 1.5, 1, 1, 3], np.float32)
    path, reference = write_gguf(tiny_model("llama"), tmp_path, "F32", rope_freqs=factors)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "attention_factor": 1.0}
    rope |= {"short_factor": factors.tolist(), "long_factor": factors.tolist(), "factor": 1.0}
    config = json.loads((reference / "config.json").read_text())
    rope["original_max_position_embeddings"] = config["max_position_embeddings"]
    (reference / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf])
def test_factors_that_are_none(factor: float, tmp_path: Path) -> None:
    factors = np.array([1, 8, 2, 1, 1, 1, 1, factor], np.float32)
    path, _ = write_gguf(tiny_model("llama"), tmp_path, "F32", rope_freqs=factors)
    with pytest.raises(
        ConfigError, match=f"^{path}: tensor rope_freqs.weight has factors that are no numbers above 0$"
    ):
        read_model_config(path)


def test_what_a_configuration_says(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(256)]
    tokens[7] = "<|im_end|>"
    ids = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__eos_token_id": 2, "tokenizer__ggml__eot_token_id": 9}
    path, _ = write_gguf(tiny_model("mistral"), tmp_path, "Q4_0", llama__attention__sliding_window=64, **ids)
    model = read_model_config(path)
    assert model.architecture == "MistralForCausalLM"
    assert [layer.attention.window for layer in model.layers] == [64] * 3
    assert model.eos_token_ids == (2, 9, 7)
    assert model.weight_bytes("packed") < path.stat().st_size < model.weight_bytes("packed") + 30_000
    assert read_model_config(path, {"max_position_embeddings": 99}).max_position == 99


@pytest.mark.timeout(600)  # the model may have to be fetched first
def test_a_real_file() -> None:
    """SmolLM2's, beside the checkpoint that transformers makes of it."""
    directory = real_model()
    (path,) = directory.rglob("*.gguf")
    prompt = [504, 3575, 282, 4649, 314, 7042, 30, 657, 3575, 282, 2976, 314]
    torch.testing.assert_close(engine_logits(path, prompt), hf_logits(directory, prompt), atol=2e-3, rtol=1e-3)
    ours, theirs = read_model_config(path), read_model_config(directory)
    assert replace(ours, dtype="float32", packed_bytes=0, eos_token_ids=()) == replace(theirs, eos_token_ids=())
    assert set(theirs.eos_token_ids) <= set(ours.eos_token_ids)
