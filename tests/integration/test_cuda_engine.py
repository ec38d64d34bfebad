"""What the GPU engine decides on the host: no GPU is needed to see it, nor to see it fail."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from minisgl.engine import cuda
from minisgl.engine.cuda import CudaRunner, open_gpu
from minisgl.engine.memory import large_step
from minisgl.errors import ConfigError, EngineError
from minisgl.kernel import jit
from minisgl.kernel.jit import load_kernel
from tests.driver import engine_config
from tests.models import tiny_model


@pytest.mark.parametrize("page_size", [1, 16, 4096])
def test_the_largest_step_needs_no_more_pages_than_one_request(page_size: int) -> None:
    """Whose keys and values must fit anyway: the pool may be that small, and nobody clears the page table."""
    config = replace(engine_config(tiny_model("qwen3")), page_size=page_size, max_seq_len=100, max_running_requests=64)
    plan = large_step(config, 512)
    assert plan.num_tokens == 512
    assert len(plan.reqs) == 64
    for update, req in zip(plan.page_updates, plan.reqs, strict=True):
        assert len(update.pages) * page_size >= req.num_new
        assert max(update.pages) * page_size < config.max_seq_len


def raises(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize("call", ["init", "set_device"])
def test_a_gpu_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Another program may have it for itself, or all of its memory."""
    answers = {"init": None, "device_count": 1, "set_device": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, call, raises(RuntimeError("CUDA error: device is busy\nCUDA kernel errors might")))
    with pytest.raises(ConfigError, match=r"^--device cuda: GPU 0: CUDA error: device is busy; .* minisgl doctor$"):
        open_gpu(0)


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("echo more; echo 'step.cu(7): error: no such thing'; exit 1", r"step.cu\(7\): error: no such thing"),
        (None, "nvcc: not found"),
        ("exit 0", "No such file or directory"),  # and no library is there
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvcc: str | None, reason: str
) -> None:
    (tmp_path / "bin").mkdir()
    if nvcc is not None:
        (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    else:
        monkeypatch.setattr(jit, "find_nvcc", lambda: None)
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=f"kernel step for sm_90a: .*{reason}.*minisgl doctor") as caught:
        load_kernel("step", (9, 0))
    assert "\n" not in str(caught.value)


def test_each_architecture_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several at the same time; and nothing of it is left in the environment."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\nsleep 0.5; echo $@ >> {tmp_path}/calls; exit 1\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(tmp_path))
    before, archs = dict(os.environ), ((8, 0), (8, 6), (9, 0))

    def compile_for(arch: tuple[int, int]) -> None:
        with pytest.raises(ConfigError):
            load_kernel("step", arch)

    jit.side_by_side(partial(compile_for, arch) for arch in archs)
    assert dict(os.environ) == before
    called = [set(re.findall(r"-gencode=(\S+)", call)) for call in (tmp_path / "calls").read_text().splitlines()]
    expected = [{f"arch=compute_{a},code={code}_{a}" for code in ("sm", "compute")} for a in ("80", "86")]
    assert sorted(called, key=sorted) == [*expected, {"arch=compute_90a,code=sm_90a"}]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access\n"), EngineError("a rank is gone")])
def test_an_engine_whose_gpu_has_failed_can_be_closed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    config = engine_config(tiny_model("qwen3"))  # what is imported for it looks into torch.cuda, too
    shard = SimpleNamespace(comm=SimpleNamespace(close=raises(error)))
    parts = {"open_gpu": None, "load_shard": shard, "create_steps": ((8, 0), SimpleNamespace(shard=shard))}
    for name, value in parts.items():
        monkeypatch.setattr(cuda, name, lambda *_, value=value: value)
    for name in ("Stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    CudaRunner(config, 0).close()
