"""Formats of weights, and who says whether the CPU engine can compute whole steps of a layer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from math import nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisgl.config.model import MoE
from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.formats.base import DENSE, Int8, Rounded, Shard, Tensors, WeightFormat, WeightSlot
from minisgl.kernel import skinny
from minisgl.kernel.activations import ACTIVATIONS
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.cuda import CudaMatrix
from minisgl.kernel.ops import Around, LayerOps, Matrix, TorchOps
from minisgl.layers.base import LayerEnv
from minisgl.layers.linear import RowLinear
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderLayer, DecoderModel
from tests.driver import engine_config
from tests.models import FAMILIES, tiny_model

CPU = torch.device("cpu")
FORMATS = {"dense": DENSE, "int8": Int8()}


class Scaled(WeightFormat):
    """Two tensors for one weight: its rows in reverse order, and twice what they are multiplied with. The second is
    read from the same tensor of the checkpoint."""

    def create(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
        return {**super().create(shape, dtype, device), "scale": torch.empty(shape[:-1])}

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        rows = slice(shard.at, shard.at + shard.rows[1] - shard.rows[0])
        name, where = f"{prefix}weight", (shard.rows, shard.cols)
        yield WeightSlot(name, shard.shape, tensors["weight"][rows], *where, lambda part: part.flip(0))
        yield WeightSlot(name, shard.shape, tensors["scale"][rows], *where, lambda part: part.abs().amax(1).mul(2))

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        scale = tensors["scale"].flip(0)[:, None] / 2
        return ops.matrix((tensors["weight"] / scale * scale).flip(0), activation)


def loaded(
    family: str | Path, weight_format: WeightFormat, ops: LayerOps | None = None, comm: Communicator | None = None
) -> DecoderModel:
    path = tiny_model(family) if isinstance(family, str) else family
    env = LayerEnv(comm or Communicator(), ops or TorchOps(), torch.float32, CPU, weight_format)
    with torch.inference_mode():
        model = DecoderModel(env, engine_config(path).model)
        load_weights(model.parts(), Checkpoint(path, model.config))
    return model


def test_a_format_with_several_tensors_that_are_transformed() -> None:
    plain, scaled = (loaded("llama", form).lm_head for form in (DENSE, Scaled()))
    x, norm = torch.randn(3, 64), torch.ones(64)
    torch.testing.assert_close(scaled.logits(x, norm, 1e-6), plain.logits(x, norm, 1e-6))


@pytest.mark.parametrize("name", FORMATS)
def test_the_cpu_s_kernels_compute_what_the_reference_does(name: str | None) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 8
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    ours, reference = (FORMATS[name].matrix(ops, {"weight": weight}, "silu") for ops in (CpuOps(1), TorchOps()))
    torch.testing.assert_close(
        ours.apply(x, Around(gated=True)), reference.apply(x, Around(gated=True)), atol=1e-3, rtol=1e-3
    )
    stacks = {"weight": torch.stack((weight, -weight, weight / 2))}, {"weight": torch.ones(3, 64, 24) / 24}
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(5, -1)
    ours, reference = (
        FORMATS[name].experts(ops, *stacks, MoE(3, 2, 24, True))(x, logits) for ops in (CpuOps(1), TorchOps())
    )
    torch.testing.assert_close(ours, reference, atol=1e-3, rtol=1e-3)


class Packed(WeightFormat):
    """Integers, and a scale for each row."""

    def create(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensors:
        return {"values": torch.empty(shape, dtype=torch.int8), "scales": torch.empty(*shape[:-1], 1)}

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        values, scales = (shard.of(tensors[name]) for name in ("values", "scales"))
        yield WeightSlot(f"{prefix}qweight", shard.shape, values, shard.rows, shard.cols)
        yield WeightSlot(f"{prefix}scales", (shard.shape[0], 1), scales, shard.rows)

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        return ops.matrix(tensors["values"] * tensors["scales"], activation)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_checkpoint_of_integers_and_scales(tmp_path: Path, family: str) -> None:
    """Rank 1 of 2 reads its part of them, of experts too; without the format the checkpoint is refused."""
    source = tiny_model(family)
    packed, plain = (shutil.copytree(source, tmp_path / name) for name in ("packed", "plain"))
    tensors: dict[str, dict[str, torch.Tensor]] = {"packed": {}, "plain": {}}
    for name, weight in load_file(source / "model.safetensors").items():
        kept, stem = weight, name.removesuffix(".weight")
        if weight.dim() == 2 and not name.endswith("mlp.gate.weight"):  # a router is never quantized
            scale = weight.abs().amax(1, keepdim=True) / 127
            values = (weight / scale).round()
            tensors["packed"] |= {f"{stem}.qweight": values.to(torch.int8), f"{stem}.scales": scale}
            kept = values * scale
        else:
            tensors["packed"][name] = weight
        tensors["plain"][name] = kept
    for name, directory in (("packed", packed), ("plain", plain)):
        save_file(tensors[name], directory / "model.safetensors")
    ours, expected = (loaded(path, form, comm=SecondOfTwo()) for path, form in ((packed, Packed()), (plain, DENSE)))
    for mine, theirs in zip(ours.layers, expected.layers, strict=True):
        x, norm = torch.randn(3, 64), torch.ones(64)
        torch.testing.assert_close(mine.mlp.forward(x.clone(), norm), theirs.mlp.forward(x.clone(), norm))
        outputs = (layer.self_attn.qkv_proj.project(x, norm, 1e-6) for layer in (mine, theirs))
        torch.testing.assert_close(*outputs)
    with pytest.raises(ConfigError, match=r"are quantized \(.*qweight is "):
        loaded(packed, DENSE)


class SecondOfTwo(Communicator):
    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, 2


class Doubling(RowLinear):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x, residual)


class Renamed(DecoderLayer):
    """Computes what its base does."""


class Sandwich(DecoderLayer):
    def forward(self, *args: object) -> torch.Tensor:
        return super().forward(*args).neg()  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_computed_in_whole_steps_but_for_those_named(family: str) -> None:
    """Those with experts, with queries that are scaled by position, and Gemma 4."""
    config = engine_config(tiny_model(family)).model
    is_other = config.layer_scalars or any(rope.query_beta for rope in config.ropes)
    is_other |= any(isinstance(layer.mlp, MoE) for layer in config.layers)
    assert (loaded(family, DENSE, CpuOps(1)).cpu_specs() is None) == is_other


def test_each_layer_says_whether_the_cpu_engine_can_run_it() -> None:
    dense, moe = (loaded(family, DENSE, CpuOps(1)) for family in ("qwen3", "qwen3_moe"))
    specs = dense.cpu_specs()
    assert specs is not None
    kinds = [[(block.kind, len(block.matrices)) for block in spec.blocks] for spec in specs]
    assert kinds == [[], *([("attention", 2), ("mlp", 2)] for _ in dense.layers), []]
    assert moe.cpu_specs() is None
    assert loaded("qwen3", DENSE).cpu_specs() is None, "torch's matrices"
    layer = dense.layers[0]
    for kind, can in ((Renamed, True), (Sandwich, False)):
        layer.__class__ = kind
        assert (layer.cpu_spec() is not None) == can
        assert (dense.cpu_specs() is not None) == can
    layer.__class__ = DecoderLayer
    assert isinstance(layer, DecoderLayer)
    layer.self_attn.o_proj.__class__ = Doubling
    assert layer.cpu_spec() is None


def test_weights_rounded_to_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has a scale of its own: what is small in it is as near as what is large."""
    weight = torch.randn(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    weight[3] = 0
    device = torch.device("cpu")
    matrix = Rounded(device, device).matrix(TorchOps(), {"weight": weight.clone()})
    values = matrix.apply(torch.eye(64)).T
    monkeypatch.setattr(Rounded, "_ROWS_BYTES", 1000)
    few_at_a_time = Rounded(device, device).matrix(TorchOps(), {"weight": weight.clone()})
    torch.testing.assert_close(few_at_a_time.apply(torch.eye(64)).T, values, atol=0, rtol=0)
    largest = weight.abs().amax(1, keepdim=True)
    assert ((values - weight).abs() <= weight.abs() / 15.9 + largest / 448 * 2**-10).all()
    assert not torch.equal(values, weight)


@pytest.mark.parametrize("activation", ["gelu_tanh", "clamped_swiglu"])
def test_cuda_kernels_that_know_silu_alone_are_not_asked_for_others(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if on a GPU whose kernels take every shape."""
    monkeypatch.setattr(skinny, "takes", lambda *_, **__: True)
    monkeypatch.setattr(skinny, "linear", lambda x, w, around: (x @ w.T) if not around.gated else x * nan)
    ops, x, weight, norm = TorchOps(), torch.randn(3, 32), torch.randn(48, 32), torch.rand(32)
    matrix = CudaMatrix(ops, weight, activation)  # type: ignore[arg-type]
    expected = ACTIVATIONS[activation](*(ops.rms_norm(x, norm, 1e-6) @ weight.T).chunk(2, -1))
    torch.testing.assert_close(matrix.apply(x, Around(None, norm, 1e-6, gated=True)), expected, atol=1e-5, rtol=1e-5)
    assert CudaMatrix(ops, weight, "silu").apply(x, Around(gated=True)).isnan().all()  # type: ignore[arg-type]
