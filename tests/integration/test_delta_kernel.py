"""The gated delta net's kernels against a definition, token by token. Products of chunks also in Triton's interpreter,
with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from minisgl.kernel.state import DeltaState, DeltaWeights, StateSequences
from tests.triton_cpu import DEVICE, DTYPES, INTERPRET, MARKS, needs_gpu

pytestmark = MARKS
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Shape = tuple[int, int, int, int]  # heads of keys, their size, heads of values, theirs
SHAPES: list[Shape] = [(2, 16, 4, 16), (1, 8, 3, 12), (2, 24, 2, 48)]
WIDE: list[Shape] = [(16, 128, 32, 128), (2, 64, 6, 128), (1, 256, 2, 256)]
LENGTHS = [1, 1, 2, 3, 16, 17, 70, 1, 130]
LONGEST = 3  # tokens of a draft
Drafts = list[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A step, in the type that is computed in, of sequences of these lengths. Slots that are nobody's hold NaN."""

    qkvz: torch.Tensor
    ba: torch.Tensor
    weights: DeltaWeights
    state: DeltaState
    seqs: StateSequences


def make_case(
    shape: Shape,
    lengths: list[int],
    dtype: torch.dtype,
    width: int = 4,
    drafts: Drafts | None = None,
    longest: int = LONGEST,
) -> Case:
    """drafts: of each sequence, how many tokens held that its slot keeps, and how many of its own are tried; longest:
    how many may be."""
    torch.manual_seed(0)
    num_k, k_dim, num_v, v_dim = shape
    channels, num, num_slots = 2 * num_k * k_dim + num_v * v_dim, len(lengths), len(lengths) + 3
    slots, offsets = torch.randperm(num_slots)[:num], torch.tensor([0, *lengths]).cumsum(0)
    conv = torch.full((num_slots, channels, width - 1), torch.nan)
    memory = torch.full((num_slots, num_v, k_dim, v_dim), torch.nan)
    conv[slots], memory[slots] = torch.randn(num, *conv.shape[1:]), torch.randn(num, *memory.shape[1:])
    features = channels + num_v * v_dim
    kept = torch.full((num_slots, longest, features + 2 * num_v), torch.nan)
    kept[slots] = torch.randn(num, *kept.shape[1:])
    weights = DeltaWeights(
        (torch.randn(channels, width) / 2).to(DEVICE, dtype),
        (torch.rand(num_v) * 4).log().to(DEVICE),
        torch.randn(num_v).to(DEVICE),
        torch.rand(v_dim).to(DEVICE, dtype),
        1e-6,
    )
    counts = () if drafts is None else torch.tensor(drafts, dtype=torch.int32).T.contiguous().to(DEVICE).unbind()
    return Case(  # inputs are views of what is wider
        torch.randn(sum(lengths), features + 8).to(DEVICE, dtype)[:, :features],
        torch.randn(sum(lengths), 2 * num_v + 8).to(DEVICE, dtype)[:, : 2 * num_v],
        weights,
        DeltaState(conv.to(DEVICE, dtype), memory.to(DEVICE), kept.to(DEVICE, dtype)),
        StateSequences(slots.to(DEVICE, torch.int32), offsets.to(DEVICE, torch.int32), *counts),
    )


