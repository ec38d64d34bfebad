"""Mixtures of experts in MXFP4 at gpt-oss-20b's shape: kernels and sizes of blocks, correct first, then microseconds.

    python benchmark/kernels/experts.py [--tokens 256 8192] [--seconds 140] [--profile]

Blocks of 16 or 32 pairs are `experts.cu`, of 64 or 128 `experts_wide.cu`. The floor is the larger one of what weights
of all experts take to be read (4.26 TB/s) and of the products (780 TFLOP/s).
"""

from __future__ import annotations

import argparse
import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from minisgl.kernel import experts as fp4
from minisgl.kernel.activations import clamped_swiglu
from minisgl.kernel.jit import load_kernel, side_by_side
from minisgl.kernel.packed import Blocks
from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe

Tensor = torch.Tensor
EXPERTS, TOP_K, HIDDEN, INNER = 32, 4, 2880, 2880
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
BANDWIDTH, PEAK = 4.26e12, 780e12
SIZES = (64, 128, 256, 512, 1024, 2048, 8192)
VARIANTS = {"16": ("experts", 16), "32": ("experts", 32), "64": ("experts_wide", 64), "128": ("experts_wide", 128)}


def module_of(source: str, size: int) -> Any:
    kind = {"MINISGL_TOKENS": size} if size >= 64 else {}
    return load_kernel(source, torch.cuda.get_device_capability(), MINISGL_FP16=0, **kind)


