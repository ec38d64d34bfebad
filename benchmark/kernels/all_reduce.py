"""All-reduce between GPUs of one host: over peer memory (one-shot, two-shot) and through NCCL; gather and broadcast.

    python benchmark/kernels/all_reduce.py --ranks 4 [--blocks 16,32,64,128] [--limit 150]

Starts one process per GPU, compares both algorithms with NCCL and with float64 sums, replays a graph with changing
inputs, then prints microseconds per call: graphs of 50 calls one after the other, bf16, the median of 9 replays. What a
call costs inside a model differs: there it also waits for the slowest rank. `--blocks` compares grid sizes instead.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from minisgl.distributed.comm import Rendezvous
from minisgl.distributed.cuda import CudaCommunicator
from minisgl.kernel.peer_memory import HALF_BYTES, ONE_SHOT_BYTES, TWO_SHOT_BYTES

CALLS, REPLAYS = 50, 9
SIZES = [2048 << i for i in range(13)]  # bytes, 2 KiB to 8 MiB
MODEL_SIZES = [10 << 10, 160 << 10, 2560 << 10]  # Qwen3-32B (hidden size 5120): 1, 16 and 256 tokens
VOCAB = 151936


def microseconds(call: Callable[[], Any], calls: int = CALLS) -> float:
    """Per call, inside a graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(2 + REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[2:])


def has_room(num_bytes: int, size: int, two_shot: bool) -> bool:
    return num_bytes * (2 if two_shot else size) + (4096 if two_shot else 0) <= HALF_BYTES