def advance(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, memory: torch.Tensor
) -> torch.Tensor:
    """The rule for a token, as the paper has it. q, k: [heads, Dk]; v: [heads, Dv]; memory: in place."""
    memory *= decay[:, None, None]
    error = v - torch.einsum("hk,hkv->hv", k, memory)
    memory += torch.einsum("hk,hv->hkv", k, beta[:, None] * error)
    return torch.einsum("hk,hkv->hv", q, memory)


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, and the states of all slots afterwards; in float64."""
    weights, begins = case.weights, case.seqs.cu_q.tolist()
    conv, memory = case.state.conv.double(), case.state.memory.double()
    _, num_v, k_dim, v_dim = memory.shape
    channels = len(weights.conv)
    num_k, out = (channels - num_v * v_dim) // (2 * k_dim), []
    inputs, kept, none = torch.cat((case.qkvz, case.ba), 1).double(), case.state.kept.double(), [0] * len(begins)
    held, tried = (none if some is None else some.tolist() for some in (case.seqs.held, case.seqs.tried))
    for i, slot in enumerate(case.seqs.slots.tolist()):
        sure, tokens = begins[i + 1] - tried[i], [*kept[slot, : held[i]], *inputs[begins[i] : begins[i + 1]]]
        for t, token in enumerate(tokens, begins[i] - held[i]):
            if t == sure:
                after = conv[slot].clone(), memory[slot].clone()
            x, b, a = token.split((len(token) - 2 * num_v, num_v, num_v))
            decay = (-weights.a_log.double().exp() * F.softplus(a + weights.dt_bias.double())).exp()
            seen = torch.cat((conv[slot], x[:channels, None]), 1)
            conv[slot] = seen[:, 1:]
            mixed = F.silu((seen * weights.conv.double()).sum(1))
            q, k, v = mixed.split((num_k * k_dim, num_k * k_dim, num_v * v_dim))
            q, k = (part.view(num_k, k_dim) for part in (q, k))
            q, k = (part * torch.rsqrt(part.square().sum(1, keepdim=True) + 1e-6) for part in (q, k))
            q, k = (part.repeat_interleave(num_v // num_k, 0) for part in (q * k_dim**-0.5, k))
            o = advance(q, k, v.view(num_v, v_dim), decay, b.sigmoid(), memory[slot])
            o = o * torch.rsqrt(o.square().mean(1, keepdim=True) + weights.eps) * weights.norm.double()
            out += [o.flatten() * F.silu(x[channels:])] if t >= begins[i] else []
        if tried[i]:
            conv[slot], memory[slot] = after
    return torch.stack(out), conv, memory


def compute(case: Case) -> torch.Tensor:
    from minisgl.kernel.delta import DeltaOps

    return DeltaOps().gated_delta_net(case.qkvz, case.ba, case.weights, case.state, case.seqs)


def assert_near(have: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Of the largest numbers; NaN where NaN is."""
    scale = want.nan_to_num().abs().max().item()
    torch.testing.assert_close(have.double(), want, atol=tolerance * scale, rtol=0, equal_nan=True)


