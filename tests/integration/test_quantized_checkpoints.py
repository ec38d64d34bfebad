"""Quantized checkpoints, packed here as their formats are published: the logits are those of transformers with the
weights that they stand for."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.formats import create_format
from minisgl.kernel.float8 import merge
from minisgl.kernel.ops import LayerOps, Matrix, TorchOps
from minisgl.layers.attention import Attention
from minisgl.layers.base import LayerEnv
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderModel
from tests.driver import CPU_KERNELS, engine_config, engine_logits
from tests.models import hf_model, random_prompt, tiny_model

Tensors = dict[str, torch.Tensor]
PROMPT = random_prompt(40)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def words(values: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """values: [n, m], below 2 ** bits → [n, m * bits / 32] int32; value order[i] of a word lies at bit i * bits."""
    per_word = 32 // bits
    groups = values.to(torch.int64).reshape(len(values), -1, per_word)
    packed = torch.zeros(groups.shape[:2], dtype=torch.int64)
    for i in range(per_word):
        packed += groups[:, :, order[i] if order else i] << (bits * i)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def grouped(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """→ codes [out, in], scales and zeros [out, groups], and the weight that they stand for. order: the group of each
    column, in place of one after the other."""
    num_in = weight.shape[1]
    group = num_in if group == -1 else group
    index = torch.arange(num_in) // group if order is None else order
    num_groups, most = num_in // group, 2**bits - 1
    low = torch.stack([weight[:, index == g].amin(1).clamp(max=0) for g in range(num_groups)], 1)
    high = torch.stack([weight[:, index == g].amax(1).clamp(min=0) for g in range(num_groups)], 1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).clamp(min=1e-6).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(0, most)
    codes = (weight / scales[:, index] + zeros[:, index]).round().clamp(0, most)
    return codes, scales, zeros, (codes - zeros[:, index]) * scales[:, index]


def awq(name: str, weight: torch.Tensor, group: int = 32) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, meant = grouped(weight, 4, group, symmetric=False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": words(codes.t(), 4, order), "qzeros": words(zeros.t(), 4, order), "scales": scales.t().half()}
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}, meant


def gptq(
    name: str, weight: torch.Tensor, bits: int = 4, group: int = 32, symmetric: bool = True, v2: bool = False,
    act_order: bool = False,
) -> tuple[Tensors, torch.Tensor]:  # fmt: skip
    num_in = weight.shape[1]
    size = num_in if group == -1 else group
    order = torch.arange(num_in) // size
    if act_order:
        order = order[torch.randperm(num_in, generator=torch.Generator().manual_seed(1))]
    codes, scales, zeros, meant = grouped(weight, bits, group, symmetric, order)
    stored = zeros if v2 else (zeros - 1) % 2**bits
    tensors = {
        "qweight": words(codes, bits).t(),
        "qzeros": words(stored.t(), bits),
        "scales": scales.t().half(),
        "g_idx": order.int(),
    }
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}, meant


def compressed(
    name: str, weight: torch.Tensor, bits: int = 4, group: int = 32, symmetric: bool = True
) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, meant = grouped(weight, bits, group, symmetric)
    tensors = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales.bfloat16() if bits == 8 else scales.half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if bits == 8:  # the scales are what is stored
        meant = meant / scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
        meant = meant * scales.bfloat16().float().repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, meant


def float8(name: str, weight: torch.Tensor, kind: str = "block", static: bool = False) -> tuple[Tensors, torch.Tensor]:
    num_out, num_in = weight.shape
    block = {"tensor": (num_out, num_in), "channel": (1, num_in), "block": (128, 128)}[kind]
    most = torch.nn.functional.pad(weight.abs(), (0, -num_in % block[1], 0, -num_out % block[0]))
    most = most.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3))
    scales = most / 448
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:num_out, :num_in]
    codes = (weight / wide).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale_inv" if kind == "block" else "weight_scale": scales}
    if kind == "tensor":
        tensors["weight_scale"] = scales.view(())
    if static:
        tensors["input_scale"] = torch.tensor([0.05])
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, codes.float() * wide


def ministral(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Ministral 3 is published so: what transformers calls the scales."""
    stored, meant = float8(name, weight, "tensor", static=True)
    names = {"weight": "weight", "weight_scale": "weight_scale_inv", "input_scale": "activation_scale"}
    return {f"{name}.{new}": stored[f"{name}.{old}"].squeeze() for old, new in names.items()}, meant


