"""Triton's mixture of experts at Qwen3-30B-A3B's shape: correct first, then microseconds per layer by number of tokens.

    python benchmark/kernels/moe.py [--seconds 58]

The share of bandwidth counts the weights of experts that were hit; 128 experts' are 1.2 GB, far more than the L2.
"""

from __future__ import annotations

import argparse
import signal
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from minisgl.kernel.triton.common import Tile
from minisgl.kernel.triton.grouped_gemm import Stack, fused_moe, moe_config

Tensor = torch.Tensor
EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
SIZES = (1, 16, 64, 256, 1024, 8192)
# Beside the default: what else may be best at some sizes.
VARIANTS: dict[int, list[tuple[Tile, Tile]]] = {
    1: [(Tile(16, 32, 4, 3, 256), Tile(16, 32, 4, 3, 256))],
    64: [(Tile(16, 64, 4, 5, 64), Tile(16, 128, 4, 5, 64))],
    8192: [
        (Tile(128, 128, 8, 3, 64), Tile(128, 256, 8, 3, 64)),
        (Tile(64, 128, 4, 3, 64), Tile(64, 128, 4, 4, 64)),
    ],
}


def reference(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(x.shape, device=DEVICE)
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(TOP_K, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).float().chunk(2, -1)
        y = F.linear((F.silu(gate) * up).to(DTYPE), down[expert]).float()
        out.index_add_(0, token, y * weights[token, choice, None])
    return out


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


def bench(config: tuple[Tile, Tile], num_tokens: int, gate_up: Tensor, down: Tensor) -> list[str]:
    inputs = [torch.randn(num_tokens, HIDDEN, device=DEVICE, dtype=DTYPE) for _ in range(4)]
    logits = [torch.randn(num_tokens, EXPERTS, device=DEVICE) for _ in range(4)]  # so that experts differ too
    kind = TOP_K, True, config, False, torch.cuda.get_device_capability()
    out = fused_moe(inputs[0], logits[0], Stack(gate_up), Stack(down), *kind)
    expected = reference(inputs[0], logits[0], gate_up, down)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    taken = seconds(lambda i: fused_moe(inputs[i], logits[i], Stack(gate_up), Stack(down), *kind), 4)
    hit = statistics.mean(len(x.topk(TOP_K, dim=-1).indices.unique()) for x in logits)
    num_bytes, flops = hit * 3 * HIDDEN * INNER * 2, 6 * num_tokens * TOP_K * HIDDEN * INNER
    return [f"{taken * 1e6:.1f}", f"{num_bytes / taken / 1e9:.0f}", f"{flops / taken / 1e12:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=58, help="give up after as many")
    signal.alarm(parser.parse_args().seconds)
    torch.manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device=DEVICE, dtype=DTYPE) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, device=DEVICE, dtype=DTYPE) / INNER**0.5
    table = [("tokens", "blocks m/n/k, warps, stages of gate_up; down", ["us", "GB/s", "TFLOP/s"])]
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for size in SIZES:
        default = moe_config(size * TOP_K, EXPERTS, DTYPE, torch.cuda.get_device_capability())
        for c in [default, *VARIANTS.get(size, [])]:
            try:
                row = bench(c, size, gate_up, down)
            except Exception as error:  # one variant's failure is a result too
                row = [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"]
            g, d = c
            name = (
                f"{g.block_m}/{g.block_n}/{g.block_k}, {g.num_warps}, {g.num_stages}; "
                f"{d.block_m}/{d.block_n}/{d.block_k}, {d.num_warps}, {d.num_stages}"
            )
            table.append((str(size), name, row))
            print(*table[-1], flush=True)
    print()
    for tokens, name, row in table:
        print(f"| {tokens:>6} | {name:46} | " + " | ".join(f"{cell:>8}" for cell in row) + " |")


if __name__ == "__main__":
    main()
