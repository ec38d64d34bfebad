"""Linear layers of decode batches against torch in float32: every form, shared and unshared tiles, any token count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.triton_cpu import DEVICE, INTERPRET, MARKS, needs_gpu

pytestmark = MARKS
linear = pytest.importorskip("minisgl.kernel.triton.linear")

EPS = 1e-6
DTYPE = torch.float32 if INTERPRET else torch.bfloat16
Config = linear.Config
CONFIGS = [
    Config(32, 64, 64, 4, 3),
    Config(32, 64, 64, 4, 3, programs=5),
    Config(64, 64, 64, 4, 3, programs=7, swap=False),
    Config(128, 64, 64, 8, 3, programs=11, tma=False),
    Config(64, 128, 64, 8, 3, programs=2),
]
SHAPES = [(17, 160, 256), (100, 208, 512)] if INTERPRET else [(17, 160, 512), (129, 1040, 2048), (256, 4096, 1024)]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not INTERPRET and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the tiles are for Hopper")


def data(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x in a wider tensor, weight, norm's weight."""
    torch.manual_seed(m + n + k)
    wide = torch.randn(m, k + 64, device=DEVICE).to(DTYPE)
    weight = (torch.randn(n, k, device=DEVICE) * k**-0.5).to(DTYPE)
    return wide[:, :k], weight, (1 + 0.2 * torch.randn(k, device=DEVICE)).to(DTYPE)


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * gain.float()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == DTYPE
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if INTERPRET else 1e-2)
    assert not linear._workspace(actual.device)[2].any(), "the counters must be zero again"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_linear(shape: tuple[int, int, int], config: object, norm: bool) -> None:
    x, weight, gain = data(*shape)
    bias = torch.randn(shape[1], device=DEVICE).to(DTYPE)
    expected = F.linear(normed(x, gain) if norm else x.float(), weight.float(), bias.float())
    close(linear.linear(x, weight, bias, gain if norm else None, EPS, config), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_add(shape: tuple[int, int, int], config: object) -> None:
    x, weight, _ = data(*shape)
    residual = torch.randn(shape[0], shape[1], device=DEVICE).to(DTYPE)
    expected = residual.float() + x.float() @ weight.float().T
    assert linear.linear_add(x, weight, residual, config=config) is residual
    close(residual, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_gate_up(shape: tuple[int, int, int], config: object, norm: bool) -> None:
    m, n, k = shape
    x, weight, gain = data(m, 2 * n, k)
    gate, up = F.linear(normed(x, gain) if norm else x.float(), weight.float()).chunk(2, dim=-1)
    close(linear.gate_up(x, weight, gain if norm else None, EPS, config), F.silu(gate) * up)


@needs_gpu
def test_repeats_and_graphs_agree_to_the_bit() -> None:
    """Sums are in a fixed order; calls in flight one after another share the workspace."""
    x, weight, gain = data(100, 4096, 1024)
    config = Config(128, 128, 64, 8, 3, programs=132)
    first = linear.linear(x, weight, None, gain, EPS, config)
    linear.prepare(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [linear.linear(x, weight, None, gain, EPS, config) for _ in range(10)]
    for _ in range(5):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, first) for out in outs)