def int8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round()
    return {f"{name}.weight": codes.to(torch.int8), f"{name}.weight_scale": scales}, codes * scales


Quantize = Callable[..., tuple[Tensors, torch.Tensor]]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def compressed_config(form: str, ignore: tuple[str, ...] = ("lm_head",), **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": list(ignore)}


CASES: dict[str, tuple[Quantize, dict[str, Any], dict[str, Any]]] = {
    "awq": (awq, {}, AWQ),
    "awq in groups of 64": (awq, {"group": 64}, {**AWQ, "group_size": 64}),
    "gptq": (gptq, {}, GPTQ),
    "gptq with zeros": (gptq, {"symmetric": False}, {**GPTQ, "sym": False}),
    "gptq v2": (gptq, {"symmetric": False, "v2": True}, {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}),
    "gptq in order of activations": (gptq, {"act_order": True}, {**GPTQ, "desc_act": True}),
    "gptq of 8 bits in order": (gptq, {"bits": 8, "act_order": True}, {**GPTQ, "bits": 8, "desc_act": True}),
    "gptq of 8 bits": (gptq, {"bits": 8, "group": 128}, {**GPTQ, "bits": 8, "group_size": 128}),
    "gptq of rows": (gptq, {"group": -1}, {**GPTQ, "group_size": -1}),
    "compressed": (compressed, {}, compressed_config("pack-quantized", type="int", num_bits=4, group_size=32)),
    "compressed with zeros": (
        compressed,
        {"symmetric": False},
        compressed_config("pack-quantized", type="int", num_bits=4, group_size=32, symmetric=False),
    ),
    "compressed, 8 bits, rows": (
        compressed,
        {"bits": 8, "group": -1},
        compressed_config("pack-quantized", type="int", num_bits=8, strategy="channel"),
    ),
    "compressed int8": (
        int8,
        {},
        compressed_config("int-quantized", type="int", num_bits=8, strategy="channel"),
    ),
    "fp8 of blocks": (float8, {}, FP8),
    "fp8 of tensors": (float8, {"kind": "tensor", "static": True}, {**FP8, "weight_block_size": None}),
    "fp8 of Ministral": (ministral, {}, {**FP8, "weight_block_size": None, "activation_scheme": "static"}),
    "compressed fp8 of rows": (
        float8,
        {"kind": "channel"},
        compressed_config("float-quantized", type="float", num_bits=8, strategy="channel"),
    ),
    "modelopt": (
        float8,
        {"kind": "tensor", "static": True},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    ),
}


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def quantized(
    target: Path,
    case: str,
    family: str = "qwen3",
    full: tuple[str, ...] = (),
    fused: bool = False,
    **overrides: Any,
) -> tuple[Path, torch.nn.Module]:
    """A checkpoint, and transformers' model with the weights that it stands for. full: parts of names of layers that
    are not quantized, beside embedding, head and routers. fused: layers that read the same input are stored as one."""
    quantize, options, config = CASES[case]
    source = tiny_model(family, **{**SIZES, **overrides})
    shutil.copytree(source, target)
    model = copy.deepcopy(hf_model(source))
    tensors: Tensors = {}
    full += ("embed_tokens", "lm_head", "mlp.gate.")
    plain = load_file(source / "model.safetensors")
    for whole, parts in FUSED.items() if fused else ():
        for first in [name for name in plain if f".{parts[0]}." in name]:
            names = [first.replace(parts[0], part) for part in parts]
            plain[first.replace(parts[0], whole)] = torch.cat([plain.pop(name) for name in names])
    for name, weight in plain.items():
        if weight.dim() < 2 or any(part in name for part in full):
            tensors[name] = weight
            continue
        stored, meant = quantize(name.removesuffix(".weight"), weight, **options)
        tensors |= stored
        for part, rows in parts_of(name, meant, model):
            set_weight(model, part, rows)
    save_file(tensors, target / "model.safetensors")
    fields = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    return target, model


def parts_of(name: str, weight: torch.Tensor, model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The layers that are stored as one, with their rows."""
    whole = name.split(".")[-2]
    names = [name.replace(whole, part) for part in FUSED.get(whole, (whole,))]
    if len(names) == 1:
        return [(name, weight)]
    sizes = [len(model.get_parameter(part)) for part in names]
    return list(zip(names, weight.split(sizes), strict=True))


def set_weight(model: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """In transformers 5 experts are stacked, gate above up."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        if ".experts." not in name:
            parameters[name.replace("self_attn.gate_proj", "self_attn.g_proj")].copy_(weight)  # LFM3's, in memory
            return
        stem, _, rest = name.partition(".experts.")
        number, part, _ = rest.split(".")
        stack = parameters[f"{stem}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][int(number)]
        begin = len(stack) // 2 if part == "up_proj" else 0
        stack[begin : begin + len(weight)].copy_(weight)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_weights(tmp_path: Path, case: str) -> None:
    path, model = quantized(tmp_path / "model", case)
    expected, plain = logits_of(model), logits_of(hf_model(tiny_model("qwen3", **SIZES)))
    assert (expected - plain).norm() / plain.norm() > 1e-3, "nothing was rounded"
    torch.testing.assert_close(engine_logits(path, PROMPT), expected, atol=1e-3, rtol=1e-3)
    kernels = engine_logits(path, PROMPT, **CPU_KERNELS)
    assert (kernels - expected).norm() / expected.norm() < 0.04, "activations are rounded to 8 bits"


def test_biases_of_zeros_are_none(tmp_path: Path) -> None:
    """AutoGPTQ stores them for layers that have no bias. Any other number would be added, and is refused."""
    path, model = quantized(tmp_path / "model", "gptq", "llama")
    file, tensors = path / "model.safetensors", load_file(path / "model.safetensors")
    sizes = {name.replace("qweight", "bias"): tensor.shape[1] for name, tensor in tensors.items() if "qweight" in name}
    save_file({**tensors, **{name: torch.zeros(size) for name, size in sizes.items()}}, file)
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)
    name = "model.layers.1.mlp.down_proj.bias"
    save_file({**tensors, name: torch.eye(sizes[name])[5]}, file)
    with pytest.raises(ConfigError, match=f"unexpected: {name}"):
        engine_logits(path, PROMPT)


STORED = ["awq", "gptq with zeros", "compressed with zeros", "fp8 of blocks", "fp8 of tensors"]


@pytest.mark.parametrize("case", [*STORED, "gptq in order of activations", "compressed, 8 bits, rows"])
def test_layers_that_are_stored_as_one(tmp_path: Path, case: str) -> None:
    """As in families whose checkpoints have `qkv_proj` and `gate_up_proj`; also on the second of two ranks."""
    path, model = quantized(tmp_path / "model", case, fused=True)
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)
    if case not in ("fp8 of blocks", "gptq in order of activations"):  # whose groups are on both ranks
        second = loaded(path, SecondOfTwo()).layers[1].self_attn.qkv_proj.matrix
        weight, sizes = model.get_submodule("model.layers.1.self_attn"), (64, 32, 32)
        parts = [getattr(weight, name).weight[size:] for name, size in zip(FUSED["qkv_proj"], sizes, strict=True)]
        torch.testing.assert_close(second.apply(torch.eye(128)).t(), torch.cat(parts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", STORED)
def test_layers_that_are_stored_as_one_and_in_full(tmp_path: Path, case: str) -> None:
    path, model = quantized(tmp_path / "model", case, full=("layers.1.self_attn", "layers.0.mlp"), fused=True)
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)


def test_one_layer_with_rows_of_nobody(tmp_path: Path) -> None:
    path, _ = quantized(tmp_path / "model", "compressed", fused=True)
    name, file = "model.layers.1.mlp.gate_up_proj.weight_scale", path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: torch.cat([tensors[name], tensors[name][:8]])}, file)
    with pytest.raises(ConfigError, match=rf"{name}: it has 520 rows, and gate_proj, up_proj have 512$"):
        engine_logits(path, PROMPT)


