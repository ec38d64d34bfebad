"""Collectives between GPUs, in spawned processes, against sums and concatenations computed by each rank alone."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.distributed.comm import Rendezvous
from minisgl.distributed.cuda import CudaCommunicator
from minisgl.errors import ConfigError

NUM_GPUS = torch.cuda.device_count()
MIB = 1 << 20


def gpus(size: int) -> Any:
    return pytest.param(size, marks=pytest.mark.skipif(size > NUM_GPUS, reason=f"{NUM_GPUS} GPUs, needs {size}"))


def random_parts(size: int, n: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """What each rank contributes; every rank knows it all."""
    generator = torch.Generator("cuda").manual_seed(seed)
    if dtype == torch.int32:
        return [torch.randint(-1000, 1000, (n,), generator=generator, device="cuda", dtype=dtype) for _ in range(size)]
    return [torch.randn(n, generator=generator, device="cuda").to(dtype) for _ in range(size)]


def exact_sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """In fp32 in the order of ranks, rounded once."""
    if parts[0].dtype == torch.int32:
        return torch.stack(parts).sum(0, dtype=torch.int32)
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def check_sums(comm: Any) -> None:
    """Both algorithms bit by bit, in place and not; the communicator's own choice against float64."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32):
        for seed, n in enumerate((1, 7, 8, 9, 4096, 5120, 100_008, MIB // 4, 2 * MIB - 3, 2 * MIB)):
            parts = random_parts(comm.size, n, dtype, seed)
            mine, expected = parts[comm.rank], exact_sum(parts)
            for two_shot in (False, True) if comm.peers is not None else ():
                if not comm.peers.takes(mine, 8 * MIB if two_shot else MIB):
                    continue
                out, before = torch.full_like(mine, 77), mine.clone()
                comm.peers.all_reduce(mine, out, two_shot)
                assert torch.equal(out, expected), (dtype, n, two_shot)
                assert torch.equal(mine, before), "the input of an out-of-place sum changed"
                comm.peers.all_reduce(before, before, two_shot)
                assert torch.equal(before, expected), (dtype, n, two_shot, "in place")
            total = torch.stack(parts).double().sum(0)
            bound = torch.stack(parts).double().abs().sum(0) * (0 if dtype == torch.int32 else torch.finfo(dtype).eps)
            out = comm.all_reduce(mine.clone(), torch.empty_like(mine))
            assert bool(((out.double() - total).abs() <= 2 * bound).all()), (dtype, n)
    zeros = torch.full((4096,), -0.0, device="cuda", dtype=torch.bfloat16)
    assert bool((comm.all_reduce(zeros) == 0).all()), "negative zeros mark empty slots and must still arrive"
    row = torch.arange(4096 * 2, device="cuda").view(2, 4096).t().to(torch.float32)  # not contiguous
    assert torch.equal(comm.all_reduce(row.clone().t().contiguous().t()), row * comm.size)


def check_graphs(comm: Any) -> None:
    """Replays with fresh inputs while ranks drift apart: a slot reused too early would show as a wrong sum."""
    sizes = (8, 5120, 640, 81920, 3000, 2 * MIB, 24, 5120, 1 * MIB)
    inputs = [torch.zeros(n, dtype=torch.bfloat16, device="cuda") for n in sizes]
    ids = torch.zeros(5, dtype=torch.int32, device="cuda")

    def step() -> list[torch.Tensor]:
        outputs = []
        for i, x in enumerate(inputs):
            if i == 3:
                outputs.append(comm.broadcast(ids.clone()))
            outputs.append(comm.all_reduce(x, torch.empty_like(x)))
        return outputs

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    chance = random.Random(comm.rank)
    for seed in range(60):
        parts = [random_parts(comm.size, n, torch.bfloat16, 100 * seed + i) for i, n in enumerate(sizes)]
        expected = [exact_sum(part) for part in parts]
        expected.insert(3, torch.arange(5, device="cuda", dtype=torch.int32) + seed)
        for x, part in zip(inputs, parts, strict=True):
            x.copy_(part[comm.rank])
        ids.copy_(expected[3] if comm.rank == 0 else expected[3] * 3 + 1)
        for _ in range(3):
            torch.cuda._sleep(chance.randrange(400_000))
            graph.replay()
        for i, (out, right) in enumerate(zip(outputs, expected, strict=True)):
            close = torch.isclose(out.float(), right.float(), rtol=0.03, atol=0.06)  # NCCL may round in between
            assert torch.equal(out, right) if comm.peers is not None else bool(close.all()), (seed, i)


def check_gathers(comm: Any) -> None:
    for n, share, dtype in (
        (1, 64, torch.bfloat16),
        (5, 37984, torch.bfloat16),
        (3, 7, torch.float32),
        (2, 4, torch.int64),
    ):
        for seed in range(4):
            parts = [part.view(n, share) for part in random_parts(comm.size, n * share, torch.float32, seed)]
            parts = [(100 * part).to(dtype) for part in parts]
            expected = torch.cat(parts, dim=1)
            torch.cuda._sleep(random.Random(comm.rank).randrange(400_000))
            found = comm.gather(parts[comm.rank])
            assert found.shape == expected.shape
            assert comm.rank > 0 or torch.equal(found, expected), (n, share)


def check_gather_graph(comm: Any) -> None:
    x = torch.zeros(16, 128, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = torch.zeros(16, 128 * comm.size, dtype=torch.float32, device="cuda")
        for _ in range(5):
            total += comm.gather(x)
    for seed in range(20):
        x.fill_(comm.rank + seed)
        torch.cuda._sleep(random.Random(100 * seed + comm.rank).randrange(400_000))
        graph.replay()
        expected = torch.arange(comm.size, device="cuda").repeat_interleave(128).float() + seed
        assert comm.rank > 0 or torch.equal(total, 5 * expected.expand(16, -1)), seed


def check_broadcasts(comm: Any) -> None:
    for dtype, n in ((torch.int32, 1), (torch.int32, 256), (torch.int64, 3), (torch.float32, 9), (torch.bfloat16, MIB)):
        right = (torch.arange(n, device="cuda") % 1000).to(dtype)
        x = right.clone() if comm.rank == 0 else torch.full_like(right, 9)
        assert torch.equal(comm.broadcast(x), right), (dtype, n)
    assert comm.all_reduce_min(10 + comm.rank) == 10


def check_everything(rank: int, size: int, path: str, use_pynccl: bool) -> None:
    comm = CudaCommunicator(Rendezvous(rank, size, f"file://{path}"), use_pynccl, gather_bytes=4 * MIB)
    for check in (check_sums, check_graphs, check_gathers, check_gather_graph, check_broadcasts):
        check(comm)
        torch.cuda.synchronize()
    comm.close()


def lose_a_rank(rank: int, size: int, path: str, use_pynccl: bool) -> None:
    from minisgl.kernel.jit import load_kernel

    load_kernel("all_reduce", torch.cuda.get_device_capability())  # compiling takes longer than the timeout
    meeting = Rendezvous(rank, size, f"file://{path}", timedelta(seconds=15))
    comm = CudaCommunicator(meeting, use_pynccl)
    assert comm.peers is not None, "no peer memory on this machine"
    if rank == size - 1:
        time.sleep(35)  # alive, so that its memory stays mapped, but silent
    else:
        comm.all_reduce(torch.ones(8, device="cuda"))
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.cuda.synchronize()


def rank_process(function: Callable[..., None], rank: int, arguments: tuple[Any, ...], results: Any) -> None:
    try:
        function(rank, *arguments)
        results.put((rank, ""))
    except BaseException:
        results.put((rank, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)  # a CUDA context that failed must not be torn down in order


def run_ranks(function: Callable[..., None], size: int, tmp_path: Path, *arguments: Any, seconds: float = 200) -> None:
    context = mp.get_context("spawn")
    results = context.Queue()
    given = size, str(tmp_path / "meeting"), *arguments
    processes = [context.Process(target=rank_process, args=(function, rank, given, results)) for rank in range(size)]
    for process in processes:
        process.start()
    found: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    try:
        while len(found) < size and not any(found.values()):
            assert time.monotonic() < deadline, f"only ranks {sorted(found)} answered"
            assert all(process.exitcode in (None, 0) for process in processes), "a rank was killed"
            try:
                rank, error = results.get(timeout=1)
            except queue.Empty:
                continue
            found[rank] = error
    finally:
        for process in processes:
            process.join(5) if len(found) == size else process.kill()
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        results.close()
        results.join_thread()
    for rank, error in found.items():
        assert not error, f"rank {rank}: {error}"


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [gpus(2), gpus(4), gpus(8)])
def test_collectives(size: int, tmp_path: Path) -> None:
    run_ranks(check_everything, size, tmp_path, True)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [gpus(2)])
@pytest.mark.parametrize("use_pynccl", [True, False])
def test_collectives_without_peer_memory(
    size: int, use_pynccl: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISGL_PEER_MEMORY", "0")
    run_ranks(check_everything, size, tmp_path, use_pynccl)


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [gpus(2)])
def test_a_rank_that_falls_silent_does_not_hang_the_others(size: int, tmp_path: Path) -> None:
    run_ranks(lose_a_rank, size, tmp_path, True)


def test_ranks_exchange_texts(tmp_path: Path) -> None:
    meetings = [Rendezvous(rank, 3, f"file://{tmp_path}/meeting") for rank in range(3)]
    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        meeting = meetings[rank]
        meeting.after_rank_0("load")
        found[rank] = meeting.exchange("names", "abc"[:rank]), meeting.all_left("end", 30)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), (["", "a", "ab"], True))


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    timeout = timedelta(seconds=0.2)
    first, last = (Rendezvous(rank, 3, f"file://{tmp_path}/meeting", timeout) for rank in (0, 2))
    with pytest.raises(ConfigError, match="rank 0 waited 0 s for rank 1, 2 at 'start'"):
        first.exchange("start", "")
    with pytest.raises(ConfigError, match="rank 2 waited 0 s for rank 1 at 'start'"):
        last.exchange("start", "")
    assert not first.all_left("end", 0.1)
