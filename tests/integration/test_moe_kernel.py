"""Triton's mixture of experts against the layer's loop; on a GPU, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from minisgl.kernel.activations import clamped_swiglu, route
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.packed import Blocks, Float8, Grouped, Packed
from tests.triton_cpu import DEVICE, DTYPES, INTERPRET, MARKS, needs_gpu

pytestmark = MARKS
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def reference(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int, renormalize: bool
) -> torch.Tensor:
    """The loop over experts of `SparseMLP`, with the same routing, in float32."""
    ops, out = TorchOps(), torch.zeros(x.shape, device=x.device)
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    for expert in range(len(gate_up)):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        hidden = ops.act_and_mul(x[token].float() @ gate_up[expert].float().T)
        out.index_add_(0, token, (hidden @ down[expert].float().T) * weights[token, choice, None])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 40] if INTERPRET else [0, 1, 3, 40, 150, 3000])
@pytest.mark.parametrize(("num_experts", "hidden", "inner", "top_k"), [(4, 64, 96, 2), (9, 40, 24, 3), (3, 128, 64, 1)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_moe(
    dtype: torch.dtype, num_tokens: int, num_experts: int, hidden: int, inner: int, top_k: int, renormalize: bool
) -> None:
    from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe

    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden).to(DEVICE, dtype)
    logits = torch.randn(num_tokens, num_experts).to(DEVICE, dtype)
    if num_tokens > 2:
        logits[:, 1] -= 50  # an expert that nobody chooses, but for the choices left
    gate_up = (torch.randn(num_experts, 2 * inner, hidden) / hidden**0.5).to(DEVICE, dtype)
    down = (torch.randn(num_experts, hidden, inner) / inner**0.5).to(DEVICE, dtype)
    logits += torch.arange(num_experts, device=DEVICE) * 0.02  # no ties after rounding to bf16
    out = fused_moe(x, logits.float(), Stack(gate_up), Stack(down), top_k, renormalize)
    expected = reference(x, logits.float(), gate_up, down, top_k, renormalize)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def packed(kind: str, num_out: int, num_in: int) -> Packed:
    if kind.startswith("e4m3"):
        weight = torch.randn(num_out, num_in, device=DEVICE) / num_in**0.5
        rows = Float8.of(weight)
        blocks = torch.rand(-(-num_out // 128), -(-num_in // 128), device=DEVICE) / 4000 + 1e-4
        return rows if kind == "e4m3 rows" else Float8(rows.data, blocks)
    group, zeros = num_in if "row" in kind else int(kind.split()[0]), "zeros" in kind
    shape = num_out, num_in // group
    codes = torch.randint(0, 256, (num_out, num_in // 2), dtype=torch.uint8, device=DEVICE)
    scales = (torch.rand(shape, device=DEVICE) * 0.1 / num_in**0.5).half()
    return Grouped(codes, scales, torch.randint(0, 16, shape, dtype=torch.uint8, device=DEVICE) if zeros else None)


def mxfp4(num_out: int, num_in: int) -> Packed:
    """Any codes; exponents around those of a matrix that keeps its input's scale."""
    blocks = torch.randint(0, 256, (num_out, num_in // 32, 17), dtype=torch.uint8, device=DEVICE)
    blocks[..., 0] = torch.randint(118, 124, blocks.shape[:2], device=DEVICE)
    return Blocks("MXFP4", blocks.flatten(1), num_in)


def q4_1(num_out: int, num_in: int) -> Packed:
    values = torch.randn(num_out, num_in).div_(num_in**0.5).numpy()
    return Blocks("Q4_1", torch.from_numpy(quantize(values, GGMLQuantizationType.Q4_1)).to(DEVICE), num_in)


PACKED = {
    kind: (lambda n, k, kind=kind: packed(kind, n, k))
    for kind in ("e4m3 rows", "e4m3 blocks", "32 zeros", "64", "rows", "rows zeros")
} | {"Q4_1": q4_1, "MXFP4": mxfp4}
OWN = {} if INTERPRET else {"MXFP4, packed": mxfp4}  # for kernels in CUDA
SIZES = [3] if INTERPRET else [1, 3, 18, 40, 75, 100, 120, 700]


def arch_of(kind: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability() if kind in OWN else (0, 0)


@pytest.mark.parametrize("kind", [*PACKED, *OWN])
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_experts(kind: str, num_tokens: int, dtype: torch.dtype) -> None:
    """Weights of few bits against what they stand for; the last block of columns is not full."""
    from minisgl.kernel.triton.grouped_gemm import fused_moe, stack_of

    torch.manual_seed(1)
    num_experts, hidden, inner, make = 5, 320, 192, {**PACKED, **OWN}[kind]
    experts = [[make(inner, hidden), make(inner, hidden)] for _ in range(num_experts)]
    down = [[make(hidden, inner)] for _ in range(num_experts)]
    stacks = stack_of((dtype, experts), True, arch_of(kind)), stack_of((dtype, down), False, arch_of(kind))
    assert {stack.unit > 0 for stack in stacks} == {kind in OWN and dtype != torch.float32}
    assert {stack.bits for stack in stacks} == {8 if kind.startswith("e4m3") else 4}
    full = [torch.stack([torch.cat([part.dequantize() for part in parts]) for parts in s]) for s in (experts, down)]
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    out = fused_moe(x, logits, *stacks, 2, True, arch=arch_of(kind))
    expected = reference(x, logits, *full, 2, True)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize("kind", ["full", *OWN])
def test_experts_that_are_chosen_already(kind: str, num_tokens: int) -> None:
    """As few pairs, too, as would otherwise be chosen, or computed, by a kernel of their own."""
    from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe, stack_of

    torch.manual_seed(1)
    x = torch.randn(num_tokens, 96).to(DEVICE, DTYPES[-1])
    logits = torch.randn(num_tokens, 64, device=DEVICE)
    parts = [[[mxfp4(*shape)] for _ in range(64)] for shape in ((320, 96), (96, 160))]
    full = [torch.stack([expert[0].dequantize() for expert in stack]) for stack in parts]
    arch = (9, 0) if INTERPRET else torch.cuda.get_device_capability()
    gate_up, down = (
        Stack(full[i].to(x.dtype)) if kind == "full" else stack_of((x.dtype, parts[i]), i == 0, arch) for i in range(2)
    )
    weights, experts = route(logits, 2, True)
    out = fused_moe(x, (weights, experts.int()), gate_up, down, 2, True, arch=arch).float()
    expected = reference(x, logits, *full, 2, True)
    scale = expected.abs().max()
    torch.testing.assert_close(out / scale, expected / scale, atol=TOLERANCE[x.dtype], rtol=TOLERANCE[x.dtype])


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_stream(num_tokens: int, dtype: torch.dtype) -> None:
    """It becomes its sum with the mixture; with the kernels that choose experts, too."""
    from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe

    torch.manual_seed(0)
    x, residual = (torch.randn(num_tokens, 40).to(DEVICE, dtype) for _ in range(2))
    logits = torch.randn(num_tokens, 13).to(DEVICE)
    gate_up, down = (torch.randn(13, *shape).to(DEVICE, dtype) / 6 for shape in ((48, 40), (40, 24)))
    expected = residual.float() + reference(x, logits, gate_up, down, 3, True)
    arch = (0, 0) if INTERPRET else torch.cuda.get_device_capability()
    for there in ((0, 0), arch):
        out = residual.clone()
        assert fused_moe(x, logits, Stack(gate_up), Stack(down), 3, True, arch=there, residual=out) is out
        torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden", "inner", "tokens"),
    [
        (32, 4, 320, 1440, (1,)),
        (128, 8, 256, 288, (1, 2)),
        (13, 3, 96, 160, (1,)),
        (64, 1, 192, 96, (1, 8)),
        (200, 5, 64, 352, (1, 5)),
        (8, 2, 64, 6400, (1,)),  # a warp of the second product has more units than there are slots
    ],
)
def test_few_tokens(
    dtype: torch.dtype, wide: bool, num_experts: int, top_k: int, hidden: int, inner: int, tokens: tuple[int, ...]
) -> None:
    """Pairs that are not sorted, several of one expert among them."""
    from minisgl.kernel import experts as fp4
    from minisgl.kernel.triton.grouped_gemm import fused_moe, stack_of

    torch.manual_seed(1)
    stacks, full = [], []
    for is_gated, rows, cols in ((True, 2 * inner, hidden), (False, hidden, inner)):
        parts = [[mxfp4(rows, cols)] for _ in range(num_experts)]
        stack = stack_of((dtype, parts), is_gated, torch.cuda.get_device_capability())
        stacks.append(replace(stack, bias=torch.randn(num_experts, rows, device=DEVICE).to(dtype)))
        full.append([part.dequantize().to(dtype).float() for (part,) in parts])
    for n in tokens:
        assert fp4.takes(*stacks, n * top_k, top_k)
        x = torch.randn(n, hidden, device=DEVICE).to(dtype) / hidden**0.5
        logits = (3 * torch.randn(n, num_experts, device=DEVICE)).to(torch.float32 if wide else dtype)
        logits[:, -1] += 5  # most choose it
        residual = torch.randn(n, hidden, device=DEVICE).to(dtype)
        for clamped, renormalize, adds in ((True, True, True), (False, False, False), (False, True, True)):
            chosen = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
            weights = logits.softmax(-1, dtype=torch.float32).gather(1, chosen)
            weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
            expected = residual.float() if adds else torch.zeros(n, hidden, device=DEVICE)
            for token, choice in ((token, choice) for token in range(n) for choice in range(top_k)):
                expert = int(chosen[token, choice])
                first, second = ((full[i][expert], stacks[i].bias[expert].float()) for i in range(2))
                gate, up = (first[0] @ x[token].float() + first[1]).chunk(2)
                inside = clamped_swiglu(gate, up) if clamped else torch.nn.functional.silu(gate) * up
                y = second[0] @ inside.to(dtype).float() + second[1]
                expected[token] += weights[token, choice] * y
            to = residual.clone() if adds else None
            out = fused_moe(x, logits, *stacks, top_k, renormalize, None, clamped, residual=to).float()
            scale = expected.abs().max()
            torch.testing.assert_close(out / scale, expected / scale, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (32, 4), (33, 33 - 1), (128, 8), (512, 10), (1000, 1)])
@pytest.mark.parametrize("sums_to_1", [True, False])
def test_choices(dtype: torch.dtype, num_experts: int, top_k: int, sums_to_1: bool) -> None:
    """Of equal logits the lower expert comes first; a token with NaN has weights of NaN, of experts that exist."""
    from minisgl.kernel.triton.grouped_gemm import choose_experts

    torch.manual_seed(0)
    logits = torch.randint(-40, 40, (70, num_experts), device=DEVICE).to(dtype) / 8
    logits[3], logits[4, 0] = -float("inf"), float("inf")
    logits[3, -1] = logits[5] = 0
    wide = torch.cat((logits, logits), 1)[:, :num_experts]  # rows that are apart
    expected = logits.softmax(-1, dtype=torch.float32).sort(dim=-1, descending=True).values[:, :top_k]
    expected = expected / expected.sum(-1, keepdim=True) if sums_to_1 else expected
    pairs = torch.empty(70 * top_k, dtype=torch.int32, device=DEVICE)
    blocks = torch.empty(70 * top_k, 4, dtype=torch.int32, device=DEVICE)
    arch, finite = torch.cuda.get_device_capability(), torch.arange(70, device=DEVICE) != 4
    weights, experts = choose_experts(wide, top_k, sums_to_1, arch, pairs, blocks)
    by_logit = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(experts.long(), by_logit)
    torch.testing.assert_close(weights[finite], expected[finite], atol=1e-6, rtol=1e-5)
    assert pairs.tolist() == list(range(70 * top_k))
    assert blocks[:, 0].tolist() == experts.flatten().tolist()
    assert torch.equal(blocks[:, 2], blocks[:, 1] + 1) and torch.equal(blocks[:, 1], pairs) and not blocks[:, 3].any()
    logits[2, 3] = float("nan")
    weights, experts = choose_experts(logits, top_k, sums_to_1, arch)
    assert weights[2].isnan().all() and ((experts >= 0) & (experts < num_experts)).all()
    others = finite & (torch.arange(70, device=DEVICE) != 2)
    torch.testing.assert_close(weights[others], expected[others], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["full", "MXFP4", *OWN])
@pytest.mark.parametrize("num_tokens", SIZES)
def test_biases_and_clamped_activations(dtype: torch.dtype, kind: str, num_tokens: int) -> None:
    """Inputs large enough that both sides of gates and of what they let through are clamped."""
    from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe, stack_of

    torch.manual_seed(1)
    num_experts, hidden, inner = 5, 96, 160
    if kind == "full":
        weights = [
            torch.randn(num_experts, *shape, device=DEVICE) * 0.3 for shape in ((2 * inner, hidden), (hidden, inner))
        ]
        stacks = [Stack(weight.to(dtype)) for weight in weights]
    else:
        parts = [[[mxfp4(*shape)] for _ in range(num_experts)] for shape in ((2 * inner, hidden), (hidden, inner))]
        weights = [torch.stack([expert[0].dequantize() for expert in stack]) for stack in parts]
        stacks = [stack_of((dtype, stack), i == 0, arch_of(kind)) for i, stack in enumerate(parts)]
    biases = [torch.randn(num_experts, width, device=DEVICE).to(dtype) * 3 for width in (2 * inner, hidden)]
    gate_up, down = (replace(stack, bias=bias) for stack, bias in zip(stacks, biases, strict=True))
    x = 2 * torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    out = fused_moe(x, logits, gate_up, down, 2, True, clamped=True)
    probabilities, experts = logits.topk(2, -1)
    expected = torch.zeros(num_tokens, hidden, device=DEVICE)
    for weight, expert in zip(probabilities.softmax(-1).T, experts.T, strict=True):
        first, second = (torch.stack([stack.to(dtype).float()[e] for e in expert]) for stack in weights)
        inside = torch.einsum("th,toh->to", x.float(), first) + biases[0].float()[expert]
        assert (inside.abs() > 7).any()
        inside = clamped_swiglu(*inside.chunk(2, -1)).to(dtype).float()
        expected += weight[:, None] * (torch.einsum("ti,toi->to", inside, second) + biases[1].float()[expert])
    scale = expected.abs().max()
    torch.testing.assert_close(out.float() / scale, expected / scale, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(1184, 736), (64, 3232)])
