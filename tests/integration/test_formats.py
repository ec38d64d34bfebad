"""Formats of weights, and who says whether the CPU engine can compute whole steps of a layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minisgl.config.model import MoE
from minisgl.distributed.comm import Communicator
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.ops import LayerOps, Matrix, TorchOps
from minisgl.layers.base import LayerEnv
from minisgl.layers.formats import FORMATS, Dense, Shard, Tensors, WeightFormat, WeightSlot
from minisgl.layers.linear import RowLinear
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderLayer, DecoderModel
from tests.driver import engine_config
from tests.models import tiny_model

CPU = torch.device("cpu")


class Scaled(Dense):
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


def loaded(family: str, weight_format: WeightFormat, ops: LayerOps | None = None) -> DecoderModel:
    path = tiny_model(family)
    env = LayerEnv(Communicator(), ops or TorchOps(), torch.float32, CPU, weight_format)
    with torch.inference_mode():
        model = DecoderModel(env, engine_config(path).model)
        load_weights(model.parts(), Checkpoint(path), show_progress=False)
    return model


def test_a_format_with_several_tensors_that_are_transformed() -> None:
    plain, scaled = (loaded("llama", form).lm_head for form in (FORMATS[None], Scaled()))
    x, norm = torch.randn(3, 64), torch.ones(64)
    torch.testing.assert_close(scaled.logits(x, norm, 1e-6), plain.logits(x, norm, 1e-6))


@pytest.mark.parametrize("name", FORMATS)
def test_the_cpu_s_kernels_compute_what_the_reference_does(name: str | None) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 8
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    ours, reference = (FORMATS[name].matrix(ops, {"weight": weight}, "silu") for ops in (CpuOps(1), TorchOps()))
    torch.testing.assert_close(ours.gate_up(x), reference.gate_up(x), atol=1e-3, rtol=1e-3)
    stacks = {"weight": torch.stack((weight, -weight, weight / 2))}, {"weight": torch.ones(3, 64, 24) / 24}
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(5, -1)
    ours, reference = (
        FORMATS[name].experts(ops, *stacks, MoE(3, 2, 24, "softmax_of_chosen"))(x, logits)
        for ops in (CpuOps(1), TorchOps())
    )
    torch.testing.assert_close(ours, reference, atol=1e-3, rtol=1e-3)


class Doubling(RowLinear):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x, residual)


class Renamed(DecoderLayer):
    """Computes what its base does."""


class Sandwich(DecoderLayer):
    def forward(self, *args: object) -> torch.Tensor:
        return super().forward(*args).neg()  # type: ignore[arg-type]


def test_each_layer_says_whether_the_cpu_engine_can_run_it() -> None:
    dense, moe = (loaded(family, FORMATS[None], CpuOps(1)) for family in ("qwen3", "qwen3_moe"))
    specs = dense.cpu_specs()
    assert specs is not None
    assert [len(spec.matrices) for spec in specs] == [1, *(4 for _ in dense.layers), 1]
    assert moe.cpu_specs() is None
    assert loaded("qwen3", FORMATS[None]).cpu_specs() is None, "torch's matrices"
    layer = dense.layers[0]
    for kind, can in ((Renamed, True), (Sandwich, False)):
        layer.__class__ = kind
        assert (layer.cpu_spec() is not None) == can
        assert (dense.cpu_specs() is not None) == can
    layer.__class__ = DecoderLayer
    assert isinstance(layer, DecoderLayer)
    layer.self_attn.o_proj.__class__ = Doubling
    assert layer.cpu_spec() is None