def check(comm: CudaCommunicator) -> None:
    """Largest error of each way against float64; the two algorithms must agree bit by bit."""
    assert comm.peers is not None
    worst = {"one-shot": 0.0, "two-shot": 0.0, "NCCL": 0.0}
    generator = torch.Generator("cuda").manual_seed(1)
    for num_bytes in SIZES + MODEL_SIZES:
        parts = [torch.randn(num_bytes // 2, generator=generator, device="cuda").bfloat16() for _ in range(comm.size)]
        x, right = parts[comm.rank], torch.stack(parts).double().sum(0)
        outs = {name: torch.empty_like(x) for name in worst}
        comm.peers.all_reduce(x, outs["two-shot"], True)
        if has_room(num_bytes, comm.size, False):
            comm.peers.all_reduce(x, outs["one-shot"], False)
        else:
            outs["one-shot"].copy_(outs["two-shot"])
        comm.nccl.all_reduce(x, outs["NCCL"])
        assert torch.equal(outs["one-shot"], outs["two-shot"]), num_bytes
        for name, out in outs.items():
            worst[name] = max(worst[name], float((out.double() - right).abs().max()))
    if comm.rank == 0:
        print("largest error of sums of", comm.size, "normal numbers:", {k: f"{v:.4f}" for k, v in worst.items()})
    assert worst["one-shot"] <= worst["NCCL"] + 1e-6


def check_replays(comm: CudaCommunicator, replays: int = 300) -> None:
    """A graph of mixed sizes with changing inputs; ranks sleep at random. Counts wrong sums on the device."""
    peers = comm.peers
    assert peers is not None
    sizes = (5120, 640, 2 << 20, 81920, 8, 5120, 1 << 20, 40)
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    patterns = [torch.arange(n, device="cuda") for n in sizes]

    def part(pattern: torch.Tensor, rank: int) -> torch.Tensor:  # whole numbers whose sums are exact in bf16
        return (pattern * (rank + 3) + seed * (rank + 1)) % 31

    def step() -> None:
        for i, pattern in enumerate(patterns):
            out = part(pattern, comm.rank).bfloat16()
            peers.all_reduce(out, out, i % 3 == 2 or None)
            right = sum((part(pattern, rank) for rank in range(1, comm.size)), part(pattern, 0))
            wrong.add_((out != right).sum())
        seed.add_(1)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(replays):
        torch.cuda._sleep((i * 7919 * (comm.rank + 1)) % 200_000)
        graph.replay()
    torch.cuda.synchronize()
    assert int(wrong) == 0, f"rank {comm.rank}: {int(wrong)} wrong sums in {replays} replays"


def table(comm: CudaCommunicator) -> None:
    peers = comm.peers
    assert peers is not None
    if comm.rank == 0:
        print(f"\n{comm.size} ranks\n{'KiB':>8} {'one-shot us':>12} {'two-shot us':>12} {'NCCL us':>9}  chosen")
    for num_bytes in sorted(SIZES + MODEL_SIZES):
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
        out = torch.empty_like(x)
        cells = []
        for two_shot in (False, True):
            if has_room(num_bytes, comm.size, two_shot):
                cells.append(f"{microseconds(lambda: peers.all_reduce(x, out, two_shot)):12.2f}")  # noqa: B023
            else:
                cells.append(f"{'-':>12}")
        cells.append(f"{microseconds(lambda: comm.nccl.all_reduce(x, out)):9.2f}")  # noqa: B023
        one, two = num_bytes <= ONE_SHOT_BYTES[comm.size], num_bytes <= TWO_SHOT_BYTES
        if comm.rank == 0:
            print(
                f"{num_bytes / 1024:8.0f}",
                *cells,
                f" {'one-shot' if one else 'two-shot' if two else 'NCCL'}",
                flush=True,
            )


def block_table(comm: CudaCommunicator, blocks: list[int]) -> None:
    peers = comm.peers
    assert peers is not None
    if comm.rank == 0:
        print(f"\n{comm.size} ranks, us by number of blocks\n{'KiB':>8} {'':8}", *(f"{n:8}" for n in blocks))
    for num_bytes in sorted(SIZES + MODEL_SIZES):
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
        for two_shot in (False, True):
            if not has_room(num_bytes, comm.size, two_shot):
                continue
            cells = [microseconds(lambda: peers.all_reduce(x, x, two_shot, n)) for n in blocks]  # noqa: B023
            if comm.rank == 0:
                name = "two-shot" if two_shot else "one-shot"
                print(f"{num_bytes / 1024:8.0f} {name}", *(f"{cell:8.2f}" for cell in cells), flush=True)


def gather(comm: CudaCommunicator, x: torch.Tensor) -> torch.Tensor:
    """x: [rows, n] of every rank → [rows, size * n] on rank 0, by NCCL."""
    parts = x.new_empty((comm.size, *x.shape))
    comm.nccl.gather(x, parts)
    return parts.movedim(0, 1).reshape(len(x), -1)


def table_of_others(comm: CudaCommunicator) -> None:
    assert comm.peers is not None
    if comm.rank == 0:
        print(f"\nlogits of {VOCAB} in bf16\n{'rows':>8} {'gather us':>12} {'NCCL gather + permute us':>30}")
    for rows in (1, 16, 64, 256):
        x = torch.zeros(rows, VOCAB // comm.size, dtype=torch.bfloat16, device="cuda")
        assert comm.peers.takes_rows(x)
        cells = microseconds(lambda: comm.gather(x), 10), microseconds(lambda: gather(comm, x), 5)  # noqa: B023
        if comm.rank == 0:
            print(f"{rows:8} {cells[0]:12.2f} {cells[1]:30.2f}", flush=True)
    ids = torch.zeros(256, dtype=torch.int32, device="cuda")
    cells = microseconds(lambda: comm.broadcast(ids)), microseconds(lambda: comm.nccl.broadcast(ids))
    if comm.rank == 0:
        print(f"\nbroadcast of 256 ids: {cells[0]:.2f} us, NCCL {cells[1]:.2f} us", flush=True)


def work(rank: int, args: argparse.Namespace, path: str) -> None:
    start = time.perf_counter()
    meeting = Rendezvous(rank, args.ranks, f"file://{path}")
    comm = CudaCommunicator(meeting, gather_bytes=256 * VOCAB * 2)
    if comm.peers is None:
        raise SystemExit("no peer memory: see the warning above")
    if rank == 0:
        print(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ready in {time.perf_counter() - start:.1f} s"
        )
    check(comm)
    check_replays(comm)
    if args.blocks:
        block_table(comm, [int(n) for n in args.blocks.split(",")])
    else:
        table(comm)
        table_of_others(comm)
    torch.cuda.synchronize()
    comm.close()


def run_rank(rank: int, args: argparse.Namespace, path: str) -> None:
    try:
        work(rank, args, path)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a CUDA context that failed must not be torn down in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--blocks", default="", help="compare these numbers of blocks, separated by commas")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which everything is killed")
    args = parser.parse_args()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        arguments = [(rank, args, f"{directory}/meeting") for rank in range(args.ranks)]
        processes = [context.Process(target=run_rank, args=given) for given in arguments]
        for process in processes:
            process.start()
        deadline = time.monotonic() + args.limit
        while any(process.is_alive() for process in processes):
            failed = any(process.exitcode not in (None, 0) for process in processes)
            if failed or time.monotonic() > deadline:
                time.sleep(1)  # for the others' words
                print("a rank failed" if failed else f"not done after {args.limit:.0f} s", file=sys.stderr)
                for process in processes:
                    process.kill()
            time.sleep(0.1)
        for process in processes:
            process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
