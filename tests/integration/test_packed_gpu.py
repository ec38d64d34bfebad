"""Products of weights of 4 bits on GPUs against float32 ones of the values that the weights stand for. Without a GPU,
what kernels read is decoded as tensor cores' lanes would, and multiplied by torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from minisgl.kernel import cuda, decode_gemm, packed_gemm
from minisgl.kernel.cuda import CudaOps
from minisgl.kernel.ops import Around, Matrix, TorchOps
from minisgl.kernel.packed import Blocks, Grouped, Packed

Tensor = torch.Tensor
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # compiles
    pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"),
]
SHAPES = (7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408), (5120, 25600)
TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 128, 129, 256, 1000)


def grouped(
    num_out: int, num_in: int, group: int = 128, zeros: bool = True, order: bool = False, seed: int = 0
) -> Grouped:
    """group: 0: whole rows."""
    generator = torch.Generator().manual_seed(seed + num_out + num_in)
    shape = num_out, num_in // (group or num_in)
    return Grouped(
        torch.randint(0, 256, (num_out, num_in // 2), generator=generator, dtype=torch.uint8),
        (torch.rand(shape, generator=generator) * 0.01 + 0.001).half(),
        torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8) if zeros else None,
        columns=torch.randperm(num_in, generator=torch.Generator().manual_seed(5)) if order else None,
    )


def blocks(kind: str, num_out: int, num_in: int) -> Blocks:
    generator = np.random.default_rng(num_out)
    if kind != "Q4_K":
        values = generator.standard_normal((num_out, num_in), dtype=np.float32)
        return Blocks(kind, torch.from_numpy(quantize(values, GGMLQuantizationType[kind])), num_in)
    data = generator.integers(0, 256, (num_out, num_in // 256, 144), dtype=np.uint8)
    factors = generator.random((num_out, num_in // 256, 2)) * 2e-4  # of scales and minima, of up to 63
    data[..., :4] = factors.astype(np.float16).view(np.uint8)
    return Blocks(kind, torch.from_numpy(data.reshape(num_out, -1)), num_in)


def moved(part: Packed, device: str) -> Packed:
    if isinstance(part, Blocks):
        return Blocks(part.kind, part.data.to(device), part.num_in)
    assert isinstance(part, Grouped)
    tensors = [t if t is None else t.to(device) for t in (part.codes, part.scales, part.zeros, part.columns)]
    assert tensors[0] is not None and tensors[1] is not None
    return Grouped(tensors[0], tensors[1], tensors[2], part.bits, tensors[3])


MAKERS: dict[str, Callable[[int, int], Packed]] = {
    "128": grouped,
    "64": partial(grouped, group=64),
    "32": partial(grouped, group=32),
    "rows": partial(grouped, group=0),
    "symmetric": partial(grouped, zeros=False),
    "act-order": partial(grouped, order=True),
    **{kind: partial(blocks, kind) for kind in ("Q4_0", "Q4_1", "Q4_K")},
}


def assert_close(actual: Tensor, expected: Tensor, limit: float = 1e-2) -> None:
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error < limit, f"relative error {error.item():.3g}"


def random(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def check(matrix: Matrix, weight: Tensor, m: int, dtype: torch.dtype) -> None:
    """weight: float32, what the matrix stands for."""
    device, (n, k) = str(weight.device), weight.shape
    x, residual = random(m, k, device=device, dtype=dtype), random(m, n, device=device, dtype=dtype, seed=1)
    bias, gains = random(n, device=device, dtype=dtype, seed=2), 1 + random(k, device=device, dtype=dtype, seed=3) / 4
    product = x.float() @ weight.T
    normed = TorchOps().rms_norm(x.float(), gains.float(), 1e-6) @ weight.T
    assert_close(matrix.apply(x), product)
    assert_close(matrix.apply(x, Around(bias)), product + bias.float())
    assert_close(matrix.apply(x, Around(bias, gains, 1e-6)), normed + bias.float())
    target = residual.clone()
    assert matrix.apply(x, Around(bias, residual=target)) is target
    assert_close(target, product + bias.float() + residual.float())


def check_gated(matrix: Matrix, weight: Tensor, m: int, dtype: torch.dtype) -> None:
    device, (n, k) = str(weight.device), weight.shape
    x, bias = random(m, k, device=device, dtype=dtype), random(n, device=device, dtype=dtype, seed=2)
    gains = 1 + random(k, device=device, dtype=dtype, seed=3) / 4
    normed = TorchOps().rms_norm(x.float(), gains.float(), 1e-6) @ weight.T
    for product, actual in [
        (x.float() @ weight.T, matrix.apply(x, Around(gated=True))),
        (normed, matrix.apply(x, Around(None, gains, 1e-6, gated=True))),
        (normed + bias.float(), matrix.apply(x, Around(bias, gains, 1e-6, gated=True))),
    ]:
        gate, up = product.chunk(2, -1)
        assert_close(actual, torch.nn.functional.silu(gate) * up, 2e-2)
    assert_close(matrix.apply(x, Around(bias)), x.float() @ weight.T + bias.float())


def check_rows(matrix: Matrix, weight: Tensor) -> None:
    n = len(weight)
    ids = (torch.arange(300, device=weight.device) * 7) % (n + 20) + 90  # of rows [100, 100 + n), and of others
    here = (ids >= 100) & (ids < 100 + n)
    expected = weight[(ids - 100).clamp(0, n - 1)] * here[:, None]
    assert_close(matrix.rows(ids, 100), expected, 5e-3)


@dataclass(frozen=True)
class Lanes:
    """The kernels of one kind, in torch."""

    fp16: bool
    group: int
    minima: bool

    def values(self, weight: Tensor, unit: float) -> Tensor:
        """Each lane's fragments of mma.m16n8k16 → [rows, k]."""
        tiles, units, _ = weight.shape
        out = torch.empty(tiles, units, 2, 8, 128)
        words = weight[..., :1024].contiguous().view(torch.int32).view(tiles, units, 2, 8, 4, 4).long()
        params = weight[..., 1024:].contiguous().view(tiles, units, 2, 128 // self.group, 8, 4)
        scale = params[..., :2].contiguous().view(torch.float16).float()[..., 0]
        dtype = torch.float16 if self.fp16 or self.minima else torch.bfloat16
        second = params[..., 2:].contiguous().view(dtype).float()[..., 0]
        quad = torch.arange(4)
        for i in range(64):  # fragment register and half of it, of each 16 k
            step, register, half = i // 8, i // 2 % 4, i % 2
            octet, pair = register % 2, step % 2 * 2 + register // 2
            code = words[:, :, octet, :, :, step // 2] >> (4 * pair + 16 * half) & 15
            k = step * 16 + register // 2 * 8 + quad * 2 + half
            factor, extra = (t[:, :, octet, step * 16 // self.group, :, None] for t in (scale, second))
            zero, offset = (8.0, extra) if self.minima else (extra - (1024 if self.fp16 else 128), 0.0)
            out[:, :, octet][..., k] = unit * (factor * (code - zero) + offset)
        return out.flatten(2, 3).transpose(1, 2).reshape(tiles * 16, -1)

    def dequantize(self, weight: Tensor, unit: float, out: Tensor, gated: bool) -> None:
        values = self.values(weight, unit)[:, : out.shape[1]]
        out.copy_(values.view(-1, 2, 8, out.shape[1]).transpose(0, 1).reshape(out.shape) if gated else values)

    def packed_linear(
        self, x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, unit: float, bias: Tensor | None, out: Tensor,
        partials: Tensor, flags: Tensor, add: bool, gated: bool, variant: int,
    ) -> None:  # fmt: skip
        wide = x.float() if norm is None else TorchOps().rms_norm(x.float(), norm.float(), eps)
        y = wide @ self.values(weight, unit)[:, : x.shape[1]].T
        if gated:
            gate, up = y.view(len(x), -1, 2, 8).unbind(2)
            y = (torch.nn.functional.silu(gate) * up).flatten(1)
        y = y if bias is None else y + bias.float()
        out.copy_(y + out.float() if add else y)


def lanes(name: str, arch: tuple[int, int], **defines: int) -> Lanes:
    return Lanes(bool(defines["MINISGL_FP16"]), defines["MINISGL_GROUP"], bool(defines["MINISGL_MINIMA"]))


def matrix_of(
    device: str, arch: tuple[int, int], parts: list[Packed], dtype: torch.dtype, activation: str | None = None
) -> tuple[packed_gemm.PackedMatrix, Tensor]:
    """And what it stands for."""
    codes = packed_gemm.codes_of([moved(part, device) for part in parts])
    assert codes is not None
    ops = TorchOps() if device == "cpu" else CudaOps(arch)
    weight = torch.cat([part.dequantize() for part in parts]).to(device)
    return packed_gemm.PackedMatrix(ops, arch, codes, dtype, activation), weight


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.empty(0), torch.empty(0)
    monkeypatch.setattr(packed_gemm, "load_kernel", lanes)
    monkeypatch.setattr(decode_gemm, "workspace", lambda device: nothing)
    monkeypatch.setattr(packed_gemm, "_COPY", 16 * 512)  # a tile of rows at a time


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestLayout:
    def test_products(self, kind: str, dtype: torch.dtype) -> None:
        make = MAKERS[kind]
        matrix, weight = matrix_of("cpu", (8, 6), [make(48, 512), make(32, 512)], dtype)
        for m in (0, 3, 20, 150):
            x = random(m, 512, device="cpu", dtype=dtype)
            assert matrix.apply(x).shape == (m, 80)
            if m:
                check(matrix, weight, m, dtype)
        check_rows(matrix, weight)

    def test_gate_and_up(self, kind: str, dtype: torch.dtype) -> None:
        make = MAKERS[kind]
        matrix, weight = matrix_of("cpu", (8, 6), [make(48, 512), make(48, 512)], dtype, "silu")
        for m in (3, 150):
            check_gated(matrix, weight, m, dtype)


def has_kernels(parts: list[Packed]) -> bool:
    return packed_gemm.codes_of(parts) is not None


def test_what_the_kernels_do_not_have() -> None:
    few, odd, wide = (
        grouped(32, 512),
        grouped(8, 512),
        Grouped(torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 1)),
    )
    assert has_kernels([few, few])
    assert has_kernels([wide])
    for parts in (
        [few, grouped(32, 512, 64)],
        [odd],
        [few, grouped(32, 512, order=True)],
        [Grouped(wide.codes, wide.scales, bits=8)],
        [Grouped(torch.zeros(16, 24, dtype=torch.uint8), torch.ones(16, 1))],
        [grouped(32, 480, 96)],
        [blocks("Q4_K", 32, 512), blocks("Q4_0", 32, 512)],
        [blocks("Q4_0", 32, 512), blocks("Q8_0", 32, 512)],
    ):
        assert not has_kernels(parts)
    assert has_kernels([grouped(32, 512, order=True), grouped(32, 512, order=True)])


@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_what_is_chosen(arch: tuple[int, int]) -> None:
    """Kernels that there are, for as many tokens as they take; few are never multiplied by way of 16 bits."""
    for m, (n, k) in itertools.product(range(1, 1100), SHAPES):
        how = packed_gemm.choose(m, n, k, arch)
        tiles = {
            "packed_wide": packed_gemm.WIDE_TILES,
            "packed_gemm": packed_gemm.FEW_TILES + packed_gemm.TILES,
            "one_token": (1,),
            "": (0,),
        }
        assert how.tile in tiles[how.kernel]
        assert m <= how.tile or how.tile > 16 or m > 128
        assert how.kernel or m > 128
        assert how.kernel != "packed_wide" or arch == (9, 0)


def archs() -> list[tuple[int, int]]:
    """This GPU's, and older ones whose kernels run on it."""
    mine = torch.cuda.get_device_capability() if HAS_GPU else (8, 0)
    return sorted({mine, (8, 0), *([(8, 6)] if mine >= (8, 6) else [])})


class TestKernels:
    pytestmark = on_gpu

    @pytest.mark.parametrize("kind", MAKERS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_products(self, kind: str, dtype: torch.dtype) -> None:
        make, arch = MAKERS[kind], torch.cuda.get_device_capability()
        for sizes, k in (((176, 48), 768), ((2048, 512, 512), 1536)):
            matrix, weight = matrix_of("cuda", arch, [make(n, k) for n in sizes], dtype)
            for m in TOKENS:
                check(matrix, weight, m, dtype)
            check_rows(matrix, weight)
        matrix, weight = matrix_of("cuda", arch, [make(272, 768), make(272, 768)], dtype, "silu")
        for m in TOKENS:
            check_gated(matrix, weight, m, dtype)

    @pytest.mark.parametrize("arch", archs(), ids=str)
    def test_large_weights(self, arch: tuple[int, int]) -> None:
        """In which other variants are taken, of older GPUs too."""
        for n, k in ((4096, 2560), (17408, 4096)):
            matrix, weight = matrix_of("cuda", arch, [grouped(n, k)], torch.bfloat16)
            gated, _ = matrix_of("cuda", arch, [grouped(n, k)], torch.bfloat16, "silu")
            for m in TOKENS:
                check(matrix, weight, m, torch.bfloat16)
                check_gated(gated, weight, m, torch.bfloat16)

    def test_repeatable_and_independent_of_other_rows(self) -> None:
        matrix, _ = matrix_of("cuda", torch.cuda.get_device_capability(), [grouped(4096, 2560)], torch.bfloat16)
        for m in (1, 8, 64, 256):
            x = random(m, 2560, device="cuda")
            first = matrix.apply(x)
            assert all(torch.equal(first, matrix.apply(x)) for _ in range(5))
            if m == 8:  # one token alone has a kernel of its own, which adds in another order
                assert torch.equal(first, torch.cat([matrix.apply(pair) for pair in x.split(2)]))

    def test_in_a_graph(self) -> None:
        matrix, weight = matrix_of("cuda", torch.cuda.get_device_capability(), [grouped(4096, 2560)], torch.bfloat16)
        for m in (1, 16, 64, 256, 300):
            x = random(m, 2560, device="cuda")
            matrix.apply(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = matrix.apply(x)
            x.copy_(random(m, 2560, device="cuda", seed=9))
            graph.replay()
            graph.replay()
            assert_close(y, x.float() @ weight.T)

    def test_operations_choose(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ops = CudaOps(torch.cuda.get_device_capability())
        if torch.cuda.get_device_capability() == (9, 0):
            small = ops.packed_matrix([moved(grouped(64, 512), "cuda")], torch.bfloat16)
            assert not isinstance(small, packed_gemm.PackedMatrix)
        monkeypatch.setattr(cuda, "PACKED_WEIGHTS", 0)
        few, many = (moved(grouped(64, 512, seed=i), "cuda") for i in range(2))
        assert isinstance(ops.packed_matrix([few, many], torch.bfloat16), packed_gemm.PackedMatrix)
        other = moved(blocks("Q8_0", 64, 512), "cuda")
        plain = ops.packed_matrix([moved(blocks("Q4_0", 64, 512), "cuda"), other], torch.bfloat16)
        assert not isinstance(plain, packed_gemm.PackedMatrix)
        assert not isinstance(ops.packed_matrix([few], torch.float32), packed_gemm.PackedMatrix)