@pytest.mark.parametrize("case", STORED)
def test_experts_and_layers_in_full(tmp_path: Path, case: str) -> None:
    full = ("layers.1.self_attn.v_proj", "layers.2.mlp.experts.3.up_proj", "layers.2.self_attn")
    sizes = {"moe_intermediate_size": 128, "num_experts": 4}
    path, model = quantized(tmp_path / "model", case, "qwen3_moe", full, **sizes)
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)


def stacked(tensors: Tensors, name: Callable[[str, str], str], as_one: bool) -> Tensors:
    """Experts' tensors one behind the other, gate above up. name: of a stack's, by layer and what an expert has."""
    found: dict[str, dict[int, list[torch.Tensor]]] = {}
    for key in sorted(key for key in tensors if ".experts." in key):
        stem, _, rest = key.partition(".experts.")
        number, layer, what = rest.split(".")
        layer = layer if layer == "down_proj" or not as_one else "gate_up_proj"
        found.setdefault(f"{stem}.experts.{name(layer, what)}", {}).setdefault(int(number), []).append(tensors[key])
    stacks = {key: torch.stack([torch.cat(each[i]) for i in sorted(each)]) for key, each in found.items()}
    return {key: tensor for key, tensor in tensors.items() if ".experts." not in key} | stacks