def make(num_experts: int, rows: int, cols: int) -> Tensor:
    blocks = torch.randint(0, 256, (num_experts, rows, cols // 32, 17), dtype=torch.uint8, device=DEVICE)
    blocks[..., 0] = torch.randint(118, 124, blocks.shape[:3], device=DEVICE)
    return blocks.flatten(2)


class Mixture:
    def __init__(self, num_experts: int, hidden: int, inner: int) -> None:
        self.blocks = make(num_experts, 2 * inner, hidden), make(num_experts, hidden, inner)
        self.hidden = hidden
        self.biases = [torch.randn(num_experts, each.shape[1], device=DEVICE).to(DTYPE) for each in self.blocks]
        self.gate_up, self.down = (self.stack(i) for i in range(2))

    def stack(self, i: int) -> Stack:
        data, unit = fp4.pack(self.blocks[i], DTYPE, i == 0, torch.cuda.get_device_capability())
        return Stack(data, None, None, 4, unit=unit, bias=self.biases[i])

    def run(self, x: Tensor, logits: Tensor, top_k: int) -> Tensor:
        return fused_moe(
            x, logits, self.gate_up, self.down, top_k, True, None, True, torch.cuda.get_device_capability()
        )

    def reference(self, x: Tensor, logits: Tensor, top_k: int) -> Tensor:
        weights, experts = logits.topk(top_k, dim=-1)
        weights, out = weights.softmax(-1), torch.zeros(x.shape, device=DEVICE)
        for expert in experts.unique().tolist():
            token, choice = (experts == expert).nonzero(as_tuple=True)
            first, second = (
                Blocks("MXFP4", b[expert], b.shape[2] // 17 * 32).dequantize().float() for b in self.blocks
            )
            biases = [bias[expert].float() for bias in self.biases]
            gate, up = (x[token].float() @ first.T + biases[0]).chunk(2, -1)
            y = clamped_swiglu(gate, up).to(DTYPE).float() @ second.T + biases[1]
            out.index_add_(0, token, y * weights[token, choice, None])
        return out


@contextmanager
def chosen(variant: str) -> Iterator[None]:
    size, module = VARIANTS[variant][1], module_of(*VARIANTS[variant])
    with patch.object(fp4, "block_of", lambda *_: size), patch.object(fp4, "load", lambda *_: module):
        yield


def error_of(mixture: Mixture, num_tokens: int, variants: list[str], top_k: int, skew: float = 0.0) -> str:
    num_experts = len(mixture.blocks[0])
    x = torch.randn(num_tokens, mixture.hidden, device=DEVICE).to(DTYPE)
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    logits[:, 1] += skew
    expected = mixture.reference(x, logits, top_k)
    found = []
    for variant in variants:
        with chosen(variant):
            outs = [mixture.run(x, logits, top_k) for _ in range(2)]
        error = ((outs[0].float() - expected).norm() / expected.norm()).item()
        worst = ((outs[0].float() - expected).abs().max() / expected.abs().max()).item()
        same = torch.equal(outs[0], outs[1])
        found.append(
            f"{variant}: {error:.1e} {worst:.1e}{'' if same else ' DIFFERS'}{'' if error < 1e-2 else ' WRONG'}"
        )
    return "; ".join(found)


def seconds(call: Callable[[int], Any], num: int, repeats: int = 7) -> float:
    """Median time of one of `num` calls, all in one CUDA graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num):
            call(i)
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / num)
    return statistics.median(times[1:])


def floor_of(num_tokens: int) -> float:
    weights = EXPERTS * 3 * HIDDEN * INNER
    return max(weights * 17 / 32 / BANDWIDTH, 2 * weights * num_tokens * TOP_K / EXPERTS / PEAK)


def time_of(mixture: Mixture, num_tokens: int, variants: list[str]) -> str:
    num = 8 if num_tokens < 4096 else 3
    inputs = [torch.randn(num_tokens, HIDDEN, device=DEVICE).to(DTYPE) for _ in range(num)]
    logits = [torch.randn(num_tokens, EXPERTS, device=DEVICE) for _ in range(num)]
    floor, cells = floor_of(num_tokens), []
    for variant in variants:
        with chosen(variant):
            taken = seconds(lambda i: mixture.run(inputs[i], logits[i], TOP_K), num)
        cells.append(f"{variant}: {taken * 1e6:.0f} ({floor / taken:.2f})")
    return f"{num_tokens} floor {floor * 1e6:.0f}; " + "; ".join(cells)


def profile(mixture: Mixture, num_tokens: int, variant: str) -> str:
    x = torch.randn(num_tokens, HIDDEN, device=DEVICE).to(DTYPE)
    logits = torch.randn(num_tokens, EXPERTS, device=DEVICE)
    with chosen(variant), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(4):
            mixture.run(x, logits, TOP_K)
        torch.cuda.synchronize()
    rows = [(event.key, event.self_device_time_total / 4) for event in p.key_averages()]
    return f"{num_tokens} {variant}: " + ", ".join(f"{key[-34:]} {us:.0f}" for key, us in rows if us > 1)


def variants_for(num_tokens: int) -> list[str]:
    most = {16: 256, 32: 256, 64: 2048, 128: 1 << 20}
    return [name for name, (_, size) in VARIANTS.items() if size <= 32 or num_tokens >= 64 if num_tokens <= most[size]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--seconds", type=int, default=140, help="give up after as many")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    signal.alarm(args.seconds)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    side_by_side([partial(module_of, *variant) for variant in VARIANTS.values()])
    small = Mixture(5, 320, 192), Mixture(3, 96, 1184)
    for n, mixture, skew in ((3, small[0], 0.0), (40, small[1], 0.0), (700, small[0], 3.0), (333, small[1], 0.0)):
        print("small", n, error_of(mixture, n, list(VARIANTS), 2, skew), flush=True)
    mixture = Mixture(EXPERTS, HIDDEN, INNER)
    print("full", 300, error_of(mixture, 300, list(VARIANTS), TOP_K), flush=True)
    for n in args.tokens:
        print(time_of(mixture, n, variants_for(n)), flush=True)
    for n in args.tokens if args.profile else ():
        print(profile(mixture, n, str(fp4.block_of(n * TOP_K, EXPERTS, (9, 0)))), flush=True)


if __name__ == "__main__":
    main()
