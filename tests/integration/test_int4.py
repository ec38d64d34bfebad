"""Weights that are made 4 bits wide: nearer to the originals than rounding to the nearest, and than GGUF's Q4_1."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

from minisgl.config.locate import DEMO_MODEL
from minisgl.errors import ConfigError
from minisgl.formats.int4 import quantize
from minisgl.kernel.packed import Grouped
from minisgl.quantize import main
from tests.driver import CPU_KERNELS, engine_logits
from tests.models import FAMILIES, hf_logits, hf_model, random_prompt, tiny_model
from tests.real_model import real_model
from tests.tokenizers_fixture import make_words

ROOT = Path(__file__).parent.parent.parent
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for one another take long on a busy machine
IN_FULL = {"kv_cache_dtype": "float32", **CPU_KERNELS}
TEXT = """Requests become plans, plans become batches, batches become tokens, and tokens become text.
The capital of France is Paris, where the river Seine flows past the museum. Water boils at one hundred degrees
Celsius at sea level, and at less on a mountain, because the air presses less upon it. Once upon a time there was
a little girl who lived near the forest with her grandmother; every morning she carried bread and milk to the
miller, who told her stories of the sea.
def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
"""
TEXT += (ROOT / "docs" / "reliability.md").read_text()[:1200]  # of fewer tokens the share depends on the processor


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Groups of 32 with a scale and a zero, so that the range of each is covered."""
    groups = weight.float().unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float().clamp(min=1e-7)
    zero = (-low / scale).round()
    return (((groups / scale + zero).round().clamp(0, 15) - zero) * scale).flatten(1)


def packed(weight: torch.Tensor, bits: int = 4, importance: torch.Tensor | None = None) -> torch.Tensor:
    made = quantize("layer.", weight, bits, importance)
    assert isinstance(made, Grouped)
    return made.dequantize()


def error(made: torch.Tensor, weight: torch.Tensor) -> float:
    return float((made - weight.float()).square().sum() / weight.float().square().sum())


def test_errors_of_trained_weights() -> None:
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    kind = gguf.GGMLQuantizationType.Q4_1
    for name in ("layers.0.self_attn.q_proj", "layers.4.mlp.up_proj", "layers.9.mlp.down_proj"):
        weight = tensors[f"model.{name}.weight"].float()
        q4_1 = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
        assert error(packed(weight), weight) < min(0.93 * error(nearest(weight), weight), error(q4_1, weight))
        assert error(packed(weight, 8), weight) < 1e-4


def test_columns_that_count_more_are_nearer() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.where(torch.arange(128) % 4 == 0, 100.0, 1.0)
    plain, weighted = packed(weight), packed(weight, importance=importance)
    assert error(weighted[:, ::4], weight[:, ::4]) < 0.8 * error(plain[:, ::4], weight[:, ::4])


@pytest.mark.parametrize("rows", [torch.zeros(2, 64), torch.full((2, 64), 3.0), torch.full((2, 64), -1e-30)])
def test_groups_of_one_value(rows: torch.Tensor) -> None:
    torch.testing.assert_close(packed(rows), rows, atol=1e-6, rtol=1e-3)


def test_what_cannot_be_in_groups() -> None:
    weight = torch.randn(4, 48)
    assert quantize("layer.", weight, 4) is weight
    with pytest.raises(ConfigError, match=r"^layer.weight holds NaN"):
        quantize("layer.", torch.full((4, 64), torch.nan), 4)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2"])
def test_the_logits_are_those_of_the_weights(family: str) -> None:
    """Routers stay exact, embedding and head have 8 bits."""
    path, tokens = tiny_model(family), random_prompt(40)
    model = copy.deepcopy(hf_model(path))
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not name.endswith("mlp.gate.weight"):
                bits = 8 if "embed_tokens" in name or "lm_head" in name else 4
                for part in weight if weight.dim() == 3 else [weight]:
                    part.copy_(packed(part.data, bits))
        expected = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(engine_logits(path, tokens, quantization="int4"), expected, atol=1e-3, rtol=1e-3)
    if family == "qwen3_moe":
        return  # whose routers are so near to ties that what kernels round makes them choose others
    kernels = engine_logits(path, tokens, quantization="int4", **CPU_KERNELS)
    assert (kernels - expected).norm() / expected.norm() < 0.05, "activations are rounded to 8 bits"