NAMES: dict[str, Callable[[str, str], str]] = {
    "of transformers": lambda layer, what: layer + what.removeprefix("weight"),
    "with dots": lambda layer, what: f"{layer}.{what}",
}


@pytest.mark.parametrize("as_one", [True, False])
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("case", ["fp8 of blocks", "compressed fp8 of rows", "compressed with zeros"])
def test_stacks_of_experts(tmp_path: Path, case: str, names: str, as_one: bool) -> None:
    """As transformers has them in memory, also on the second of two ranks; some layers' are in full."""
    if names == "of transformers" and "zeros" in case:
        names = "with dots"
    full, sizes = ("layers.2.mlp.experts",), {"moe_intermediate_size": 256, "num_experts": 4}
    path, model = quantized(tmp_path / "model", case, "qwen3_moe", full, **sizes)
    one_by_one = loaded(path, SecondOfTwo()).layers[1].mlp
    file, x = path / "model.safetensors", torch.ones(3, 128)
    save_file(stacked(load_file(file), NAMES[names], as_one), file)
    assert not any("experts.0" in name for name in load_file(file))
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)
    stacks = loaded(path, SecondOfTwo()).layers[1].mlp
    norm = torch.ones(128)
    torch.testing.assert_close(stacks.forward(x.clone(), norm), one_by_one.forward(x.clone(), norm))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t[:, :1].clone(),
            r"wrong shape: .*gate_up_proj_scale_inv is \[1, 1\], not \[4, 1\] for each expert",
        ),
        (lambda t: t[:, 0, 0].clone(), r"wrong shape: .*gate_up_proj_scale_inv is \[\], not \[4, 1\] for each expert"),
        (None, r"missing: model.layers.0.mlp.experts.0.gate_up_proj.weight_scale, "),
    ],
)
def test_stacks_of_scales_that_do_not_fit(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor] | None, says: str
) -> None:
    sizes = {"moe_intermediate_size": 256, "num_experts": 4}
    path, _ = quantized(tmp_path / "model", "fp8 of blocks", "qwen3_moe", **sizes)
    file, name = path / "model.safetensors", "model.layers.0.mlp.experts.gate_up_proj_scale_inv"
    tensors = stacked(load_file(file), NAMES["of transformers"], as_one=True)
    scales = tensors.pop(name)
    save_file(tensors | ({} if change is None else {name: change(scales)}), file)
    with pytest.raises(ConfigError, match=says):
        engine_logits(path, PROMPT)


