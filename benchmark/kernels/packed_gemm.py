"""Linear layers with weights of 4 bits: every kernel and tile, and what is chosen, beside 16 bits.

    python benchmark/kernels/packed_gemm.py [--shapes 14B 0.6B] [--tokens 1 8 16 64 256 1024] [--check]

Each product has its neighbours fused as a layer asks for them (norm, SiLU, residual), and runs in a CUDA graph over
enough copies of the weights to exceed the L2 cache. Prints microseconds; for few tokens also how fast weights are read.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from minisgl.kernel.cuda import CudaOps, compile_kernels
from minisgl.kernel.ops import Around
from minisgl.kernel.packed import Grouped
from minisgl.kernel.packed_gemm import FEW_TILES, TILES, WIDE_TILES, Codes, How, PackedMatrix, codes_of

Tensor = torch.Tensor

L2 = 160 << 20  # bytes of weights in a graph, at least
FEW_VARIANTS, ONE_VARIANTS = range(4), range(4)


@dataclass(frozen=True, slots=True)
class Shape:
    """form: what a layer asks of the product: "norm", "add" or "gate_up". n: rows of the weight."""

    name: str
    form: str
    n: int
    k: int


def layer(hidden: int, qkv: int, attention: int, inner: int) -> list[Shape]:
    return [
        Shape("qkv", "norm", qkv, hidden),
        Shape("o", "add", hidden, attention),
        Shape("gate_up", "gate_up", 2 * inner, hidden),
        Shape("down", "add", hidden, inner),
    ]


SHAPES = {
    "0.6B": layer(1024, 4096, 2048, 3072),
    "8B": layer(4096, 6144, 4096, 12288),
    "14B": layer(5120, 7168, 5120, 17408),
}


def random_part(n: int, k: int, group: int = 128, zeros: bool = True) -> Grouped:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(n, k // group, device="cuda", dtype=torch.float16) * 0.01 + 0.001
    return Grouped(
        codes, scales, torch.randint(0, 16, scales.shape, dtype=torch.uint8, device="cuda") if zeros else None
    )


def copies_of(matrix: PackedMatrix) -> list[PackedMatrix]:
    """With weights of their own."""
    copies = [matrix]
    while sum(copy._weight.numel() for copy in copies) < L2:
        other = object.__new__(PackedMatrix)
        other.__dict__.update(matrix.__dict__)
        other._weight = matrix._weight.clone()
        copies.append(other)
    return copies


def run(matrix: PackedMatrix, x: Tensor, around: Around, how: How | None) -> Tensor:
    """One product by `how`, with its neighbours."""
    return matrix.apply(x, around) if how is None else matrix.multiply(x, around, how)


def around_of(shape: Shape, residual: Tensor, gains: Tensor) -> Around:
    """As a layer asks."""
    is_add = shape.form == "add"
    return Around(residual=residual) if is_add else Around(norm=gains, eps=1e-6, gated=shape.form == "gate_up")


def microseconds(products: list[Callable[[], Tensor]], repeats: int = 7) -> float:
    """Of one of them, in a graph of all."""
    for product in products[:2]:
        product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(products))
    return statistics.median(times[1:])


def hows(m: int, arch: tuple[int, int] = (9, 0)) -> list[How]:
    if m <= FEW_TILES[-1]:
        tile = next(tile for tile in FEW_TILES if m <= tile)
        few = [How("packed_gemm", tile, variant) for variant in FEW_VARIANTS]
        few += [How("one_token", 1, variant) for variant in ONE_VARIANTS] if m == 1 else []
        return few + ([How("packed_wide", WIDE_TILES[0], 2)] if m > 8 and arch == (9, 0) else [])
    if arch != (9, 0):
        return [How("packed_gemm", TILES[0])]
    wide = [How("packed_wide", tile, groups) for tile in WIDE_TILES for groups in (2, 3) if tile <= 2 * m]
    return wide + [How()] * (m >= 128)


def measure(shape: Shape, tokens: list[int]) -> None:
    ops = CudaOps(torch.cuda.get_device_capability())
    activation = "silu" if shape.form == "gate_up" else None
    codes = codes_of([random_part(shape.n, shape.k)])
    assert codes is not None
    packed = copies_of(PackedMatrix(ops, ops._arch, codes, torch.bfloat16, activation))
    num_bytes = packed[0]._weight.numel()
    weights = [torch.randn(shape.n, shape.k, device="cuda", dtype=torch.bfloat16) / 64]
    weights += [weights[0].clone() for _ in range(L2 // (2 * shape.n * shape.k))]
    dense = [ops.matrix(weight, activation) for weight in weights]
    gains = torch.rand(shape.k, device="cuda", dtype=torch.bfloat16)
    for m in tokens:
        x = torch.randn(m, shape.k, device="cuda", dtype=torch.bfloat16)
        residual = torch.randn(m, shape.n, device="cuda", dtype=torch.bfloat16)
        around = around_of(shape, residual, gains)
        wide = microseconds([functools.partial(matrix.apply, x, around) for matrix in dense])
        cells = [f"16 bits {wide:.1f}"]
        for how in [None, *hows(m)]:
            try:
                time = microseconds([functools.partial(run, matrix, x, around, how) for matrix in packed])
                rate = f" {num_bytes / time / 1e6:.2f}TB/s" if m <= 16 else ""
                name = "chosen" if how is None else f"{how.kernel[7:]}{how.tile}.{how.variant}"
                cells.append(f"{name} {time:.1f}{rate} ({time / wide:.2f})")
            except (RuntimeError, ValueError) as error:
                if not any(text in str(error) for text in ("shared memory", "no such")):
                    cells.append(f"{how}: {str(error).splitlines()[0][:80]}")
        print(f"{shape.name} {shape.n} x {shape.k}, {m}: " + "; ".join(cells), flush=True)


@dataclass(frozen=True, slots=True)
class Kind:
    dtype: torch.dtype = torch.bfloat16
    group: int = 128
    minima: bool = False
    arch: tuple[int, int] = (9, 0)

    def matrix(self, n: int, k: int, activation: str | None = None) -> tuple[PackedMatrix, Tensor]:
        """And what it stands for, in float32."""
        part = random_part(n, k, self.group, zeros=not self.minima)
        codes, weight = codes_of([part]), part.dequantize()
        assert codes is not None
        if self.minima:
            offset = torch.randn_like(codes.scales) * 0.05
            codes = Codes(codes.codes, codes.scales, offset, has_minima=True)
            weight = weight + offset.repeat_interleave(self.group, 1)
        return PackedMatrix(
            CudaOps(torch.cuda.get_device_capability()), self.arch, codes, self.dtype, activation
        ), weight


KINDS = [Kind(), Kind(group=32, minima=True), Kind(torch.float16, 64), Kind(arch=(8, 6))]


def check(kind: Kind) -> None:
    """Every kernel against a float32 product of what the weights stand for, awkward shapes."""
    ops, worst, failed, dtype = CudaOps(torch.cuda.get_device_capability()), 0.0, 0, kind.dtype
    for form, n, k in (("norm", 176, 768), ("add", 1040, 1664), ("gate_up", 544, 1280), ("add", 8192, 5120)):
        matrix, weight = kind.matrix(n, k, "silu" if form == "gate_up" else None)
        gains = 1 + torch.randn(k, device="cuda", dtype=dtype) / 4
        for m in (1, 2, 7, 8, 9, 16, 17, 33, 65, 130, 257, 700):
            x, residual = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(m, n, device="cuda", dtype=dtype)
            wide = x.float() if form == "add" else ops.rms_norm(x.float(), gains.float(), 1e-6)
            expected = wide @ weight.T
            if form == "add":
                expected += residual.float()
            elif form == "gate_up":
                gate, up = expected.chunk(2, -1)
                expected = torch.nn.functional.silu(gate) * up
            for how in hows(m, kind.arch):
                try:
                    actual = run(matrix, x, around_of(Shape("", form, n, k), residual.clone(), gains), how)
                    error = ((actual.float() - expected).norm() / expected.norm()).item()
                except (RuntimeError, ValueError) as reason:
                    if any(text in str(reason) for text in ("shared memory", "no such")):
                        continue
                    error = float("nan")
                    print(reason)
                worst = max(worst, error)
                if not error < 8e-3:
                    failed += 1
                    if failed < 12:
                        print(f"WRONG {kind} {form} {n} x {k}, {m} by {how}: {error:.3g}")
    print(f"checked {kind}: worst {worst:.2g}, {failed} wrong", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=tuple(SHAPES), default=["14B", "0.6B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 4096])
    parser.add_argument("--check", action="store_true", help="compare with float32 first")
    args = parser.parse_args()
    with ThreadPoolExecutor() as pool:
        dense = pool.submit(compile_kernels, torch.device("cuda", 0), torch.bfloat16)
        list(pool.map(lambda kind: kind.matrix(64, 512), KINDS[:-1] if args.check else KINDS[:1]))
        dense.result()
    for kind in KINDS if args.check else []:
        check(kind)
    for name in args.shapes:
        print(f"# {name}, {torch.cuda.get_device_name()}")
        for shape in SHAPES[name]:
            measure(shape, args.tokens)


if __name__ == "__main__":
    main()
