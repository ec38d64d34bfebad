"""Gated delta nets on one GPU, at Qwen3.5-4B's and 9B's shape: microseconds a layer, and what share of the bandwidth of
a copy single tokens reach, which is all that bounds them.

    python -m benchmark.kernels.delta [--seconds 120]

A CUDA graph of as many layers as exceed the L2 cache is replayed; the median of the replays, divided by the layers, is
the time of a call. Outputs and states are compared with the reference first: the largest relative error. What a kernel
can reach that changes states where they lie, and reads them in pieces of some size, is measured first.
"""
# mypy: allow-untyped-decorators, disable-error-code="import-not-found, no-untyped-def"

from __future__ import annotations

import argparse
import itertools
import os
import threading

import torch
import triton
import triton.language as tl

from benchmark.kernels.attention_decode import copy_bandwidth, graph_of, median_us
from minisgl.kernel.delta import DeltaOps
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.state import DeltaState, DeltaWeights, StateSequences

HEADS = 16, 128, 32, 128  # of keys, their size, of values, theirs
MIN_BYTES = 512 << 20  # of states in a graph: several times the L2 cache
STEPS = {
    "1 x 8192": [8192],
    "16 x 512": [512] * 16,
    "4 x 512, 200 tokens": [1] * 200 + [512] * 4,
    "1 x 512": [512],
    "1 x 64": [64],
}


@triton.jit
def _negate(states, slots, PIECES: tl.constexpr, SIZE: tl.constexpr):
    piece = tl.program_id(0)
    slot = tl.load(slots + piece // PIECES).to(tl.int64)
    at = states + (slot * PIECES + piece % PIECES) * SIZE + tl.arange(0, SIZE)
    tl.store(at, -tl.load(at))


class Case:
    """A layer's inputs, and the states of several layers."""

    def __init__(self, lengths: list[int], num_layers: int) -> None:
        torch.manual_seed(0)
        num_k, k_dim, num_v, v_dim = HEADS
        channels, num = 2 * num_k * k_dim + num_v * v_dim, len(lengths)
        make = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
        self.qkvz, self.ba = make(sum(lengths), channels + num_v * v_dim), make(sum(lengths), 2 * num_v)
        a_log, dt_bias = torch.rand(num_v, device="cuda"), torch.randn(num_v, device="cuda")
        self.weights = DeltaWeights(make(channels, 4) / 2, a_log, dt_bias, make(v_dim).abs(), 1e-6)
        self.states = [
            DeltaState(make(num + 1, channels, 3), torch.randn(num + 1, num_v, k_dim, v_dim, device="cuda"))
            for _ in range(num_layers)
        ]
        cu_q = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        self.seqs = StateSequences(torch.randperm(num, device="cuda").int(), cu_q)
        self.bytes_of_states = num * (channels * 3 * 2 + num_v * k_dim * v_dim * 4)

    def run(self, state: DeltaState) -> torch.Tensor:
        return DeltaOps().gated_delta_net(self.qkvz, self.ba, self.weights, state, self.seqs)

    def error(self) -> float:
        """Of outputs and memory, beside those of the reference, relative."""
        state = self.states[0]
        other = DeltaState(state.conv.clone(), state.memory.clone())
        want, have = TorchOps().gated_delta_net(self.qkvz, self.ba, self.weights, other, self.seqs), self.run(state)
        pairs = (have, want), (state.memory, other.memory), (state.conv, other.conv)
        return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)

    def time_us(self) -> float:
        """Of a layer."""
        return median_us(graph_of(lambda: [self.run(state) for state in self.states])) / len(self.states)


def pieces(peak: float) -> None:
    """Of the states of 256 sequences in any order: GB/s read and written."""
    layers, slots = torch.randn(2, 256, 1 << 19, device="cuda"), torch.randperm(256, device="cuda").int()
    print(f"{'KiB of a piece':>22} {'us':>8} {'GB/s':>6} {'share':>6}")
    for size in (1 << 10, 1 << 12, 1 << 14):
        num = layers.shape[-1] // size
        graph = graph_of(lambda: [_negate[(256 * num,)](layer, slots, num, size, num_warps=8) for layer in layers])  # noqa: B023
        us = median_us(graph) / len(layers)
        speed = 8 * layers[0].numel() / us / 1000
        print(f"{size >> 8:>22} {us:8.2f} {speed:6.0f} {speed / peak:6.1%}", flush=True)


def tokens(peak: float) -> None:
    print(f"{'tokens':>22} {'us':>8} {'GB/s':>6} {'share':>6} {'error':>8}")
    for num in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        layers = min(48, max(2, MIN_BYTES // (num * 2 << 20)))
        case = Case([1] * num, layers)
        error = case.error()
        us = case.time_us()
        speed = 2 * case.bytes_of_states / us / 1000
        print(f"{num:>22} {us:8.2f} {speed:6.0f} {speed / peak:6.1%} {error:8.5f}", flush=True)
        del case


def chunks() -> None:
    print(f"{'step':>22} {'us':>8} {'error':>8}")
    for name, lengths in STEPS.items():
        case = Case(lengths, 4)
        error = case.error()
        print(f"{name:>22} {case.time_us():8.1f} {error:8.5f}", flush=True)
        del case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=120, help="stop after this long")
    args = parser.parse_args()
    watchdog = threading.Timer(args.seconds, lambda: os._exit(124))
    watchdog.daemon = True
    watchdog.start()
    peak = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a copy moves {peak:.0f} GB/s; bfloat16, heads {HEADS}")
    pieces(peak)
    tokens(peak)
    chunks()


if __name__ == "__main__":
    main()