@functools.cache
def of_real_model() -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The tokens of `TEXT`, the logits of a real model, and those of its weights made 4 bits wide."""
    ids = transformers.AutoTokenizer.from_pretrained(real_model())(TEXT).input_ids
    return ids, hf_logits(real_model(), ids), engine_logits(real_model(), ids, quantization="int4", **IN_FULL)


@pytest.mark.timeout(600)  # the model may have to be made first
def test_a_real_model_is_less_surprised_than_with_rounded_weights() -> None:
    """By the divergence of its distributions from those of the original."""
    ids, original, ours = of_real_model()
    rounded = copy.deepcopy(hf_model(real_model()))
    with torch.inference_mode():
        for name, weight in rounded.named_parameters():
            if weight.dim() > 1 and "embed_tokens" not in name:
                weight.copy_(nearest(weight.data))
        others = rounded(torch.tensor([ids])).logits[0]
    assert divergence(original, ours) < 0.85 * divergence(original, others)


@pytest.mark.timeout(600)
def test_a_calibration_text_makes_it_still_less_surprised(tmp_path: Path) -> None:
    """The text is none of those that are looked at; by command, as it is documented."""
    calibration = tmp_path / "text.md"
    calibration.write_text((ROOT / "README.md").read_text()[:3000])
    done = quantize_command(real_model(), tmp_path / "model", "--calibrate", calibration)
    assert done.returncode == 0, done.stderr
    ids, original, plain = of_real_model()
    calibrated = engine_logits(tmp_path / "model", ids, **IN_FULL)
    assert divergence(original, calibrated) < 0.85 * divergence(original, plain)


@pytest.mark.parametrize("family", ["phi3", "qwen2_moe", "mixtral"])
def test_all_layers_are_calibrated(family: str, tmp_path: Path) -> None:
    """Those that are one tensor in the checkpoint, or in transformers, too; what is no linear layer stays as it is."""
    source = Path(shutil.copytree(tiny_model(family, vocab_size=300), tmp_path / "source"))
    make_words(source, 300)
    (tmp_path / "text").write_text((ROOT / "README.md").read_text()[:1200])
    assert main([str(source), str(tmp_path / "plain")]) == 0
    assert main([str(source), str(tmp_path / "made"), "--calibrate", str(tmp_path / "text")]) == 0
    plain, made = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "made"))
    changed = {name for name in plain if not torch.equal(plain[name], made[name])}
    layers = {name for name in plain if name.endswith("weight_scale") and ".layers." in name}
    assert {name.rpartition(".")[0] for name in changed} == {name.rpartition(".")[0] for name in layers}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "cannot be read: .*"),
        (b" \n", "there is no text in it"),
        (None, "cannot be read: .*No such file.*"),
    ],
)
def test_a_text_that_cannot_be_read(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^--calibrate {file}: {reason}$"):
        main([str(tiny_model("llama")), str(tmp_path / "out"), "--calibrate", str(file)])
    assert not (tmp_path / "out").exists()


def divergence(original: torch.Tensor, other: torch.Tensor) -> float:
    """Kullback-Leibler's, in nats a token."""
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def quantize_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minisgl", "quantize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=ALONE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_is_loaded(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same logits as of weights that are quantized at load, whatever a family's loader does with tensors; files
    that are no weights are there too."""
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    source, target, tokens = tiny_model(family, vocab_size=300, **tied), tmp_path / "new" / "model", random_prompt(40)
    assert main([str(source), str(target)]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: ")
    assert (target / "generation_config.json").is_file()
    for kernels in ({}, CPU_KERNELS):
        expected = engine_logits(source, tokens, quantization="int4", **kernels)
        torch.testing.assert_close(engine_logits(target, tokens, **kernels), expected, atol=1e-5, rtol=1e-5)
    assert main([str(source), str(tmp_path / "int8"), "--quantization", "int8"]) == 0
    original = hf_logits(source, tokens)
    narrow, wide = (engine_logits(path, tokens) - original for path in (target, tmp_path / "int8"))
    assert wide.norm() < narrow.norm() / (1 if "moe" in family else 3), "routers are near ties"


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source, target = str(tiny_model("llama")), tmp_path / "model"
    whole = Path(shutil.copytree(source, tmp_path / "whole"))
    for name in ("1_Pooling/config.json", "modules.json", "onnx/config.json", ".cache/x.json", "1_Pooling/a.bin"):
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text("{}")
    done = quantize_command(source, tmp_path)
    assert (done.returncode, done.stderr) == (2, f"minisgl: error: {tmp_path} exists already\n")
    assert main([str(whole), str(target)]) == 0
    copied = {str(file.relative_to(target)) for file in target.rglob("*")} - {
        file.name for file in Path(source).iterdir()
    }
    assert copied == {"1_Pooling", "1_Pooling/config.json", "modules.json"}
    with pytest.raises(ConfigError, match=rf"^{target}: its weights are quantized already$"):
        main([str(target), str(tmp_path / "again")])
    with pytest.raises(ConfigError, match=r"^[^\n]*none[^\n]*$"):
        main([str(tmp_path / "none"), str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()
