"""Runs our CUDA and Triton kernels on small odd shapes, under NVIDIA's checkers or by itself.

    compute-sanitizer --tool memcheck python tools/sanitize_kernels.py decode_gemm    # groups that begin so; none: all
    python tools/sanitize_kernels.py --all-tools --seconds 60 --logs DIR

The second compiles first, then runs every tool over every group, each pair in a process of its own, and prints a table.
Results are compared with the torch reference on the host, so that hardly any kernel but ours is launched. all_reduce,
which needs several GPUs, is left out. What the checkers cannot do (their release notes and known limitations):
 - racecheck looks at shared memory only: races through global memory (stream-K's partial sums and flags, what
   programmatic launches overlap) are for the tests. Before 2026.3 it may report hazards that mbarriers rule out, which
   order decode_gemm's ring; that it follows copies by tensor maps is not documented. There judge each report, and do
   not take silence for proof.
 - memcheck checks copies by tensor maps from 2026.2 on, initcheck not all of them: what they read may count as unset.
 - Before 2026.4, memcheck and initcheck may take copies that fill with zeros (attention_decode) for real reads.
CUDA 13.0 has 2025.3; --sanitizer names another one, as in the package nvidia-cuda-sanitizer-api.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else a neighbour's memory hides what is out of bounds
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmark.kernels.decode_gemm import fits
from benchmark.kernels.skinny_gemm import variants
from minisgl.attention.base import AttentionShape, AttentionStep
from minisgl.attention.cuda import CudaBackend
from minisgl.config.model import AttentionSpec, MoE, PagedKV
from minisgl.formats.base import DENSE
from minisgl.kernel import decode_gemm, skinny
from minisgl.kernel.activations import route
from minisgl.kernel.cuda import CudaOps
from minisgl.kernel.delta import DeltaOps
from minisgl.kernel.float8 import Float8Matrix, merge
from minisgl.kernel.ops import Around, KVSlots, PagedSequences, RopeAngles, TorchOps
from minisgl.kernel.packed import Blocks, Float8, Grouped
from minisgl.kernel.packed_gemm import PackedMatrix, codes_of
from minisgl.kernel.sampling import SamplingColumns, TokenStore, sample_reference
from minisgl.kernel.state import DeltaState, DeltaWeights, StateSequences
from minisgl.kvcache.pool import LayerCache

Tensor = torch.Tensor
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # without a GPU: Triton's, with TRITON_INTERPRET=1
REFERENCE, EPS, TOLERANCE = TorchOps(), 1e-6, 0.02  # of the largest value; bfloat16 rounds to 0.004
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
BUILD_SECONDS = 400


def randn(*shape: int) -> Tensor:
    """Values of DTYPE, in float32."""
    return torch.randn(shape).to(DTYPE).float()


def up(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the device, of DTYPE where it is float32, that has arrived: some kernels read weights before the stream
    reaches them."""
    return x.to(DEVICE, dtype or (DTYPE if x.dtype == torch.float32 else x.dtype), copy=True)


