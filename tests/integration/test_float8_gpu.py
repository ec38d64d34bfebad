"""Products with e4m3 weights on GPUs, against torch in float32, and a model whose weights and cache have 8 bits."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmark.kernels.skinny_gemm import variants
from minisgl import LLM, SamplingParams
from minisgl.kernel import skinny
from minisgl.kernel.float8 import Float8Matrix, merge
from minisgl.kernel.ops import Around
from minisgl.kernel.packed import Float8
from minisgl.kernel.packed_gemm import one_token

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),  # compiles
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EPS = 1e-6
VARIANTS = range(-1, 4)  # of the kernels for one token
KINDS = ["tensor", "channel", "block"]  # what has a scale


@pytest.fixture(scope="module")
def ops():
    from minisgl.kernel.cuda import CudaOps

    return CudaOps(torch.cuda.get_device_capability())


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def part_of(kind: str, n: int, k: int, seed: int = 0) -> Float8:
    rows, columns = {"tensor": (1, 1), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}[kind]
    scales = (0.5 + random(rows, columns, dtype=torch.float32, seed=seed).abs()) * k**-0.5 / 100
    return Float8(random(n, k, dtype=torch.float32, seed=seed).mul(60).to(torch.float8_e4m3fn), scales)


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain.float()


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """x in e4m3, with a scale for so many columns, in float32."""
    groups = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).flatten(1)[:, : x.shape[1]]


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    error = ((actual.float() - expected).abs().max() / expected.abs().max()).item()
    assert error < limit, f"relative error {error:.3g}"


def matrix_of(ops, parts: list[Float8], dtype: torch.dtype) -> Float8Matrix:
    weight = merge(parts)
    assert weight is not None
    return Float8Matrix(ops, weight, dtype, None, "silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1024, 2048), (4096, 1040), (512, 5120), (208, 704)])
def test_products(ops, kind: str, n: int, k: int, dtype: torch.dtype) -> None:
    """Hopper's tensor cores take several tokens in e4m3 too: with the same rounding the results are the same, and
    without it they are near. One token, and elsewhere all, are multiplied as they are."""
    parts = [part_of(kind, n, k), part_of(kind, n, k, seed=1)]
    matrix, weight = matrix_of(ops, parts, dtype), torch.cat([part.dequantize() for part in parts])
    gain, bias = 1 + 0.2 * random(k, dtype=dtype), random(2 * n, dtype=dtype)
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    for m in (1, 4, 5, 8, 16, 17, 33, 64, 65, 130, 200, 700):
        x, residual = random(m, k, dtype=dtype), random(m, 2 * n, dtype=dtype)
        are_rounded = on_hopper and (m > 1 or k % 128 > 0)
        limit = 1e-2 + (k / 32 * 2**-14 if are_rounded else 0.0)  # tensor cores add e4m3 products with 14 bits
        plain, scaled = x.float(), normed(x, gain)
        if are_rounded:
            group = 128 if kind == "block" else k
            close(matrix.apply(x), plain @ weight.T, 6e-2)
            scaled = rounded(ops.rms_norm(x, gain, EPS), group)
            plain = rounded(x, group)
        close(matrix.apply(x, Around(bias)), plain @ weight.T + bias.float(), limit)
        close(matrix.apply(x, Around(None, gain, EPS)), scaled @ weight.T, limit)
        close(matrix.apply(x, Around(residual=residual.clone())), plain @ weight.T + residual.float(), limit)
        gate, up = (scaled @ weight.T).chunk(2, -1)
        close(matrix.apply(x, Around(None, gain, EPS, gated=True)), F.silu(gate) * up, 2 * limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_variant_for_a_few_tokens(ops, dtype: torch.dtype) -> None:
    """Of weights that are all subnormal, too."""
    for n, k, is_small in ((1024, 2048, True), (5120, 448, False)):
        part = part_of("channel", n, k)
        if is_small:
            part = Float8((part.data.view(torch.uint8) & 0x87).view(torch.float8_e4m3fn), part.scales * 1e4)
        weight, expected = merge([part]), part.dequantize()
        for m, gated in itertools.product((1, 3, 8, 13, 32), (False, True)):
            x, gain = random(m, k, dtype=dtype), 1 + 0.2 * random(k, dtype=dtype)
            product = normed(x, gain) @ expected.T
            gate, up = product.chunk(2, -1)
            for variant in variants(m, gated, True, skinny.shared_memory(x.device)):
                around = Around(norm=gain, eps=EPS, gated=gated)
                out = skinny.linear(x, weight.data, around, weight.scales, variant)
                close(out, F.silu(gate) * up if gated else product, 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["channel", "block"])
def test_every_variant_for_one_token(ops, kind: str, dtype: torch.dtype) -> None:
    """Of magnitudes that fp16 does not have, and with NaN, which stays."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper")
    for (n, k), form in itertools.product(((1024, 2048), (5120, 17408), (208, 640)), ("norm", "gated", "add")):
        part = part_of(kind, n, k)
        matrix, expected = matrix_of(ops, [part], dtype), part.dequantize()
        x, gain, residual = random(1, k, dtype=dtype), 1 + 0.2 * random(k, dtype=dtype), random(1, n, dtype=dtype)
        x[0, 7] *= 1000
        x = x * 1e6 if dtype == torch.bfloat16 else x
        product = (x.float() if form == "add" else normed(x, gain)) @ expected.T
        gate, up = product.chunk(2, -1)
        for variant in VARIANTS:
            out = (
                residual.clone() if form == "add" else torch.full_like(gate if form == "gated" else product, torch.nan)
            )
            around = Around(residual=out) if form == "add" else Around(norm=gain, eps=EPS, gated=form == "gated")
            out = out.to(dtype)
            try:
                one_token(matrix._one_token(), x, around, out, variant, *matrix.weight, 1.0)
            except ValueError as error:
                if variant < 0 or "more shared memory" not in str(error):
                    raise
                continue
            wanted = {"gated": F.silu(gate) * up, "add": product + residual.float(), "norm": product}
            close(out, wanted[form], 1e-2)
        x[0, 9] = torch.nan
        assert matrix.apply(x).isnan().all()