@pytest.mark.parametrize("num_tokens", [150, 900])
def test_many_tokens(dtype: torch.dtype, hidden: int, inner: int, num_tokens: int) -> None:
    """More tiles than a GPU computes at a time, of experts with few pairs, with many and with none."""
    from minisgl.kernel.triton.grouped_gemm import fused_moe, stack_of

    torch.manual_seed(1)
    num_experts, top_k, stacks, full = 9, 3, [], []
    for is_gated, rows, cols in ((True, 2 * inner, hidden), (False, hidden, inner)):
        parts = [[mxfp4(rows, cols)] for _ in range(num_experts)]
        stack = stack_of((dtype, parts), is_gated, torch.cuda.get_device_capability())
        stacks.append(replace(stack, bias=torch.randn(num_experts, rows, device=DEVICE).to(dtype)))
        full.append([part.dequantize().to(dtype).float() for (part,) in parts])
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype) / hidden**0.5
    logits = torch.randn(num_tokens, num_experts, device=DEVICE) + torch.linspace(-3, 3, num_experts, device=DEVICE)
    logits[:, 5] = -20.0  # nobody's choice
    chosen, experts = logits.topk(top_k, dim=-1)
    weights, expected = chosen.softmax(-1), torch.zeros(num_tokens, hidden, device=DEVICE)
    for expert in range(num_experts):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        first, second = ((full[i][expert], stacks[i].bias[expert].float()) for i in range(2))
        inside = clamped_swiglu(*(x[token].float() @ first[0].T + first[1]).chunk(2, -1)).to(dtype).float()
        expected.index_add_(0, token, (inside @ second[0].T + second[1]) * weights[token, choice, None])
    arch = torch.cuda.get_device_capability()
    for _ in range(3):
        out = fused_moe(x, logits, *stacks, top_k, True, None, True, arch).float()
        torch.testing.assert_close(out / expected.abs().max(), expected / expected.abs().max(), atol=2e-2, rtol=2e-2)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_powers_of_two_that_have_no_room(dtype: torch.dtype) -> None:
    """Numbers of their sizes have a factor then."""
    from minisgl.kernel.triton.grouped_gemm import fused_moe, stack_of

    torch.manual_seed(1)
    stacks, full = [], []
    for rows, cols in ((64, 96), (96, 32)):
        parts = [[mxfp4(rows, cols)] for _ in range(3)]
        for (part,) in parts:
            part.data.view(rows, -1, 17)[..., 0] += 10
        stacks.append(stack_of((dtype, parts), rows == 64, torch.cuda.get_device_capability()))
        full.append(torch.stack([part.dequantize() for (part,) in parts]))
    assert all(stack.unit > 1 for stack in stacks)
    x, logits = torch.randn(9, 96, device=DEVICE).to(dtype) * 1e-3, torch.randn(9, 3, device=DEVICE)
    expected = reference(x, logits, *full, 2, True)
    out = fused_moe(x, logits, *stacks, 2, True).float()
    torch.testing.assert_close(out / expected.abs().max(), expected / expected.abs().max(), atol=2e-2, rtol=2e-2)


