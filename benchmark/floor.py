"""The floor of the standard workload and of single decode steps: what no engine can beat on a machine.

    python benchmark/floor.py [--shape NAME|DIR ...] [--tp N ...] [--bandwidth 4.3e12 --peak-flops 788e12]

`minisgl.benchmark.floor` says what is counted. The ceilings are those of the GPU at hand, measured, or else an H200's.
"""

from __future__ import annotations

import argparse

from minisgl.benchmark import offline, run_script
from minisgl.benchmark.floor import Machine, floor_of, kv_read, weights_read
from minisgl.benchmark.serve import machine_of
from minisgl.benchmark.shapes import SHAPES, read_shape


def standard_load() -> list[tuple[int, int, int]]:
    """(prompt, output, cached) tokens of the standard workload's requests."""
    args = offline.make_parser().parse_args(["--workload", "standard"])
    offline.fill_in(args)
    return [(len(sample.prompt), sample.output_len, 0) for sample in offline.make_samples(args)[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help=", ".join(SHAPES) + ", or a directory")
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--bandwidth", type=float)
    parser.add_argument("--peak-flops", type=float)
    parser.add_argument("--context", type=int, default=192, help="tokens of a stream's context in a step")
    args = parser.parse_args()
    machine, load = machine_of(args, "cuda") or Machine(), standard_load()
    print(f"ceilings: {machine}")
    num_output = sum(n for _, n, _ in load)
    print(f"standard workload: {sum(n for n, _, _ in load)} prompt tokens, {num_output} output tokens")
    print("| shape | GPUs | floor, tok/s | s: KV + weights + prefill | 1 stream, ms | 16 streams, ms |")
    print("|---|---|---|---|---|---|")
    for shape in args.shape:
        model = read_shape(shape)
        for tp_size in args.tp:
            floor = floor_of(model, args.dtype, load, machine, tp_size)
            steps = []
            for count in (1, 16):
                kv_bytes = kv_read(model, args.dtype, [args.context] * count, tp_size)
                num_bytes = kv_bytes + weights_read(model, args.dtype, count, tp_size)
                steps.append(f"{1000 * num_bytes / machine.bandwidth:.3f}")
            parts = f"{floor.kv:.2f} + {floor.weights:.2f} + {floor.prefill:.2f}"
            print(f"| {shape} | {tp_size} | {num_output / floor.seconds:,.0f} | {parts} | {' | '.join(steps)} |")


if __name__ == "__main__":
    run_script(main)
