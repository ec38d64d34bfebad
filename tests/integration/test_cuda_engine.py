"""What the GPU engine decides on the host: no GPU is needed to see it, nor to see it fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from minisgl.engine import cuda
from minisgl.engine.cuda import CudaRunner, open_gpu
from minisgl.engine.memory import large_step
from minisgl.errors import ConfigError, EngineError
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
    ("error", "reason"),
    [
        (RuntimeError("ninja exited\nFAILED: a.o\nstep.cu(7): error: no such thing\nmore"), r"step.cu\(7\): error: no"),
        (RuntimeError("Could not find CUDA installation."), "Could not find CUDA installation"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, reason: str
) -> None:
    package: Any = ModuleType("tvm_ffi")
    package.__version__, package.cpp = "0", SimpleNamespace(build=raises(error))
    monkeypatch.setitem(sys.modules, "tvm_ffi", package)
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TVM_FFI_CUDA_ARCH_LIST", "")  # set by the loader
    with pytest.raises(ConfigError, match=f"kernel step for sm_90a: .*{reason}.*minisgl doctor") as caught:
        load_kernel("step", (9, 0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal access\n"), EngineError("a rank is gone")])
def test_an_engine_whose_gpu_has_failed_can_be_closed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    shard = SimpleNamespace(comm=SimpleNamespace(close=raises(error)))
    parts = {"open_gpu": None, "load_shard": shard, "create_steps": (8, SimpleNamespace(shard=shard))}
    for name, value in parts.items():
        monkeypatch.setattr(cuda, name, lambda *_, value=value: value)
    for name in ("Stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    CudaRunner(engine_config(tiny_model("qwen3")), 0).close()