def test_experts_that_differ_become_full() -> None:
    """A file keeps some experts with more bits than others."""
    from minisgl.kernel.triton.grouped_gemm import stack_of

    parts = [[packed("32", 16, 64)], [packed("64", 16, 64)]]
    stack = stack_of((torch.float32, parts))
    assert stack.bits == 16
    torch.testing.assert_close(stack.data, torch.stack([part[0].dequantize() for part in parts]))


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 8, 2), (700, 5, 3), (33, 128, 8), (3200, 32, 4)])
def test_sorted_pairs(block_m: int, num_tokens: int, num_experts: int, top_k: int) -> None:
    """Pairs by expert, those of one expert in order; blocks cover each once and hold one expert's pairs only."""
    from minisgl.kernel.triton.grouped_gemm import sort_pairs

    torch.manual_seed(0)
    experts = torch.rand(num_tokens, num_experts).argsort(-1)[:, :top_k].int().to(DEVICE)
    order, blocks = sort_pairs(experts, num_experts, block_m)
    flat = experts.flatten()
    assert order.tolist() == flat.argsort(stable=True).tolist()
    covered: list[int] = []
    for expert, first, end, done in blocks.tolist():
        assert end - first <= block_m and not done
        covered += range(first, end)
        assert (flat[order[first:end].long()] == expert).all()
    assert covered == list(range(flat.numel()))