def check(what: object, actual: Sequence[Tensor], expected: Sequence[Tensor], num_wrong: int = 0) -> None:
    """Integers must be equal, but for `num_wrong` of each tensor. Raises: ValueError."""
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        ours = ours.cpu()
        if ours.shape != theirs.shape:
            raise ValueError(f"{what}, result {i}: {tuple(ours.shape)}, not {tuple(theirs.shape)}")
        if theirs.is_floating_point():
            error = float((ours.float() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
        else:
            error = float((ours != theirs).sum())
        if not error <= (TOLERANCE if theirs.is_floating_point() else num_wrong):
            raise ValueError(f"{what}, result {i}: differs from the reference by {error:.3g}")


def elementwise() -> None:
    ops = CudaOps(torch.cuda.get_device_capability())
    for n, hidden in ((1, 72), (7, 1024), (3, 5120), (2, 12288)):
        x, gain, both = randn(n, hidden), randn(hidden), randn(n, 2 * hidden)
        strided = up(F.pad(x, (0, 16)))[:, :hidden]
        check(("norm", n, hidden), [ops.rms_norm(strided, up(gain), EPS)], [REFERENCE.rms_norm(x, gain, EPS)])
        weight, others = randn(9, hidden), (Around(eps=EPS),)
        found = ops.matrix(up(weight)).norm_and_apply(strided, up(gain), *others)
        check(("norm and product", n, hidden), found, REFERENCE.matrix(weight).norm_and_apply(x, gain, *others))
        check(("silu_and_mul", n, hidden), [ops.act_and_mul(up(both))], [REFERENCE.act_and_mul(both)])
    for n, num_q, num_kv, dim in ((1, 1, 1, 16), (5, 14, 2, 72), (3, 5, 1, 256), (37, 16, 8, 128)):
        cos, sin = torch.randn(2, n, 1, dim)
        rope = RopeAngles(up(cos, torch.float32), up(sin, torch.float32))
        slots = torch.cat((torch.tensor([n + 2]), torch.randperm(n + 2)[: n - 1]))  # the last that there is
        for norm in (None, randn(num_q + num_kv, dim)):
            qkv, k, v = randn(n, num_q + 2 * num_kv, dim), *torch.zeros(2, n + 3, num_kv, dim)
            ours = KVSlots(up(k), up(v), up(slots))
            q = ops.norm_rope_store(up(qkv), None if norm is None else up(norm), EPS, rope, ours)
            theirs = REFERENCE.norm_rope_store(qkv, norm, EPS, RopeAngles(cos, sin), KVSlots(k, v, slots))
            check(("rope", n, num_q, num_kv, dim, norm is not None), (q, ours.k, ours.v), (theirs, k, v))
    for n, first in ((1, 0), (41, 40)):
        ids, weight = torch.randint(0, 60, (n,)), randn(60 - first, 520)
        out = ops.matrix(up(weight)).rows(up(ids), first)
        check(("embedding", n, first), [out], [REFERENCE.matrix(weight).rows(ids, first)])


def norm_router() -> None:
    """Hopper's, which chooses experts, too: a token's logits there may be nearly equal."""
    for n, hidden in ((40, 72), (130, 2880)) if decode_gemm.is_available(DEVICE) else ():
        x, gain, bias = randn(n, hidden), randn(hidden), randn(31)
        weight = (randn(31, hidden) * 0.5 * hidden**-0.5).to(DTYPE).float()
        strided, matrix = up(F.pad(x, (0, 16)))[:, :hidden], CudaOps((9, 0)).matrix(up(weight))
        for added in (None, bias):
            around, moe = Around(None if added is None else up(added), eps=EPS), MoE(31, 8, 64, True)
            normed, (shares, experts) = matrix.norm_and_apply(strided, up(gain), around, moe)
            expected = REFERENCE.matrix(weight).norm_and_apply(x, gain, Around(added, eps=EPS))
            logits, expected_shares = expected[1], route(expected[1], 8, True)[0]
            found = normed, shares, logits.gather(1, experts.cpu().long())
            check(("norm_router", n, hidden), found, (expected[0], expected_shares, logits.topk(8).values))


def step() -> None:
    ops = CudaOps(torch.cuda.get_device_capability())
    for n, page_size, dim in ((1, 1, 80), (300, 1, 128), (37, 16, 256), (3, 16, 64)):
        table, ids = (torch.randint(0, 5000, (9, length), dtype=torch.int32) for length in (128 // page_size, 128))
        cells = 1151 - torch.cat((torch.zeros(1).int(), 1 + torch.randperm(1151)[: n - 1]))  # the last, too
        rows, positions, angles = (cells // 128).int(), (cells % 128).int(), [torch.randn(128, 2 * dim)]
        tables = [table, table.flip(0)]  # the second is of layers whose windows slide
        inputs = up(rows), up(positions), up(ids), [*map(up, tables)], page_size, [up(angles[0], torch.float32)]
        expected_ids, expected_slots, (rope,) = REFERENCE.step_inputs(rows, positions, ids, tables, page_size, angles)
        expected = expected_ids, *expected_slots, rope.cos, rope.sin
        ids_here, slots, (ours, *_) = ops.step_inputs(*inputs)
        check(("step_inputs", n), (ids_here, *slots, ours.cos, ours.sin), expected)
        sampled = torch.randint(-1, 99, (n,), dtype=torch.int32)
        ops.store_ids(inputs[2], inputs[0], up(positions.long()), up(sampled))
        REFERENCE.store_ids(ids, rows, positions.long(), sampled)
        check(("store_ids", n), [inputs[2]], [ids])
    for dtype in (torch.int32, torch.int64):
        index = torch.cat((torch.tensor([-1, 699]), torch.randperm(699)[:299])).to(dtype)
        values = torch.arange(301).int()
        theirs = torch.zeros(7, 100, dtype=torch.int32)
        target = up(theirs)
        ops.scatter(target, up(index), up(values))
        REFERENCE.scatter(theirs, index[1:], values[1:])
        check(("scatter", dtype), [target], [theirs])


def sampling() -> None:
    ops = CudaOps(torch.cuda.get_device_capability())
    modes = [(0.0, 0, 1.0, 0.0), (0.8, 0, 1.0, 0.0), (1.0, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (0.7, 3000, 0.95, 0.01)]
    names = ("temperature", "top_k", "top_p", "min_p")
    for n, vocab in ((1, 5003), (24, 5003), (40, 5003), (3, 5), (2, 1 << 19)):
        dtype = torch.float32 if vocab > 5003 else torch.bfloat16  # a row too large for shared memory
        logits = torch.randn(n, vocab).to(dtype)
        logits[1:2, 3] = torch.inf  # a row that fails
        for mode in modes if vocab <= 5003 else modes[-1:]:
            seed, position = torch.randint(0, 1 << 40, (n,)).numpy(), torch.randint(0, 20, (n,)).numpy()
            values = dict(zip(names, mode, strict=True))
            columns = SamplingColumns.of(n, **values, seed=seed, position=position)
            rows = torch.arange(n).int()
            theirs = torch.zeros(n).int(), torch.zeros(n, 20).int()
            ours = [up(x) for x in theirs]
            ops.sample(up(logits, dtype), SamplingColumns(up(columns.words)), ours[0], TokenStore(ours[1], up(rows)))
            sample_reference(logits, columns, theirs[0])
            REFERENCE.store_ids(theirs[1], rows, columns["position"], theirs[0])
            check(("sample", n, vocab, mode), ours, theirs, n // 20)  # a number may fall on the border of two tokens


def skinny_gemm() -> None:
    for m, (n, k) in itertools.product((7, 13, 29), ((152, 416), (18424, 96))):  # octets of rows: fewer than SMs; more
        x, gain, weight, both = randn(m, k), randn(k), randn(n, k), randn(2 * n, k)
        bias, residual = randn(n), randn(m, n)
        plain, normed = F.linear(x, weight, bias), REFERENCE.matrix(weight).apply(x, Around(bias, gain, EPS))
        expected = REFERENCE.matrix(both, "silu").apply(x, Around(None, gain, EPS, gated=True))
        x, gain, weight, both, bias = (up(t) for t in (x, gain, weight, both, bias))
        for v in variants(m, False):
            linear, norm_linear = (skinny.linear(x, weight, Around(bias, g, EPS), variant=v) for g in (None, gain))
            added = skinny.linear(x, weight, Around(bias, residual=up(residual)), variant=v)
            check(("skinny_gemm", m, n, k, v), (linear, norm_linear, added), (plain, normed, plain + residual))
        for v in variants(m, True):
            gated = skinny.linear(x, both, Around(norm=gain, eps=EPS, gated=True), variant=v)
            check(("skinny_gemm gated", m, n, k, v), [gated], [expected])


def gemm(m: int) -> None:
    small = [decode_gemm.Variant(rows, split) for rows in (64, 128, 192) for split in (0, 1, 3, 4)]
    large = [decode_gemm.Variant(rows, 0) for rows in (64, 128)]  # blocks whose work spans tiles
    for n, k, some in ((176, 512, small), (1360, 960, large)):
        x, weight, both, bias, residual = randn(m, k), randn(n, k), randn(2 * n, k), randn(n), randn(m, n)
        plain, gated = F.linear(x, weight), REFERENCE.act_and_mul(F.linear(x, both))
        expected = plain + bias, plain + residual, gated
        x, weight, both, bias = (up(t) for t in (x, weight, both, bias))
        for v in (v for v in some if fits(v, m, k)):
            added = decode_gemm.linear(x, weight, Around(residual=up(residual)), v)
            plain = decode_gemm.linear(x, weight, Around(bias), v)
            gated = decode_gemm.linear(x, both, Around(gated=True), v)
            check(("decode_gemm", m, n, k, tuple(v)), (plain, added, gated), expected)


def float8_products(has_groups: bool) -> None:
    """e4m3 weights beside tokens as they are, and beside tokens in e4m3."""
    ops = CudaOps(torch.cuda.get_device_capability())
    for m, (n, k) in itertools.product((1, 5, 13, 40), ((192, 448), (1376, 256))):
        x, gain, residual = randn(m, k), randn(k), randn(m, n)
        part = Float8.of(randn(n, k))
        if has_groups:
            part = Float8(part.data, part.scales[::128].repeat(1, -(-k // 128)))
        weight = merge([Float8(up(part.data), up(part.scales, torch.float32))])
        assert weight is not None
        plain, normed = F.linear(x, part.dequantize()), REFERENCE.rms_norm(x, gain, EPS) @ part.dequantize().T
        for v in variants(m, False, True) if m <= skinny.TOKEN_TILES[-1] else ():
            found = [skinny.linear(up(x), weight.data, Around(norm=up(gain), eps=EPS), weight.scales, v)]
            found.append(skinny.linear(up(x), weight.data, Around(residual=up(residual)), weight.scales, v))
            check(("skinny e4m3", m, n, k, v), found, (normed, plain + residual))
        if not decode_gemm.is_available(DEVICE):
            continue
        matrix = Float8Matrix(ops, weight, DTYPE, None, "silu")
        if m == 1:
            if k % 128 == 0:
                kinds = Around(None, up(gain), EPS), Around(residual=up(residual)), Around(gated=True)
                expected = normed, plain + residual, REFERENCE.act_and_mul(plain)
                check(("one token e4m3", n, k), [matrix.apply(up(x), around) for around in kinds], expected)
            continue
        tokens = matrix.quantize(up(x), up(gain), EPS)
        data, scales = tokens[0].cpu().view(torch.float8_e4m3fn).float(), tokens[1].cpu()
        wide = scales.T[:m].repeat_interleave(128, 1)[:, :k] if has_groups else scales[:, None]
        product = F.linear(data * wide, part.dequantize())
        for rows, split in itertools.product((64, 128, 192), (0, 1, -1)):
            how = 64 if m > 32 else 32, decode_gemm.Variant(rows, split)
            found = [matrix.product(tokens, Around(), how), matrix.product(tokens, Around(gated=True), how)]
            check(("decode_gemm e4m3", m, n, k, how), found, (product, REFERENCE.act_and_mul(product)))


class Paged:
    """Sequences whose pages are scattered over a pool that holds no others; slots that no token has hold NaN."""

    def __init__(self, num_q: int, num_kv: int, dim: int, page_size: int, lens: list[int], num_new: list[int]) -> None:
        self.shape = AttentionShape(num_q, num_kv, dim, DTYPE, page_size, max_running_requests=64, max_seq_len=512)
        n, width, self.num_new = len(lens), -(-max(lens) // page_size), num_new
        table, rows = torch.randperm(n * width).view(n, width).int(), torch.randperm(n).int()
        self.k, self.v = torch.full((2, n * width * page_size, num_kv, dim), torch.nan)
        self.slots = []
        for row, length in zip(rows.tolist(), lens, strict=True):
            pos = torch.arange(length)
            self.slots.append(table[row].long()[pos // page_size] * page_size + pos % page_size)
            self.k[self.slots[-1]], self.v[self.slots[-1]] = randn(2, length, num_kv, dim)
        self.q = randn(sum(num_new), num_q, dim)
        cu_q = torch.tensor([0, *itertools.accumulate(num_new)]).int()
        seqs = PagedSequences(up(table), up(rows), up(torch.tensor(lens).int()), up(cu_q), page_size)
        starts, offsets = np.array(lens) - np.array(num_new), cu_q.long().numpy()
        self.step = AttentionStep(
            rows.long().numpy(), starts, np.array(num_new), offsets, table.numpy(), page_size,
            num_decode=n if max(num_new) == 1 else 0, device=seqs,
        )  # fmt: skip

    def inputs(self) -> tuple[Tensor, LayerCache]:
        return up(F.pad(self.q, (0, 0, 0, 2)))[:, :-2], LayerCache(up(self.k), up(self.v))  # q: strided between tokens

    def reference(self, window: int | None) -> Tensor:
        """Zeros for a sequence without keys."""
        out = []
        for q, slots in zip(torch.split(self.q, self.num_new), self.slots, strict=True):
            keys, values = (
                x[slots].repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (self.k, self.v)
            )
            behind = (torch.arange(len(slots) - len(q), len(slots))[:, None] - torch.arange(len(slots))).expand(
                1, -1, -1
            )
            seen = (behind >= 0) & (behind < (window or len(slots) + 1))
            out.append(
                F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, seen).transpose(0, 1).nan_to_num(0)
            )
        return torch.cat(out)


def attention_decode(num_q: int, num_kv: int, dim: int) -> None:
    for page_size, lens in itertools.product((1, 16), ([300], [0, 1, 17, 129, 304])):
        paged = Paged(num_q, num_kv, dim, page_size, lens, [1] * len(lens))
        (q, cache), backend = paged.inputs(), CudaBackend(paged.shape, DEVICE)
        for window, cluster in ((None, 0), (100, 0), (1, 0), (None, 1), (100, 2), (None, 16), (1, 16)):
            for early in (None, torch.ones(1, dtype=torch.int32, device=DEVICE)):
                out = torch.empty(paged.q.shape, dtype=DTYPE, device=DEVICE)
                backend.launch(q, cache, window or 0, paged.step.on_device(), out, cluster, early)
                what = "attention_decode", num_q, num_kv, dim, page_size, lens, window, cluster, early is not None
                check(what, [out], [paged.reference(window)])


def delta_net(lengths: list[int]) -> None:
    for num_k, k_dim, num_v, v_dim in ((2, 16, 4, 24), (1, 128, 2, 128)):
        channels, num = 2 * num_k * k_dim + num_v * v_dim, len(lengths)
        qkvz, ba = randn(sum(lengths), channels + num_v * v_dim), randn(sum(lengths), 2 * num_v)
        weights = DeltaWeights(randn(channels, 4), torch.rand(num_v), torch.randn(num_v), randn(v_dim), EPS)
        a_log, dt_bias = weights.a_log.to(DEVICE), weights.dt_bias.to(DEVICE)
        ours = DeltaWeights(up(weights.conv), a_log, dt_bias, up(weights.norm), EPS)
        state = DeltaState(randn(num + 1, channels, 3), torch.randn(num + 1, num_v, k_dim, v_dim))
        copy = DeltaState(up(state.conv), up(state.memory, torch.float32))
        seqs = StateSequences(torch.randperm(num + 1)[:num].int(), torch.tensor([0, *lengths]).cumsum(0).int())
        there = StateSequences(up(seqs.slots), up(seqs.cu_q))
        out = DeltaOps().gated_delta_net(up(qkvz), up(ba), ours, copy, there)
        want = REFERENCE.gated_delta_net(qkvz, ba, weights, state, seqs)
        check(("delta", num_k, k_dim, lengths), (out, copy.conv, copy.memory), (want, state.conv, state.memory))


def triton_attention(name: str, lens: list[int], num_new: list[int]) -> None:
    from minisgl.attention.triton import TritonBackend

    for num_q, num_kv, dim, page_size in ((10, 2, 128, 1), (10, 2, 128, 64), (3, 3, 80, 5)):
        paged = Paged(num_q, num_kv, dim, page_size, lens, num_new)
        for window in (None, 20):
            backend, spec = TritonBackend(paged.shape, DEVICE), AttentionSpec(PagedKV(num_kv, dim, dim), window)
            out = backend.forward(*paged.inputs(), spec, backend.prepare(paged.step, captured=False))
            check((name, num_q, num_kv, dim, page_size, window), [out], [paged.reference(window)])


def grouped_gemm() -> None:
    from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe

    for n, num_experts, hidden, inner, top_k in ((1, 4, 64, 96, 2), (40, 9, 40, 24, 3), (150, 3, 128, 64, 1)):
        x, logits = randn(n, hidden), torch.randn(n, num_experts)
        weights = randn(num_experts, 2 * inner, hidden), randn(num_experts, hidden, inner)
        kind = top_k, True, None, False, torch.cuda.get_device_capability()
        out = fused_moe(up(x), up(logits, torch.float32), Stack(up(weights[0])), Stack(up(weights[1])), *kind)
        moe = MoE(num_experts, top_k, inner, True)
        stacks = [{"weight": weight} for weight in weights]
        expected = DENSE.experts(REFERENCE, stacks[0], stacks[1], moe)(x, logits)
        check(("moe", n, num_experts), [out], [expected])


def experts() -> None:
    """MXFP4, in blocks of all sizes; rows so long that buffers are filled again."""
    from minisgl.kernel.triton.grouped_gemm import fused_moe, stack_of

    arch, num_experts, hidden, inner = torch.cuda.get_device_capability(), 8, 416, 160
    stacks, weights = [], []
    for rows, cols in ((2 * inner, hidden), (hidden, inner)):
        data = torch.randint(0, 256, (num_experts, rows, cols // 32, 17), dtype=torch.uint8)
        data[..., 0] = torch.randint(118, 122, data.shape[:3])
        blocks = [Blocks("MXFP4", expert.flatten(1), cols) for expert in data]
        stacks.append(stack_of((DTYPE, [[replace(part, data=up(part.data))] for part in blocks]), rows > hidden, arch))
        weights.append(torch.stack([part.dequantize() for part in blocks]).to(DTYPE).float())
    for n in (1, 5, 13, 30, 90, 400):
        x, logits = randn(n, hidden), torch.randn(n, num_experts)
        out = fused_moe(up(x), up(logits, torch.float32), stacks[0], stacks[1], 2, True, arch=arch)
        first, second = ({"weight": weight} for weight in weights)
        expected = DENSE.experts(REFERENCE, first, second, MoE(num_experts, 2, inner, True))(x, logits)
        check(("experts", n), [out], [expected])


def packed(m: int) -> None:
    """4 bits, with this GPU's kernels and with those of 8.6."""
    for arch, group, n, k, gated in (((9, 0), 128, 96, 384, True), ((8, 6), 32, 208, 640, False)):
        generator = torch.Generator().manual_seed(m)
        codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 16, (n, k // group), generator=generator, dtype=torch.uint8)
        part = Grouped(codes, torch.rand(zeros.shape, generator=generator).half() / 100, zeros)
        ours = Grouped(up(codes), up(part.scales), up(zeros))
        x, residual = randn(m, k), randn(m, n)
        packed = codes_of([ours])
        assert packed is not None
        matrix = PackedMatrix(CudaOps(arch), arch, packed, DTYPE, "silu" if gated else None)
        product, around = x @ part.dequantize().T, Around(residual=None if gated else up(residual), gated=gated)
        expected = REFERENCE.act_and_mul(product) if gated else product + residual
        check(("packed", m, arch, gated), [matrix.apply(up(x), around)], [expected])


TOKENS = (17, 50, 100, 150, 180, 201)  # for every tile


def tests_of(file: str, some: str) -> None:
    """Kernels by some of their tests, where torch's kernels are checked beside ours."""
    path = Path(__file__).resolve().parent.parent / "tests" / "integration" / file
    if pytest.main(["-q", "-n0", "-p", "no:cacheprovider", str(path), "-k", some]):
        raise ValueError("a test failed")


GROUPS: dict[str, Callable[[], None]] = {f"decode_gemm_{m}": partial(gemm, m) for m in TOKENS}
GROUPS |= {
    f"attention_decode_{q}_{kv}_{dim}": partial(attention_decode, q, kv, dim)
    for q, kv, dim in ((40, 8, 128), (16, 1, 128), (3, 3, 64), (16, 4, 256))
}
GROUPS |= {f"float8_{kind}": partial(float8_products, kind == "block") for kind in ("row", "block")}
GROUPS |= {f"packed_gemm_{m}": partial(packed, m) for m in (1, 7, 16, 60, 130, 300)}
GROUPS |= {"skinny_gemm": skinny_gemm, "elementwise": elementwise, "step": step, "sampling": sampling}
GROUPS["norm_router"] = norm_router
GROUPS["triton_prefill"] = partial(triton_attention, "prefill", [1, 70, 145], [1, 33, 45])
GROUPS["triton_decode"] = partial(triton_attention, "decode", [0, 1, 64, 304], [1, 1, 1, 1])
GROUPS["triton_grouped_gemm"], GROUPS["experts"] = grouped_gemm, experts
some = "mixed-True or nobodys or no_numbers or 509 or 300-64 or moved"
GROUPS["draft"] = partial(tests_of, "test_draft_kernels.py", some)
some = "test_drafts and False and bfloat16 and 12 or prepared and not 128"
GROUPS["delta_drafts"] = partial(tests_of, "test_delta_kernel.py", some)
GROUPS |= {"delta_tokens": partial(delta_net, [1] * 5), "delta_chunks": partial(delta_net, [1, 2, 70, 1, 130])}
GROUPS["delta_stream"] = partial(delta_net, [1] * 20 + [2] + [1] * 120)


def run_groups(names: list[str]) -> int:
    num_failed = 0
    for name in names:
        torch.manual_seed(0)
        begin = time.monotonic()
        try:
            GROUPS[name]()
        except Exception as error:  # a kernel's fault, or the checker's; the others are still worth a line
            num_failed += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{name}: ok in {time.monotonic() - begin:.1f} s", flush=True)
    return int(num_failed > 0)


def run_one(command: list[str], log: Path, deadline: float) -> str:
    """What the command wrote, which goes to `log` too; it and its children are killed at `deadline`."""
    if time.monotonic() >= deadline:
        return "not started: no time left"
    with log.open("wb") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)
        try:
            process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out.write(b"\nkilled: no time left\n")
    return log.read_text(errors="replace")


def run_tools(names: list[str], seconds: float, sanitizer: str, logs: Path, jobs: int) -> int:
    """One line for each tool and group. Exit status 0: every group ended well, without an error."""
    this, num_bad = [sys.executable, str(Path(__file__).resolve())], 0
    with ThreadPoolExecutor(jobs) as pool:
        limit = time.monotonic() + BUILD_SECONDS
        built = {name: pool.submit(run_one, [*this, name], logs / f"{name}.log", limit) for name in names}
        usable = [name for name in names if f"{name}: ok" in built[name].result()]
        limit = time.monotonic() + seconds
        pairs = [(tool, name) for name in usable for tool in TOOLS]
        futures = []
        for i, (tool, name) in enumerate(pairs):
            # Each needs ports of its own: it takes one of ten from the base on.
            options = ["--tool", tool, "--port", str(49152 + 10 * i), "--launch-timeout", "120", "--print-limit", "20"]
            options += ["--target-processes", "application-only", "--show-backtrace", "device"]
            if tool == "memcheck":  # PyTorch asks CUDA things that may fail
                options += ["--padding", "64", "--report-api-errors", "no"]
            command = [sanitizer, *options, *this, name]
            futures.append(pool.submit(run_one, command, logs / f"{tool}-{name}.log", limit))
    results = [("(none)", name, built[name].result()) for name in names]
    results += [(tool, name, future.result()) for (tool, name), future in zip(pairs, futures, strict=True)]
    for tool, name, text in results:
        counts = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)
        errors, ended = (counts[-1] if counts else "-"), f"{name}: ok" in text
        lines = [line.lstrip("= ") for line in text.splitlines() if "SUMMARY" not in line and "COMPUTE-SAN" not in line]
        note = next(
            (line for line in lines if re.search(r"FAILED|no time|[Ee]rror|Invalid|Race|Uninit|hazard", line)), ""
        )
        is_good = ended and (tool == "(none)" or errors == "0")
        num_bad += not is_good
        print(f"{tool:10} {name:28} {errors:>6}  {'ok' if is_good else note or 'no report'}"[:200])
    print(f"{num_bad} of {len(results)} are not clean; logs: {logs}")
    return int(num_bad > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""], metavar="NAME", help="beginnings of: " + ", ".join(GROUPS))
    parser.add_argument("--all-tools", action="store_true", help="run compute-sanitizer, with each of its tools")
    parser.add_argument("--seconds", type=float, default=60, help="for all of --all-tools, once it has compiled")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--sanitizer", help="compute-sanitizer's path; default: that on PATH, or of the CUDA toolkit")
    parser.add_argument("--logs", type=Path, help="folder for what the tools write; default: a new one in the system's")
    args = parser.parse_args()
    names = [name for name in GROUPS if any(name.startswith(start) for start in args.names)]
    if not names:
        parser.error(f"no group begins with {' or '.join(args.names)}")
    if not args.all_tools:
        with torch.inference_mode():
            return run_groups(names)
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    sanitizer = args.sanitizer or shutil.which("compute-sanitizer") or str(toolkit)
    if not shutil.which(sanitizer):
        parser.error(f"{sanitizer} is not there: --sanitizer names another")
    logs = args.logs or Path(tempfile.mkdtemp(prefix="sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)
    return run_tools(names, args.seconds, sanitizer, logs, max(1, args.jobs))


if __name__ == "__main__":
    sys.exit(main())