@pytest.mark.parametrize("case", ["awq", "gptq", "compressed int8", "fp8 of blocks"])
def test_biases_a_tied_head_and_sizes_that_blocks_do_not_divide(tmp_path: Path, case: str) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 320, "tie_word_embeddings": True}
    path, model = quantized(tmp_path / "model", case, "qwen2", **sizes)
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", STORED)
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next"])
def test_hybrids(tmp_path: Path, case: str, family: str) -> None:
    """Projections of delta nets are one layer for several kinds of heads, or have these side by side."""
    sizes = {"head_dim": 128, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_value_heads": 8}
    sizes |= {"num_hidden_layers": 2, "full_attention_interval": 2}
    if family == "qwen3_next":
        sizes |= {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    path, model = quantized(tmp_path / "model", case, family, ("conv1d", "shared_expert_gate"), **sizes)
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", [*STORED, "compressed int8"])
def test_a_gate_of_each_head(tmp_path: Path, case: str) -> None:
    """LFM3's gates have a row for each head, which is that of all its features where it is computed."""
    sizes = {"head_dim": 128, "num_attention_heads": 8, "hidden_size": 256}
    path, model = quantized(tmp_path / "model", case, "lfm3", ("conv.conv.",), **sizes)
    torch.testing.assert_close(engine_logits(path, PROMPT), logits_of(model), atol=1e-3, rtol=1e-3)


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight: [experts, out, in] → blocks [experts, out, in / 32, 16] and exponents [experts, out, in / 32]."""
    groups = weight.unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    values = groups / torch.exp2(exponents)[..., None]
    codes = ((values.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (values < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def with_mxfp4(target: Path) -> tuple[Path, torch.nn.Module]:
    """gpt-oss with experts of 4 bits, and what transformers makes of them."""
    source = tiny_model("gpt_oss", intermediate_size=128)
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensors.pop(name).transpose(1, 2))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    full = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    fields = json.loads((target / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": full}
    (target / "config.json").write_text(json.dumps(fields))
    kind = transformers.Mxfp4Config(dequantize=True)
    return target, transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, quantization_config=kind
    )


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    path, model = with_mxfp4(tmp_path / "model")
    expected = logits_of(model)
    torch.testing.assert_close(engine_logits(path, PROMPT), expected, atol=1e-4, rtol=1e-4)
    kernels = engine_logits(path, PROMPT, **CPU_KERNELS)
    error = ((kernels - expected).norm(dim=-1) / expected.norm(dim=-1)).median()  # a router may be undecided
    assert 1e-3 < error < 0.04, "activations are rounded to 8 bits, since weights stay in 4"
    shutil.copytree(tiny_model("gpt_oss", intermediate_size=128), tmp_path / "plain")
    save_file(
        {name: weight.contiguous() for name, weight in model.state_dict().items()},
        tmp_path / "plain" / "model.safetensors",
    )
    mine, theirs = (loaded(place, SecondOfTwo()) for place in (path, tmp_path / "plain"))
    x, norm = torch.randn(5, 64), torch.ones(64)
    for ours, plain in zip(mine.layers, theirs.layers, strict=True):
        outputs = (layer.mlp.forward(x.clone(), norm) for layer in (ours, plain))
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_bad_mxfp4_is_named(tmp_path: Path) -> None:
    path, _ = with_mxfp4(tmp_path / "model")
    name, file = "model.layers.1.mlp.experts.down_proj", path / "model.safetensors"
    of_one = name.replace("experts.", r"experts\.0\.")
    tensors = load_file(file)
    for end, tensor, says in (
        (
            "blocks",
            tensors[f"{name}_blocks"][..., :8].contiguous(),
            rf"{name}_blocks is \[64, 4, 8\], not \[64, 4, 16\] for each expert",
        ),
        ("scales", torch.full_like(tensors[f"{name}_scales"], 255), f"{of_one}_scales: it holds NaN"),
        ("scales", tensors[f"{name}_scales"].float(), f"{of_one}_scales: it is float32, not U8"),
    ):
        save_file({**tensors, f"{name}_{end}": tensor}, file)
        with pytest.raises(ConfigError, match=says):
            engine_logits(path, PROMPT)


@pytest.mark.parametrize("comm", [Communicator, lambda: SecondOfTwo()])
def test_rows_that_change_blocks(
    tmp_path: Path, comm: Callable[[], Communicator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of heads of 256 features is rotated, which brings rows of two blocks together; also as GPUs keep them,
    whose kernels have a scale for 8 rows."""
    num_merged, plainly = 0, LayerOps.packed_matrix

    def watched(ops: LayerOps, parts: Any, *options: Any) -> Matrix:
        nonlocal num_merged
        if (weight := merge(parts)) is not None:
            num_merged += 1
            assert torch.equal(weight.widen(torch.float32), torch.cat([part.dequantize() for part in parts]))
        return plainly(ops, parts, *options)

    monkeypatch.setattr(LayerOps, "packed_matrix", watched)
    sizes = {"head_dim": 256, "num_hidden_layers": 2, "full_attention_interval": 2, "num_attention_heads": 2}
    sizes |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    path, model = quantized(tmp_path / "model", "fp8 of blocks", "qwen3_5_text", ("conv1d",), **sizes)
    model.save_pretrained(tmp_path / "plain")
    x, norm = torch.randn(3, 128), torch.ones(128)
    layers = [loaded(path, comm()).layers[1].self_attn for path in (path, tmp_path / "plain")]
    outputs = [layer.qkv_proj.project(x, norm, 1e-6) for layer in layers if isinstance(layer, Attention)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)
    assert num_merged > 2


class SecondOfTwo(Communicator):
    """Rank 1 of 2, whose sums are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, 2


@pytest.mark.parametrize("case", [case for case in CASES if "in order" not in case])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_rank_s_share(tmp_path: Path, case: str, family: str) -> None:
    """Rank 1 of 2 computes what it does with the weights that the checkpoint stands for."""
    sizes = {"head_dim": 128, "intermediate_size": 512, "moe_intermediate_size": 256, "vocab_size": 255}
    packed, model = quantized(tmp_path / "model", case, family, **sizes)
    model.save_pretrained(tmp_path / "plain")
    mine, theirs = (loaded(path, SecondOfTwo()) for path in (packed, tmp_path / "plain"))
    x, norm = torch.randn(3, 128), torch.ones(128)
    torch.testing.assert_close(mine.lm_head.logits(x, norm, 1e-6), theirs.lm_head.logits(x, norm, 1e-6))
    for ours, plain in zip(mine.layers, theirs.layers, strict=True):
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(ours.mlp.forward(x.clone(), norm), plain.mlp.forward(x.clone(), norm), **close)
        outputs = (layer.self_attn.qkv_proj.project(x, norm, 1e-6) for layer in (ours, plain))
        torch.testing.assert_close(*outputs, **close)
        heads = torch.randn(3, 256)
        outputs = (layer.self_attn.o_proj.forward(heads, x.clone()) for layer in (ours, plain))
        torch.testing.assert_close(*outputs, **close)


def loaded(path: Path, comm: Communicator) -> DecoderModel:
    config, checkpoint, device = engine_config(path), Checkpoint(path), torch.device("cpu")
    form = create_format(config, device, checkpoint.header())
    with torch.inference_mode():
        model = DecoderModel(LayerEnv(comm, TorchOps(), torch.float32, device, form), config.model)
        load_weights(model.parts(), checkpoint)
    return model


NAME = "model.layers.1.mlp.down_proj"


def without(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{NAME}.{end}"}


def changed(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, f"{NAME}.{end}": change(tensors[f"{NAME}.{end}"])}


def spoiled(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("awq", without("scales"), rf"missing: {NAME}.scales"),
        ("gptq", without("qweight"), rf"missing: {NAME}.qweight"),
        ("fp8 of blocks", without("weight_scale_inv"), rf"missing: {NAME}.weight_scale"),
        ("compressed", without("weight_scale"), rf"missing: {NAME}.weight_scale"),
        ("awq", changed("scales", spoiled), rf"{NAME}.scales: it holds NaN"),
        ("fp8 of blocks", changed("weight_scale_inv", spoiled), rf"{NAME}.weight_scale_inv: it holds NaN"),
        ("fp8 of tensors", changed("input_scale", spoiled), rf"{NAME}.input_scale: it holds NaN"),
        (
            "awq",
            changed("qzeros", lambda t: t[:-1].clone()),
            rf"wrong shape: {NAME}.qzeros is \[7, 16\], not \[8, 16\]",
        ),
        ("awq", changed("qweight", lambda t: t.long()), rf"{NAME}.qweight: it is I64, not I32"),
        ("gptq", changed("scales", lambda t: t.int()), rf"{NAME}.scales: it is I32, and scales are floats"),
        ("gptq", changed("g_idx", lambda t: t * 0), rf"{NAME}.g_idx: the columns here are not in 8 groups of 32"),
        (
            "fp8 of blocks",
            changed("weight", lambda t: t.to(torch.float8_e5m2)),
            rf"{NAME}.weight: it is F8_E5M2, not F8",
        ),
        ("fp8 of blocks", changed("weight_scale_inv", lambda t: t[:, :1].clone()), r"_inv is \[1, 1\], not \[1, 2\]"),
    ],
)
def test_bad_tensors_are_named(
    tmp_path: Path, case: str, change: Callable[[Tensors], Tensors], says: str
) -> None:  # fmt: skip
    path, _ = quantized(tmp_path / "model", case)
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ConfigError, match=says) as caught:
        engine_logits(path, PROMPT)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "sizes", "says"),
    [
        (
            "awq",
            {"intermediate_size": 192, "group": 128},
            r"down_proj.qweight: groups of 128 do not divide its 192 col",
        ),
        (
            "awq",
            {"intermediate_size": 192},
            r"down_proj.qweight: tensor parallelism would cut its 192 columns .* of 64",
        ),
        (
            "fp8 of blocks",
            {"intermediate_size": 384},
            r"gate_proj.weight_scale_inv: \[192, 384\) of 384, a rank's or a part's, cuts blocks of 128",
        ),
        ("gptq in order of activations", {}, r"g_idx: .*; with act-order, --tensor-parallel-size must be 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(tmp_path: Path, case: str, sizes: dict[str, int], says: str) -> None:
    sizes = dict(sizes)
    group = sizes.pop("group", 64)
    path, _ = quantized(tmp_path / "model", case, **sizes)
    if case == "awq":
        with_group(path, group)
    with pytest.raises(ConfigError, match=says) as caught:
        loaded(path, SecondOfTwo())
    assert "\n" not in str(caught.value)


def with_group(path: Path, group: int) -> None:
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"]["group_size"] = group
    (path / "config.json").write_text(json.dumps(fields))
