"""The linear layers of decode batches against fp32 references, in every variant of the kernel."""

from __future__ import annotations

import pytest
import torch

from benchmark.kernels.decode_gemm import fits
from minisgl.kernel import decode_gemm
from minisgl.kernel.decode_gemm import Variant
from minisgl.kernel.ops import Around

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # compiles
    pytest.mark.skipif(
        not torch.cuda.is_available() or not decode_gemm.is_available(torch.device("cuda")), reason="needs Hopper"
    ),
]

# m, n, k: one tile and part of one; tiles that a stream-K block shares with one or several others.
SHAPES = [(17, 64, 128), (33, 176, 512), (64, 1024, 2048), (100, 4096, 1024), (129, 2000, 640), (180, 2000, 640),
          (200, 9008, 192), (256, 20480, 320)]  # fmt: skip
VARIANTS = [Variant(r, s) for r in (64, 128, 192) for s in (0, 1, 2, 3, 8)]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error < 1e-2, f"relative error {error.item():.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
class TestAgainstTheReference:
    pytestmark = on_gpu

    def test_linear(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        x, weight = random(m, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5)
        bias, residual = random(n, dtype=dtype, seed=1), random(m, n, dtype=dtype, seed=2)
        product = x.float() @ weight.float().T
        torch.cuda.synchronize()
        for variant in [None, *(v for v in VARIANTS if fits(v, m, k))]:
            assert_close(decode_gemm.linear(x, weight, Around(), variant), product)
            assert_close(decode_gemm.linear(x, weight, Around(bias), variant), product + bias.float())
            target = residual.clone()
            assert decode_gemm.linear(x, weight, Around(bias, residual=target), variant) is target
            assert_close(target, residual.float() + product + bias.float())

    def test_gate_up(self, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        x, weight = random(m, k, dtype=dtype), random(2 * n, k, dtype=dtype, scale=k**-0.5)
        gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
        torch.cuda.synchronize()
        for variant in [None, *(v for v in VARIANTS if fits(v, m, k))]:
            assert_close(decode_gemm.linear(x, weight, Around(gated=True), variant), expected)


class TestOnStreams:
    pytestmark = on_gpu

    def test_rows_may_be_strided(self) -> None:
        wide, weight = random(50, 2048), random(1024, 512, scale=0.05)
        torch.cuda.synchronize()
        x = wide[:, 512:1024]
        assert_close(decode_gemm.linear(x, weight, Around()), x.float() @ weight.float().T)

    @pytest.mark.parametrize("m", [40, 256])
    @pytest.mark.parametrize("split", [0, 1, 4])
    def test_a_chain_in_a_graph_repeats_exactly(self, m: int, split: int) -> None:
        """The kernels overlap and share a workspace: each must wait for the one before."""
        x, up, down = random(m, 1024), random(6144, 1024, scale=0.03), random(1024, 3072, scale=0.02, seed=3)
        residual = x.clone()
        variant = Variant(128, split)

        def chain() -> None:
            torch.mul(x, 1, out=residual)  # a kernel: a copy would be a memcpy node, ahead of a programmatic launch
            for _ in range(8):
                hidden = decode_gemm.linear(residual, up, Around(gated=True), variant)
                decode_gemm.linear(hidden, down, Around(residual=residual), variant)

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
    assert not decode_gemm.supports(257, 1024, 1024, torch.bfloat16)
    assert not decode_gemm.supports(32, 1032, 1024, torch.bfloat16)
    assert not decode_gemm.supports(32, 1024, 1000, torch.bfloat16)
    assert not decode_gemm.supports(32, 1024, 1024, torch.float32)


@pytest.mark.parametrize("m", [17, 64, 100, 150, 180, 220, 256])
def test_the_chosen_variant_exists(m: int) -> None:
    for n, k, gated in [
        (4096, 1024, False),
        (1024, 2048, False),
        (17408, 5120, True),
        (151936, 5120, False),
        (1024, 3072, False),
    ]:
        variant = decode_gemm.choose(m, n, k, gated)
        assert variant is None or fits(variant, m, k)
    both = decode_gemm.choose(m, 2880, 4096, False, adds_both=True)
    assert (both is not None) == (m <= 160)  # a bias besides the residual stream: cuBLAS would need a second kernel
    assert both is None or fits(both, m, 4096)
    for n in range(16, 3000, 272):
        variant = decode_gemm.choose(m, n, 64, False)
        assert variant is None or fits(variant, m, 64)