def check(case: Case) -> None:
    wanted = reference(case)
    found = compute(case), case.state.conv, case.state.memory
    for have, want in zip(found, wanted, strict=True):
        assert_near(have, want, TOLERANCE[case.qkvz.dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
@pytest.mark.parametrize("lengths", [[1] * 5, [200], LENGTHS], ids=["tokens", "prompt", "mixed"])
def test_delta_net(shape: Shape, dtype: torch.dtype, lengths: list[int]) -> None:
    """Sequences that are shorter than the convolution, than a chunk, and longer; each goes on from what it was."""
    check(make_case(shape, lengths, dtype))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [WIDE[0], (4, 64, 12, 128), (16, 128, 16, 64)], ids=str)
@pytest.mark.parametrize("is_mixed", [False, True], ids=["tokens", "beside prompts"])
def test_tokens_of_many_sequences(shape: Shape, dtype: torch.dtype, is_mixed: bool) -> None:
    """So many that each block of what streams states has several, and not all blocks as many; others lie between them.
    Inputs may begin anywhere."""
    lengths = [1] * 150
    if is_mixed:
        lengths[3:9:2] = [3, 70, 2]
        lengths[40:60] = [2] * 20
    case = make_case(shape, lengths, dtype)
    first = DeltaState(*(part.clone() for part in case.state))
    check(case)
    padded = case.qkvz.new_zeros(len(case.qkvz), case.qkvz.shape[1] + 1)
    padded[:, 1:] = case.qkvz
    check(replace(case, qkvz=padded[:, 1:], state=first))


@needs_gpu
@pytest.mark.parametrize("width", [2, 3])
def test_widths_of_the_convolution(width: int) -> None:
    check(make_case(SHAPES[0], [1, 2, 5], torch.float32, width))
    check(make_case(WIDE[0], [1] * 40, torch.float32, width))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
@pytest.mark.parametrize("is_captured", [False, True])
def test_drafts(shape: Shape, dtype: torch.dtype, is_captured: bool) -> None:
    """States take in what held before, and the tokens that are sure; the rest is kept. Beside them go prompts, where
    the step is not captured: with and without something that held before them. (In float32: how far those are off in
    16 bits is what `test_delta_net` looks at.)"""
    drafts = [(0, 3), (3, 3), (1, 0), (0, 1), (2, 2), (0, 0), (3, 0)]
    lengths = [4, 4, 1, 2, 3, 1, 1]
    if not is_captured and dtype == torch.float32:
        lengths, drafts = [*lengths, 70, 5, 4], [*drafts, (2, 0), (0, 0), (1, 2)]
    case = make_case(shape, lengths, dtype, drafts=drafts)
    inputs = torch.cat((case.qkvz, case.ba), 1)
    wanted, first = reference(case), DeltaState(*(part.clone() for part in case.state))
    if is_captured:
        compute(case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compute(case)
        for part, before in zip(case.state, first, strict=True):
            part.copy_(before)
        graph.replay()
    else:
        out = compute(case)
    for have, want in zip((out, case.state.conv, case.state.memory), wanted, strict=True):
        assert_near(have, want, TOLERANCE[dtype])
    values, num_v = shape[2] * shape[3], shape[2]
    used = [*range(len(case.weights.conv)), *range(inputs.shape[1] - 2 * num_v, inputs.shape[1])]  # not the gates
    assert len(used) == inputs.shape[1] - values
    for slot, end, (_, num_tried) in zip(case.seqs.slots.tolist(), case.seqs.cu_q[1:].tolist(), drafts, strict=True):
        kept = case.state.kept[slot, :num_tried]
        torch.testing.assert_close(kept[:, used], inputs[end - num_tried : end][:, used], atol=0, rtol=0)


@needs_gpu
@pytest.mark.parametrize("shape", [SHAPES[1], *WIDE], ids=str)
def test_drafts_of_more_tokens_than_are_prepared_at_once(shape: Shape) -> None:
    drafts = [(9, 9), (9, 0), (0, 9), (7, 1), (5, 3), (8, 0), (0, 1)]
    check(make_case(shape, [10, 1, 10, 2, 4, 1, 2], torch.float32, drafts=drafts, longest=9))


@needs_gpu
@pytest.mark.parametrize("num", [6, 70])
def test_tokens_in_a_graph(num: int) -> None:
    """What is captured goes on from the states that it left; rows that pad it share a slot."""
    case = make_case(WIDE[0], [1] * num, torch.bfloat16)
    case.state.conv.nan_to_num_(), case.state.memory.nan_to_num_()
    case.seqs.slots[num - 2 :] = case.seqs.slots[num - 2]
    first = DeltaState(case.state.conv.clone(), case.state.memory.clone())
    compute(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compute(case)
    case.state.conv.copy_(first.conv), case.state.memory.copy_(first.memory)
    slots = case.seqs.slots[: num - 2].long()
    for _ in range(3):
        want, _, memory = reference(case)
        graph.replay()
        assert_near(out[: num - 2], want[: num - 2], TOLERANCE[torch.bfloat16])
        assert_near(case.state.memory[slots], memory[slots], 1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES if INTERPRET else SHAPES + WIDE, ids=str)
@pytest.mark.parametrize("alike", [False, True], ids=["any keys", "the same keys"])
def test_products_of_chunks(shape: Shape, dtype: torch.dtype, alike: bool) -> None:
    """Where all keys are the same and nothing is forgotten, what a chunk solves has its largest numbers."""
    from minisgl.kernel.triton.delta import delta_chunks

    num_k, k_dim, num_v, v_dim = shape
    case = make_case(shape, LENGTHS, dtype)
    num_tokens, memory, begins = len(case.qkvz), case.state.memory.double(), case.seqs.cu_q.tolist()
    q, k = (F.normalize(torch.randn(num_tokens, num_k, k_dim), dim=-1) for _ in range(2))
    k = k[:1].expand_as(k) if alike else k
    parts = q * k_dim**-0.5, k, torch.randn(num_tokens, num_v, v_dim)
    qkv = torch.cat([part.flatten(1) for part in parts], 1).to(DEVICE, dtype)
    gates = torch.stack(
        (
            -torch.rand(num_tokens, num_v) * (not alike),
            torch.rand(num_tokens, num_v).maximum(torch.tensor(float(alike))),
        )
    ).to(DEVICE)
    sizes = num_k * k_dim, num_k * k_dim, num_v * v_dim
    q, k, v = (
        part.unflatten(1, (-1, dim))
        for part, dim in zip(qkv.double().split(sizes, 1), (k_dim, k_dim, v_dim), strict=True)
    )
    q, k = (part.repeat_interleave(num_v // num_k, 1) for part in (q, k))
    out = torch.zeros(num_tokens, num_v * v_dim, dtype=dtype, device=DEVICE)
    want = out.double()
    for i, slot in enumerate(case.seqs.slots.tolist()):
        for t in range(begins[i], begins[i + 1]) if begins[i + 1] - begins[i] > 1 else ():
            want[t] = advance(
                q[t], k[t], v[t], gates[0, t].double().exp(), gates[1, t].double(), memory[slot]
            ).flatten()
    delta_chunks(qkv, gates, case.state.memory, case.seqs, out)
    # With one key all that a chunk's tokens add goes to one place, and with it the rounding of each to 16 bits.
    tolerance = TOLERANCE[dtype] * (3 if alike and dtype != torch.float32 else 1)
    for have, wanted in ((out, want), (case.state.memory, memory)):
        assert_near(have, wanted, tolerance)
