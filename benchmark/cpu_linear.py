"""Which linear is fastest on this CPU? fp32, at the shapes of Qwen3-0.6B, for several numbers of rows.

    python benchmark/cpu_linear.py [--threads 2] [--rounds 9]

Variants are interleaved; the median of the rounds is shown, in milliseconds, and how many times F.linear takes that.
With one thread, CPU time is measured, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Linear = Callable[[Tensor], Callable[[Tensor], Tensor]]  # a weight → what multiplies with it
SHAPES = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
LM_HEAD = {"lm_head": (151936, 1024)}
ROWS = (1, 2, 4, 8, 16, 64, 512)


def transposed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    plain = weight.t().contiguous()
    return lambda x: x @ plain


def onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def onednn_packed(rows: int) -> Linear:
    return lambda weight: onednn(torch.ops.mkldnn._reorder_linear_weight(weight, rows))


def mkl_packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 16)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, 16)


VARIANTS: dict[str, Linear] = {
    "F.linear": lambda weight: lambda x: F.linear(x, weight),
    "x @ Wt": transposed,
    "(W @ xT)T": lambda weight: lambda x: (weight @ x.t()).t(),
    "mkl packed": mkl_packed,
    "onednn plain": onednn,
    "onednn packed for 1": onednn_packed(1),
    "onednn packed for 16": onednn_packed(16),
    "onednn packed for 512": onednn_packed(512),
}


def measure(weights: list[Tensor], x: Tensor, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds per call; several weights, so that none stays in the processor's cache."""
    prepared = {name: [make(weight) for weight in weights] for name, make in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, calls in prepared.items():
            start = clock()
            for call in calls:
                call(x)
            times[name].append((clock() - start) / len(calls) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lm-head", action="store_true", help="this shape too: it needs 5 GB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    for shape, (num_out, num_in) in {**SHAPES, **(LM_HEAD if args.lm_head else {})}.items():
        weights = [torch.randn(num_out, num_in) for _ in range(1 if shape in LM_HEAD else 8)]
        for rows in ROWS[:-1] if shape in LM_HEAD else ROWS:
            with torch.inference_mode():
                result = measure(weights, torch.randn(rows, num_in), args.rounds, clock)
            base = result["F.linear"]
            cells = "  ".join(f"{name} {ms:.2f} ({base / ms:.2f}x)" for name, ms in result.items())
            print(f"{shape} [{num_out}, {num_in}], {rows} rows: {cells}", flush=True)


if __name__ == "__main__":
    main()