def test_nan_stays_in_its_token() -> None:
    from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe

    torch.manual_seed(0)
    x, logits = torch.randn(6, 32, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    gate_up, down = torch.randn(4, 32, 32, device=DEVICE), torch.randn(4, 32, 16, device=DEVICE)
    expected = fused_moe(x, logits, Stack(gate_up), Stack(down), 2, True)
    x[2], logits[2] = float("nan"), float("nan")
    out = fused_moe(x, logits, Stack(gate_up), Stack(down), 2, True)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[others], expected[others], atol=0, rtol=0)


@needs_gpu
@pytest.mark.parametrize("num_tokens", [90, 500])
def test_mixtures_that_overlap(num_tokens: int) -> None:
    """The second product begins while the first one still runs; what another mixture left in its place shows."""
    from minisgl.kernel.triton.grouped_gemm import fused_moe, stack_of

    torch.manual_seed(0)
    arch, num_experts, hidden, inner = torch.cuda.get_device_capability(), 8, 960, 1280
    experts = [[mxfp4(inner, hidden), mxfp4(inner, hidden)] for _ in range(num_experts)]
    down = [[mxfp4(hidden, inner)] for _ in range(num_experts)]
    full = [torch.stack([torch.cat([part.dequantize() for part in parts]) for parts in s]) for s in (experts, down)]
    stacks = [stack_of((torch.bfloat16, s), gated, arch) for s, gated in ((experts, True), (down, False))]
    xs = torch.randn(12, num_tokens, hidden, device=DEVICE, dtype=torch.bfloat16)
    logits = torch.randn(12, num_tokens, num_experts, device=DEVICE)
    logits[::3, :, 1] += 3  # several blocks of one expert
    fused_moe(xs[0], logits[0], *stacks, 2, True, arch=arch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [fused_moe(x, each, *stacks, 2, True, arch=arch) for x, each in zip(xs, logits, strict=True)]
    expected = [reference(x, each, *full, 2, True) for x, each in zip(xs, logits, strict=True)]
    for _ in range(5):
        graph.replay()
        for out, right in zip(outs, expected, strict=True):
            assert (out.float() - right).norm() < 1e-2 * right.norm()


@needs_gpu
def test_moe_in_a_graph() -> None:
    """What is captured serves other routings."""
    from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe

    torch.manual_seed(0)
    x = torch.randn(24, 128, device=DEVICE, dtype=torch.bfloat16)
    logits = torch.randn(24, 16, device=DEVICE)
    gate_up = torch.randn(16, 128, 128, device=DEVICE, dtype=torch.bfloat16) / 11
    down = torch.randn(16, 128, 64, device=DEVICE, dtype=torch.bfloat16) / 8
    arch = torch.cuda.get_device_capability()
    fused_moe(x, logits, Stack(gate_up), Stack(down), 4, True, arch=arch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(x, logits, Stack(gate_up), Stack(down), 4, True, arch=arch)
    for _ in range(2):
        x.normal_()
        logits.normal_()
        logits[:, 3] += 5  # one expert gets everything
        graph.replay()
        expected = reference(x, logits, gate_up, down, 4, True)
        torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)
