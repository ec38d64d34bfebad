"""Speed of products with e4m3 weights on Hopper, by shape, number of tokens and kernel, beside those in bf16.

    python benchmark/kernels/float8.py [--tokens 1 8 64 256 2048] [--models 0.6B 14B] [--seconds 60]

Each time is of a CUDA graph over enough copies of the weights to exceed the L2 cache, in microseconds, with what a
layer does beside the product: its norm, SiLU or residual's sum, and the quantisation of its tokens. `bf16` is what the
same layer takes there, `ours` what `Float8Matrix` chooses. A kernel that fails or is wrong is named and left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmark.kernels.decode_gemm import graph_time
from benchmark.kernels.skinny_gemm import variants
from minisgl.kernel import decode_gemm, float8, skinny
from minisgl.kernel.cuda import CudaOps, compile_kernels
from minisgl.kernel.decode_gemm import Variant
from minisgl.kernel.jit import side_by_side
from minisgl.kernel.ops import Around, Matrix
from minisgl.kernel.packed import Float8

Tensor = torch.Tensor
EPS = 1e-6
COPIES_BYTES = 200_000_000
KINDS = ("row", "block")  # of scales


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    form: str  # norm, add or gate_up
    rows: int
    k: int


def model(name: str, hidden: int, qkv: int, attention: int, inner: int) -> list[Shape]:
    return [
        Shape(f"{name} qkv", "norm", qkv, hidden),
        Shape(f"{name} o", "add", hidden, attention),
        Shape(f"{name} gate_up", "gate_up", 2 * inner, hidden),
        Shape(f"{name} down", "add", hidden, inner),
        Shape(f"{name} head", "norm", 151936, hidden),
    ]


SHAPES = [*model("14B", 5120, 7168, 5120, 17408), *model("0.6B", 1024, 4096, 2048, 3072)]


@dataclass(frozen=True, slots=True)
class Case:
    """One layer: its weights, several times, in bf16 and in e4m3, and what it is given."""

    shape: Shape
    x: Tensor
    residual: Tensor
    gain: Tensor
    plain: Matrix
    matrix: float8.Float8Matrix

    def layer(self, matrix: Matrix) -> Tensor:
        return matrix.apply(self.x, self.around)

    def skinny(self, variant: int) -> Tensor:
        weight, scales = self.matrix.weight
        return skinny.linear(self.x, weight, self.around, scales, variant)

    def wide(self, how: tuple[int, Variant]) -> Tensor:
        return self.matrix.product(self.matrix.quantize(self.x, self.around.norm, EPS), self.around, how)

    @property
    def around(self) -> Around:
        if self.shape.form == "add":
            return Around(residual=self.residual)
        return Around(norm=self.gain, eps=EPS, gated=self.shape.form == "gate_up")


def cases(ops: CudaOps, shape: Shape, m: int, kind: str) -> list[Case]:
    copies = max(2, min(60, -(-COPIES_BYTES // (shape.rows * shape.k))))
    x, gain = torch.randn(m, shape.k, device="cuda").bfloat16(), torch.ones(shape.k, device="cuda").bfloat16()
    residual = torch.zeros(m, shape.rows, device="cuda").bfloat16()
    activation = "silu" if shape.form == "gate_up" else None
    found = []
    for _ in range(copies):
        weight = torch.empty(shape.rows, shape.k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
        part = Float8.of(weight)
        if kind == "block":
            columns = -(-shape.k // 128)
            part = Float8(part.data, part.scales[::128].expand(-1, columns).contiguous())
        merged = float8.merge([part])
        assert merged is not None
        matrix = float8.Float8Matrix(ops, merged, torch.bfloat16, None, activation)
        found.append(Case(shape, x, residual, gain, ops.matrix(weight, activation), matrix))
    return found


def wides(m: int, shape: Shape, kind: str) -> Iterator[tuple[int, Variant]]:
    groups = kind == "block"
    tiles = [tile for tile in float8.TOKEN_TILES[groups] if tile < 2 * max(m, 32)]
    for tile in tiles[-2:]:
        for rows in (64, 128, 192):
            blocks = -(-shape.rows // rows) * -(-m // tile)
            for split in (float8.WAVES, 0, 1, 2, 3, 4, 6, 8):
                if (split > 1 and not 60 <= blocks * split <= 140) or (split == 1 and not 80 <= blocks <= 264):
                    continue
                if split == float8.WAVES and blocks < 100:
                    continue
                yield tile, Variant(rows, split)


def measure(found: list[Case], call: Callable[[Case], Tensor], expected: Tensor | None) -> float | str:
    """Seconds, or what is wrong."""
    case = found[0]
    case.residual.zero_()
    try:
        actual = call(case).float()
        if expected is not None and not (actual - expected).abs().max() < 0.05 * expected.abs().max():
            return f"wrong by {((actual - expected).abs().max() / expected.abs().max()).item():.2g}"
        return graph_time(lambda: [call(case) for case in found], len(found), 0.006)
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        return str(error).splitlines()[0][:60]


def report(ops: CudaOps, shape: Shape, m: int, kind: str) -> str:
    found = cases(ops, shape, m, kind)
    found[0].residual.zero_()
    expected = found[0].layer(ops.matrix(found[0].matrix.weight.widen(torch.bfloat16), "silu")).float()
    calls: dict[str, Callable[[Case], Tensor]] = {"ours": lambda case: case.layer(case.matrix)}
    n, is_gated = shape.rows // (2 if shape.form == "gate_up" else 1), shape.form == "gate_up"
    if m <= 16 and skinny.supports(m, n, shape.k, torch.bfloat16, shape.form != "add", float8=True):
        for variant in variants(m, is_gated, float8=True):
            calls[f"s{variant}"] = partial(Case.skinny, variant=variant)
    for how in wides(m, shape, kind) if m > 1 else ():
        calls[f"{how[0]}:{how[1].rows}/{how[1].split}"] = partial(Case.wide, how=how)
    times = {name: measure(found, call, expected) for name, call in calls.items()}
    good = {name: 1e6 * seconds for name, seconds in times.items() if isinstance(seconds, float)}
    ranked = sorted(good.keys() - {"ours"}, key=lambda name: good[name])
    plain, ours = measure(found, lambda case: case.layer(case.plain), None), good.get("ours", 1.0)
    size = shape.rows * shape.k
    line = f"{shape.name:13s} {kind:5s} {m:5d}  bf16 {1e6 * float(plain):7.1f}  ours {ours:7.1f}"
    line += f" ({size / ours / 1e6:.2f} TB/s, {2e-6 * m * size / ours:.0f} TFLOP/s)  "
    line += " ".join(f"{name} {good[name]:.1f}" for name in ranked[:9])
    return line + "".join(f"\n    {name}: {what}" for name, what in times.items() if isinstance(what, str))


def compile_all(device: torch.device) -> None:
    tasks: list[Callable[[], object]] = [partial(compile_kernels, device, torch.bfloat16)]
    tasks += [partial(skinny.prepare, device, torch.bfloat16, tile, True) for tile in skinny.TOKEN_TILES]
    kinds = [(tile, 1 + groups) for groups, tiles in float8.TOKEN_TILES.items() for tile in tiles]
    tasks += [partial(decode_gemm.prepare, device, torch.bfloat16, *kind) for kind in kinds]
    side_by_side(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 2048])
    parser.add_argument("--models", nargs="+", default=["14B", "0.6B"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing more after so long")
    args = parser.parse_args()
    torch.manual_seed(0)
    compile_all(torch.device("cuda", 0))
    ops, begin = CudaOps(torch.cuda.get_device_capability()), time.perf_counter()
    for m in args.tokens:
        for kind in args.kinds:
            for shape in SHAPES:
                if shape.name.split()[0] in args.models and time.perf_counter() - begin < args.seconds:
                    print(report(ops, shape, m, kind), flush=True)


if __name__ == "__main__":
    main()
