"""Products of a CPU with weights of few bits, against `gguf`'s values of the same blocks and plain torch.

Inputs are whole numbers times a power of two for every 32, so that they are exact in 8 bits: what is left are the
roundings of sums. `MINISGL_TEST_CPU_TARGET` tries instructions other than those of this processor's level.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from minisgl.kernel.cpu import CpuOps, PanelMatrix
from minisgl.kernel.ops import Around, TorchOps
from minisgl.kernel.packed import Blocks, Float8, Grouped, Packed
from tests.gguf_files import put_scales
from tests.integration.test_cpu_kernels import TARGET, close, cpu_ops, narrower, random

Tensor = torch.Tensor
EXACT = 3e-6  # of the largest output
NORMED = 2e-2  # where inputs are rounded to 8 bits, of the largest output; a wrong scale of one group shows in `EXACT`
ROWS = (1, 2, 3, 5, 6, 7, 12, 13, 31, 65)

# Types of blocks, and where in a block its 16-bit floats are.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "IQ1_M": (),
}
# Integers: bits, inputs for each scale (0: all), whether there are zeros, type of scales.
GROUPED = {
    "4 bits, 32": (4, 32, False, torch.float16),
    "4 bits, 64": (4, 64, True, torch.bfloat16),
    "4 bits, 128": (4, 128, True, torch.float16),
    "4 bits, rows": (4, 0, False, torch.float32),
    "8 bits, 64": (8, 64, False, torch.bfloat16),
    "8 bits, 128": (8, 128, True, torch.float16),
    "8 bits, rows": (8, 0, True, torch.float16),
}


def blocks(kind: str, num_out: int, num_in: int, seed: int = 0) -> Blocks:
    """Any bits, but for scales of sensible size and both signs."""
    size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (num_out, num_in // size, num_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = generator.uniform(0.005, 0.05, data.shape[:2]) * generator.choice((-1, 1), data.shape[:2])
        data[..., at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    if kind == "IQ1_M":
        put_scales(data, generator.uniform(0.005, 0.05, data.shape[:2]).astype(np.float16))
    if kind == "MXFP4":
        data[..., 0] = generator.integers(117, 124, data.shape[:2])
        data[0, 0, 0] = 1  # a power of two that 32-bit floats hardly have
    return Blocks(kind, torch.from_numpy(data).flatten(1), num_in)


def grouped(name: str, num_out: int, num_in: int, seed: int = 0, columns: Tensor | None = None) -> Grouped:
    bits, group, has_zeros, dtype = GROUPED[name]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (num_out, num_in * bits // 8), dtype=torch.uint8, generator=generator)
    shape = num_out, num_in // group if group else 1
    scales = (torch.rand(shape, generator=generator) / 16 + 0.01).bfloat16().to(dtype)
    zeros = torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator) if has_zeros else None
    return Grouped(codes, scales, zeros, bits, columns)


def packed(kind: str, num_out: int, num_in: int, seed: int = 0) -> Packed:
    return grouped(kind, num_out, num_in, seed) if kind in GROUPED else blocks(kind, num_out, num_in, seed)


def exact_inputs(rows: int, num_in: int, seed: int = 0) -> Tensor:
    """Of each 32 the largest is 127 times a power of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, -(-num_in // 32), 32), generator=generator).float()
    x[..., 0] = 127
    return (x * 2.0 ** torch.randint(-9, -5, (*x.shape[:2], 1), generator=generator)).flatten(1)[:, :num_in]


def kept(ops: CpuOps, parts: list[Packed], activation: str | None = None) -> PanelMatrix:
    """A matrix that the kernels have kept as it is."""
    matrix = ops.packed_matrix(parts, torch.bfloat16, activation)
    assert isinstance(matrix, PanelMatrix)
    sizes = [-(-num_out // 32) * -(-num_in // 32) * 1024 for num_out, num_in in (part.shape for part in parts)]
    assert sum(part.nbytes for part in matrix.data) < 1.3 * sum(sizes)
    return matrix


def values(parts: list[Packed]) -> Tensor:
    return torch.cat([part.dequantize() for part in parts]).double()


TARGETS = [(1, TARGET), (2, TARGET), *((2, target) for target in narrower())]


@pytest.mark.parametrize("kind", [*HALVES, *GROUPED])
@pytest.mark.parametrize(("num_threads", "target"), TARGETS, ids=str)
def test_products(num_threads: int, target: str, kind: str) -> None:
    """Widths of one block and of several; heights that fill no panel; more rows than are multiplied at a time."""
    ops = cpu_ops(num_threads, target)
    is_wide = kind in HALVES and GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 256
    sizes = [(7, 256), (97, 768), (64, 1280)] if is_wide else [(7, 128), (97, 384), (33, 640)]
    for num_out, num_in in sizes:
        part, bias = packed(kind, num_out, num_in, seed=1), random(num_out, seed=2)
        matrix, expected = kept(ops, [part]), values([part])
        for rows in ROWS:
            x = exact_inputs(rows, num_in, seed=rows)
            product = x.double() @ expected.T + bias
            close(matrix.apply(x, Around(bias)), product, EXACT)
            residual = random(rows, num_out, seed=9)
            close(matrix.apply(x, Around(bias, residual=residual.clone())), product + residual, EXACT)


@pytest.mark.parametrize("kind", [*HALVES, *GROUPED])
def test_norms_and_any_inputs(kind: str) -> None:
    part, norm = packed(kind, 96, 512), random(512, seed=3).abs()
    matrix, expected = kept(cpu_ops(2), [part]), values([part])
    for rows in (1, 4, 13):
        x = random(rows, 512, seed=rows)
        close(matrix.apply(x), x.double() @ expected.T, NORMED)
        normed = TorchOps().rms_norm(x, norm, 1e-6)
        close(matrix.apply(x, Around(None, norm, 1e-6)), normed.double() @ expected.T, NORMED)


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("kind", [*HALVES, *GROUPED])
@pytest.mark.parametrize("target", [TARGET, *narrower()], ids=str)
def test_the_largest_sums(target: str, kind: str, code: int) -> None:
    """All codes alike, and all inputs of one sign: nothing may overflow where products are added in few bits."""
    part = packed(kind, 40, 512)
    if isinstance(part, Grouped):
        part.codes.fill_(code)
    else:
        data = part.data.view(40, 512 // GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0], -1)
        halves = [data[..., at : at + 2].clone() for at in HALVES[kind]]
        signed = {0: 129, 255: 127}  # bytes that are -127 and 127
        data[..., kind == "MXFP4" :] = signed[code] if kind == "Q8_0" else code
        for at, half in zip(HALVES[kind], halves, strict=True):
            data[..., at : at + 2] = half
        if kind == "IQ1_M":
            put_scales(data.numpy(), np.float16(0.01))
    x = exact_inputs(5, 512)
    x = (x.view(5, -1, 32).amax(-1, keepdim=True) * torch.tensor([1, -1, 1, 1, -1]).view(5, 1, 1)).expand(-1, -1, 32)
    x = x.flatten(1).contiguous()
    matrix, expected = kept(cpu_ops(2, target), [part]), values([part])
    for rows in (1, 5):
        product = x[:rows].double() @ expected.T
        largest = x[:rows].abs().double() @ expected.abs().T
        assert ((matrix.apply(x[:rows]) - product).abs() <= EXACT * largest.max()).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "4 bits, 32", "8 bits, rows"])
def test_the_narrowest_inputs(kind: str) -> None:
    part = packed(kind, 20, 32)
    for rows in (1, 3):
        x = exact_inputs(rows, 32)
        close(kept(cpu_ops(2), [part]).apply(x), x.double() @ values([part]).T, EXACT)


@pytest.mark.parametrize("num_in", [40, 72])
def test_whole_rows_need_not_be_groups_of_32(num_in: int) -> None:
    part = grouped("8 bits, rows", 40, num_in)
    for rows in (1, 9):
        x = exact_inputs(rows, num_in)
        close(kept(cpu_ops(2), [part]).apply(x), x.double() @ values([part]).T, EXACT)


PARTS = [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "MXFP4", "Q2_K"), ("4 bits, 64", "8 bits, 128", "Q3_K")]


@pytest.mark.parametrize("kinds", PARTS, ids=str)
def test_parts_of_several_formats(kinds: tuple[str, ...]) -> None:
    parts = [packed(kind, num_out, 256, seed=num_out) for kind, num_out in zip(kinds, (80, 33, 50), strict=True)]
    matrix, expected, bias = kept(cpu_ops(2), parts), values(parts), random(163)
    for rows in (1, 2, 13):
        x = exact_inputs(rows, 256)
        close(matrix.apply(x, Around(bias)), x.double() @ expected.T + bias, EXACT)
    ids = torch.tensor([0, 79, 80, 112, 113, 162])
    torch.testing.assert_close(matrix.rows(ids), expected[ids].float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inner", [8, 48, 100])
@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("Q4_0",), ("4 bits, 128",)], ids=str)
def test_gate_and_up(kinds: tuple[str, ...], inner: int) -> None:
    """Two matrices, or one tensor with both."""
    parts = [packed(kind, 2 * inner // len(kinds), 256, seed) for seed, kind in enumerate(kinds)]
    expected, bias = values(parts) / 64, random(2 * inner, seed=2)
    matrix = kept(cpu_ops(2), parts, "silu")
    for rows in (1, 3, 13):
        x = exact_inputs(rows, 256) / 64
        gate, up = (x.double() @ (64 * expected).T + bias).chunk(2, -1)
        close(matrix.apply(x, Around(bias, gated=True)), F.silu(gate) * up, 20 * EXACT)


@pytest.mark.parametrize("rows", [1, 9])
def test_columns_in_another_order(rows: int) -> None:
    columns = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    parts = [grouped("4 bits, 64", 40, 256, seed, columns) for seed in (1, 2)]
    x, norm = exact_inputs(rows, 256), random(256, seed=3).abs()
    x[:, columns] = x.clone()  # what is exact are 32 that are multiplied together
    matrix = kept(cpu_ops(2), list(parts))
    close(matrix.apply(x), x.double() @ values(list(parts)).T, EXACT)
    normed = TorchOps().rms_norm(x, norm, 1e-6)
    close(matrix.apply(x, Around(None, norm, 1e-6)), normed.double() @ values(list(parts)).T, NORMED)
    other = [parts[0], dataclasses.replace(parts[1], columns=columns.flip(0))]
    close(cpu_ops(2).packed_matrix(other, torch.float32).apply(x), x.double() @ values(list(other)).T, EXACT)


@pytest.mark.parametrize("kind", [*HALVES, *GROUPED])
@pytest.mark.parametrize("target", [TARGET, *narrower()])
def test_rows_of_a_table(target: str, kind: str) -> None:
    part = packed(kind, 50, 512)
    rows = kept(cpu_ops(2, target), [part]).rows(torch.tensor([10, 9, 59, 60, 33]), first=10)
    expected = part.dequantize()[[0, 0, 49, 0, 23]]
    expected[[1, 3]] = 0  # ids of other ranks
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-7)


def test_rows_of_blocks_that_do_not_follow_one_another() -> None:
    """A rank's columns of a file's tensor."""
    part = blocks("Q4_0", 40, 256)
    right = Blocks("Q4_0", part.data[:, 4 * 18 :], 128)
    x = exact_inputs(3, 128)
    close(kept(cpu_ops(2), [right]).apply(x), x.double() @ part.dequantize()[:, 128:].double().T, EXACT)


def test_a_row_with_a_nan_spoils_no_other() -> None:
    for kind in ("Q4_K", "Q8_0"):
        matrix, x = kept(cpu_ops(2), [packed(kind, 40, 256)]), random(9, 256)
        before = matrix.apply(x)
        x[4, 7] = torch.nan
        after = matrix.apply(x)
        assert after[4].isnan().all()
        assert torch.equal(after[[0, 1, 2, 3, 5, 8]], before[[0, 1, 2, 3, 5, 8]])


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32", "TQ2_0", "float8", "4 bits, scales of 32", "4 bits, 16"])
def test_what_has_no_kernel_keeps_its_values(kind: str) -> None:
    weight = random(40, 256)
    part: Packed
    if kind == "float8":
        part = Float8(weight.to(torch.float8_e4m3fn), torch.rand(1, 1))
    elif kind == "4 bits, scales of 32":
        part = grouped("4 bits, 32", 40, 256)
        part = dataclasses.replace(part, scales=random(40, 8, scale=0.1))
    elif kind == "4 bits, 16":
        part = grouped("4 bits, 32", 40, 256)
        part = dataclasses.replace(part, scales=random(40, 16, scale=0.1).half())
    elif kind == "TQ2_0":
        data = torch.randint(256, (40, 66), dtype=torch.uint8)
        data[:, 64:] = torch.rand(40, 1).half().view(torch.uint8)
        part = Blocks(kind, data, 256)
    else:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[kind]
        part = Blocks(kind, weight.to(dtype).view(torch.uint8), 256)
    x, expected = random(5, 256), values([part, part])
    ops = cpu_ops(2)
    matrix, panel = ops.packed_matrix([part, part], torch.bfloat16), ops.module.panel_size()
    close(matrix.apply(x), x.double() @ expected.T, 2e-6)
    assert torch.equal(matrix.rows(torch.tensor([3, 77])), expected[[3, 77]].float())
    assert isinstance(matrix, PanelMatrix)
    num_rows = -(-80 // panel) * panel  # whole panels
    assert sum(part.nbytes for part in matrix.data) == num_rows * 256 * (2 if kind in ("F16", "BF16") else 4)


def test_gate_and_up_in_one_part_without_a_kernel() -> None:
    """They are taken apart where they are kept in few bits, and nowhere else."""
    part = Float8.of(random(2 * 48, 64))
    gate, up = part.dequantize().chunk(2)
    matrix, x = cpu_ops(2).packed_matrix([part], torch.float32, "silu"), random(5, 64, seed=1)
    close(matrix.apply(x, Around(gated=True)), F.silu(x @ gate.T) * (x @ up.T), 1e-5)