def test_small_matrices_are_widened_where_that_is_faster(ops) -> None:
    """To bf16, on Hopper, where reading them is not what takes time."""
    part, x = part_of("block", 1024, 2048), random(5, 2048)
    matrix = ops.packed_matrix([part], torch.bfloat16)
    assert isinstance(matrix, Float8Matrix) != (torch.cuda.get_device_capability() == (9, 0))
    close(matrix.apply(x), x.float() @ part.dequantize().T, 1e-2)
    assert isinstance(ops.packed_matrix([part_of("block", 8192, 2048)], torch.bfloat16), Float8Matrix)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(ops, kind: str) -> None:
    part = part_of(kind, 256, 512)
    matrix, ids = matrix_of(ops, [part], torch.bfloat16), torch.tensor([3, 100, 255, 299, 50], device="cuda")
    expected = part.dequantize()[(ids - 100).clamp(0, 255)]
    expected[(ids < 100) | (ids >= 356)] = 0
    close(matrix.rows(ids, 100), expected, 4e-3)


def test_what_kernels_do_not_take(ops) -> None:
    """Odd sizes, and float32, are computed in full."""
    for n, k, dtype in ((1000, 72, torch.bfloat16), (1024, 2048, torch.float32)):
        part, x = part_of("channel", n, k), random(40, k, dtype=dtype)
        close(ops.packed_matrix([part], dtype).apply(x), x.float() @ part.dequantize().T, 1e-2)


@pytest.mark.parametrize("m", [4, 40, 300])
def test_a_captured_chain(ops, m: int) -> None:
    """Kernels that start early, one after the other, leave what they left when they were launched by hand."""
    shapes = (6144, 1024), (1024, 3072)
    up, down = (matrix_of(ops, [part_of("channel", *shape)], torch.bfloat16) for shape in shapes)
    gain, x = torch.ones(1024, device="cuda").bfloat16(), random(m, 1024)
    residual = x.clone()

    def chain() -> None:
        torch.mul(x, 1, out=residual)
        for _ in range(8):
            down.apply(up.apply(residual, Around(None, gain, EPS, gated=True)), Around(residual=residual))

    chain()
    torch.cuda.synchronize()
    expected, graph = residual.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert expected.isfinite().all()
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("backend", ["triton,cuda", "triton"])
@pytest.mark.parametrize("quantization", ["fp8", None])
def test_a_model_of_eight_bits_still_answers(quantization: str | None, backend: str) -> None:
    if "cuda" in backend and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    questions = {
        "What is two plus two?": "2 + 2 = 4.",
        "12 x 12": "12 x 12 = 144.",
        "Are you an AI?": "I am an AI, a small language model: numbers and matrix products, nothing more.",
    }
    options = {"attention_backend": backend, "quantization": quantization, "kv_cache_dtype": "fp8"}
    with LLM(device="cuda", dtype="bfloat16", num_pages=256, max_running_requests=32, **options) as llm:
        chats = [[{"role": "user", "content": question}] for question in questions] * 8
        outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=60), progress=False)
    assert [output.text for output in outputs] == [*questions.values()] * 8
