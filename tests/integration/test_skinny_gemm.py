"""The fused linear layers of a few tokens against fp32 references, in every variant of the kernel."""

from __future__ import annotations

import pytest
import torch

from benchmark.kernels.skinny_gemm import variants
from minisgl.kernel import skinny
from minisgl.kernel.ops import Around

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # compiles
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16]
# m, n, k: fewer octets than SMs, ragged ranges of them, several groups of them; k that leaves warps without work.
SHAPES = [
    (1, 1024, 3072), (3, 4096, 1024), (8, 152, 32), (7, 5120, 416), (16, 1024, 2048), (13, 7168, 512), (32, 20000, 96)
]  # fmt: skip


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def layer(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, norm weight and weight; the stream is idle afterwards, since the kernels read weights early."""
    x = random(m, k, dtype=dtype)
    gain = 1 + random(k, dtype=dtype, scale=0.2)
    weight = random(n, k, dtype=dtype, scale=k**-0.5)
    torch.cuda.synchronize()
    return x, gain, weight


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain.float()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error < 1e-2, f"relative error {error.item():.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "variant"), [(*s, v) for s in SHAPES for v in variants(s[0], False)])
def test_matches_the_reference(m: int, n: int, k: int, dtype: torch.dtype, variant: int) -> None:
    x, gain, weight = layer(m, n, k, dtype)
    bias = random(n, dtype=dtype, seed=1)
    residual = random(m, n, dtype=dtype, seed=2)
    torch.cuda.synchronize()
    assert_close(skinny.linear(x, weight, Around(), variant=variant), x.float() @ weight.float().T)
    expected = normed(x, gain) @ weight.float().T
    assert_close(skinny.linear(x, weight, Around(bias, gain, EPS), variant=variant), expected + bias.float())
    expected = residual.float() + x.float() @ weight.float().T + bias.float()
    assert skinny.linear(x, weight, Around(bias, residual=residual), variant=variant) is residual
    assert_close(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "variant"), [(*s, v) for s in SHAPES for v in variants(s[0], True)])
def test_gate_up_matches_the_reference(m: int, n: int, k: int, dtype: torch.dtype, variant: int) -> None:
    x, gain, weight = layer(m, 2 * n, k, dtype)
    gate, up = (normed(x, gain) @ weight.float().T).chunk(2, dim=-1)
    assert_close(
        skinny.linear(x, weight, Around(norm=gain, eps=EPS, gated=True), variant=variant),
        torch.nn.functional.silu(gate) * up,
    )


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (1024, 3072), (7168, 5120), (5120, 6400), (2560, 5120)])
def test_the_chosen_variant_matches_the_reference(m: int, n: int, k: int) -> None:
    x, gain, weight = layer(m, n, k, torch.bfloat16)
    assert skinny.supports(m, n, k, x.dtype)
    out = skinny.linear(x, weight, Around(norm=gain, eps=EPS))
    assert_close(out, normed(x, gain) @ weight.float().T)
    assert torch.equal(skinny.linear(x, weight, Around(norm=gain, eps=EPS, apart=True)), out)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, gain, weight = layer(8, 4096, 1024, torch.bfloat16)
    around = Around(norm=gain, eps=EPS)
    whole = skinny.linear(x, weight, around, variant=2)
    alone = torch.cat([skinny.linear(x[i : i + 1], weight, around, variant=2) for i in range(8)])
    assert torch.equal(whole, alone)


def test_rows_may_be_strided() -> None:
    wide, _, weight = layer(5, 1024, 2048, torch.bfloat16)
    x = wide[:, 512:1024]
    weight = weight[:, :512].contiguous()
    torch.cuda.synchronize()
    assert_close(skinny.linear(x, weight, Around()), x.float() @ weight.float().T)


def test_an_infinite_activation_stays_visible() -> None:
    x, gain, weight = layer(2, 1024, 1024, torch.float16)
    x[1, 3] = torch.inf
    out = skinny.linear(x, weight, Around(norm=gain, eps=EPS))
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_a_chain_in_a_graph_repeats_exactly() -> None:
    """The kernels overlap: each must wait for the one before, also in replays back to back."""
    x, gain, weight = layer(4, 4096, 1024, torch.bfloat16)
    down = random(1024, 2048, dtype=x.dtype, scale=0.02, seed=3)
    residual = x.clone()

    def chain() -> None:
        torch.mul(x, 1, out=residual)  # a kernel: a copy would be a memcpy node, ahead of a programmatic launch
        for _ in range(8):
            hidden = skinny.linear(residual, weight, Around(norm=gain, eps=EPS))
            skinny.linear(hidden[:, :2048], down, Around(residual=residual))
            hidden = skinny.linear(residual, weight, Around(norm=gain, eps=EPS, gated=True))
            skinny.linear(hidden, down, Around(residual=residual))

    chain()
    torch.cuda.synchronize()
    expected = residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert expected.isfinite().all()
    assert torch.equal(residual, expected)


def test_unsupported_shapes_are_named() -> None:
    assert not skinny.supports(33, 1024, 1024, torch.bfloat16)
    assert not skinny.supports(1, 1020, 1024, torch.bfloat16)
    assert not skinny.supports(1, 1024, 1000, torch.bfloat16)
    assert not skinny.supports(1, 1024, 1024, torch.float32)
    assert not skinny.supports(1, 1024, 17408, torch.bfloat16, norm=True)
