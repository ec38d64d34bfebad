"""`minisgl doctor`: each check on faked machines, and the whole command on this one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minisgl import doctor
from minisgl.config.locate import DEMO_MODEL
from minisgl.config.probe import PACKAGES, Capabilities, Gpu
from minisgl.doctor import system, toolchain
from minisgl.doctor.row import Row, ask, guarded
from minisgl.doctor.toolchain import TorchInfo
from tests.gguf_files import byte_tokens, write_gguf
from tests.models import tiny_model
from tests.unit.test_gguf_header import write

CPU_TORCH = TorchInfo("2.13.0+cpu", None, "AVX2")
CUDA_TORCH = TorchInfo("2.13.0", "13.0", "AVX2", 1)
MACHINE = Capabilities(num_cores=8, memory=24 << 30, cpu_flags=frozenset({"avx2"}))
H100 = Gpu(0, "NVIDIA H100", (9, 0), 80 << 30, 79 << 30)
GPU_MACHINE = replace(MACHINE, gpus=(H100,), driver="580.1", driver_cuda=(13, 0), torch_cuda="13.0")


def test_python_too_old_fails_and_says_what_to_do() -> None:
    assert system.check_python((3, 11, 7), "CPython").status == "ok"
    row = system.check_python((3, 9, 18), "CPython")
    assert row.status == "fail"
    assert "3.10" in row.fix
    assert system.check_python((3, 11, 7), "PyPy").status == "warn"


def test_cpu_names_what_it_has() -> None:
    def cpu(flags: str, arch: str = "x86_64", num_cores: int = 8) -> Row:
        return system.check_cpu(Capabilities(num_cores=num_cores, memory=0, cpu_flags=frozenset(flags.split())), arch)

    row = cpu("fpu avx2 avx512f amx_bf16")
    assert row.status == "ok"
    assert "8 usable cores" in row.detail
    assert "AVX512" in row.detail
    assert "AMX-BF16" in row.detail
    assert cpu("fpu sse2").status == "warn"
    assert cpu("asimd bf16", "aarch64").status == "ok"
    assert cpu("avx2", num_cores=1).status == "warn"


def test_memory() -> None:
    assert system.check_memory(MACHINE).status == "ok"
    assert system.check_memory(replace(MACHINE, memory=1 << 29)).status == "warn"


def test_port_taken_and_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        row = system.check_port("127.0.0.1", port)
        assert row.status == "fail"
        assert f"{port} is taken" in row.detail
        assert "--port" in row.fix
    assert system.check_port("127.0.0.1", port).status == "ok"
    assert system.check_port("127.0.0.1", 99999).status == "fail"


def _write_shard(path: Path, cut: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes((len(header).to_bytes(8, "little") + header + bytes(8))[: -cut or None])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    _write_shard(tmp_path / "model-00001-of-00002.safetensors")
    _write_shard(tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_a_complete_model(model: Path) -> None:
    row = system.check_model(str(model), model)
    assert row.status == "ok", row
    assert "LlamaForCausalLM" in row.detail
    assert system.find_model(str(model)) == model
    assert system.find_model(None) == DEMO_MODEL


def test_a_gguf_file(tmp_path: Path) -> None:
    path, _ = write_gguf(tiny_model("llama"), tmp_path / "whole", "Q8_0", **byte_tokens())
    for name in (path, path.parent):
        assert system.find_model(str(name)) == path
    row = system.check_model(str(path), path)
    assert row.status == "ok"
    assert "model.gguf: LlamaForCausalLM" in row.detail
    path.write_bytes(path.read_bytes()[:-1])
    assert "the file was cut off" in system.check_model(str(path), path).detail
    row = system.check_model("", write(tmp_path / "without.gguf"))
    assert (row.status, row.fix) == ("fail", "Choose a model of what is supported.")
    told = "without.gguf: tokenizer.ggml.model must be gpt2, which is byte-level BPE, llama or gemma4, not None"
    assert told in row.detail


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model-00002-of-00002.safetensors", "is incomplete: model-00002-of-00002.safetensors missing"),
    ],
)
def test_a_model_with_a_file_missing(model: Path, file: str, expected: str) -> None:
    (model / file).unlink()
    row = system.check_model(str(model), model)
    assert row.status == "fail"
    assert expected in row.detail


def test_a_model_with_damaged_files(model: Path) -> None:
    _write_shard(model / "model-00001-of-00002.safetensors", cut=3)
    assert "model-00001-of-00002.safetensors cannot be read" in system.check_model(str(model), model).detail
    (model / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "safetensors cannot be read: it is a Git LFS pointer" in system.check_model(str(model), model).detail
    (model / "model.safetensors.index.json").write_text("[]")
    assert "index.json' does not hold a JSON object" in system.check_model(str(model), model).detail
    (model / "config.json").write_text("{")
    assert "cannot read" in system.check_model(str(model), model).detail
    (model / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    row = system.check_model(str(model), model)
    assert "MambaForCausalLM" in row.detail
    assert "again" not in row.fix  # a second download would not help


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert system.check_model(str(missing), system.find_model(str(missing))).status == "fail"
    assert system.find_model("someone/not-cached") is None
    assert system.check_model("someone/not-cached", None).status == "warn"
    assert (
        system.check_configuration(None, MACHINE).status == system.check_configuration(missing, MACHINE).status == "n/a"
    )


def test_what_the_server_would_decide() -> None:
    row = system.check_configuration(DEMO_MODEL, MACHINE)
    assert (row.status, row.detail.split(",")[0]) == ("ok", "float32 on cpu")
    assert "on cuda" in system.check_configuration(DEMO_MODEL, GPU_MACHINE).detail
    row = system.check_configuration(DEMO_MODEL, replace(MACHINE, memory=1 << 20))
    assert row.status == "fail"
    assert "--memory-ratio" in row.detail


def test_torch_missing_old_and_fine() -> None:
    assert toolchain.check_torch(CPU_TORCH).status == "ok"
    assert toolchain.check_torch(TorchInfo("2.9.1", "12.8")).status == "fail"
    row = toolchain.check_torch(TorchInfo(error="ModuleNotFoundError: No module named 'torch'"))
    assert row.status == "fail"
    assert "No module named" in row.detail


def test_driver() -> None:
    assert toolchain.check_driver(MACHINE, CPU_TORCH).status == "n/a"
    assert toolchain.check_driver(GPU_MACHINE, CUDA_TORCH).status == "ok"
    row = toolchain.check_driver(replace(GPU_MACHINE, driver_cuda=(12, 4)), CUDA_TORCH)
    assert row.status == "fail"
    assert "12.4" in row.detail
    assert "13.0" in row.detail
    assert toolchain.check_driver(replace(MACHINE, gpu_problem="does not run"), CUDA_TORCH).status == "fail"


def test_gpus() -> None:
    def statuses(machine: Capabilities, torch: TorchInfo) -> list[str]:
        return [row.status for row in toolchain.check_gpus(machine, torch)]

    assert statuses(MACHINE, CPU_TORCH) == ["n/a"]
    assert statuses(replace(MACHINE, driver="580.1"), CUDA_TORCH) == ["warn"], "hidden"
    (row,) = toolchain.check_gpus(GPU_MACHINE, CUDA_TORCH)
    assert (row.name, row.status) == ("GPU 0", "ok")
    assert "compute capability 9.0, 79 of 80 GiB free" in row.detail
    assert statuses(GPU_MACHINE, CPU_TORCH) == ["ok", "warn"]
    assert statuses(GPU_MACHINE, replace(CUDA_TORCH, num_gpus=0)) == ["ok", "fail"]
    assert statuses(GPU_MACHINE, replace(CUDA_TORCH, gpu_error="system not yet initialized")) == ["ok", "fail"]
    assert statuses(replace(GPU_MACHINE, gpus=(replace(H100, arch=(7, 0)),)), CUDA_TORCH) == ["warn"]


def test_a_conda_libstdcxx_older_than_the_compilers(tmp_path: Path) -> None:
    old, new = tmp_path / "old.so", tmp_path / "new.so"
    old.write_bytes(b"\0GLIBCXX_3.4\0GLIBCXX_3.4.9\0GLIBCXX_3.4.29\0GLIBCXX_DEBUG\0")
    new.write_bytes(b"\0GLIBCXX_3.4.9\0GLIBCXX_3.4.31\0")
    assert toolchain.glibcxx(str(old)) == (3, 4, 29)
    row = toolchain.check_libstdcxx(str(old), str(new))
    assert row.status == "fail"
    assert "GLIBCXX_3.4.31" in row.detail
    assert "LD_PRELOAD" in row.fix
    assert toolchain.check_libstdcxx(str(new), str(old)).status == "ok"
    assert toolchain.check_libstdcxx(str(new), "").status == "ok"


def test_compiler_missing_and_broken(tmp_path: Path) -> None:
    assert toolchain.check_compiler(None).status == "warn"
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'unrecognized option -std=c++20' >&2\nexit 1\n")
    broken.chmod(0o755)
    row = toolchain.check_compiler(str(broken))
    assert row.status == "fail"
    assert "unrecognized option" in row.detail
    real = toolchain.find_compiler()
    if real is not None:
        assert "Python.h" in toolchain.check_compiler(real, str(tmp_path)).detail


def test_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nvcc(release: str, machine: Capabilities, torch: TorchInfo) -> Row:
        path = tmp_path / "nvcc"
        path.write_text(f"#!/bin/sh\necho 'release {release}, V1'\n")
        path.chmod(0o755)
        return toolchain.check_nvcc(replace(machine, nvcc=str(path)), torch)

    assert toolchain.check_nvcc(MACHINE, CPU_TORCH).status == "n/a"
    assert toolchain.check_nvcc(GPU_MACHINE, CUDA_TORCH).status == "warn"
    assert nvcc("13.1", GPU_MACHINE, CUDA_TORCH).status == "ok"
    row = nvcc("12.4", GPU_MACHINE, CUDA_TORCH)
    assert row.status == "fail"
    assert "CUDA 12.4, but torch is built for CUDA 13.0" in row.detail
    (tmp_path / "tvm_ffi.py").write_text("raise ImportError('libtvm_ffi.so: no such file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    row = nvcc("13.1", replace(GPU_MACHINE, packages=frozenset({"tvm_ffi"})), CUDA_TORCH)
    assert row.status == "fail"
    assert "cannot build a kernel: " in row.detail
    assert "libtvm_ffi.so" in row.detail


def test_optional_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "raising.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("no_such_module", "rich", "crashing", "raising"):
        monkeypatch.setitem(PACKAGES, name, (name, "x"))
    assert toolchain.check_package("no_such_module", has_gpu=False).status == "n/a"
    assert toolchain.check_package("no_such_module", has_gpu=True).status == "warn"
    assert toolchain.check_package("rich", has_gpu=True).status == "ok"
    assert toolchain.check_package("crashing", has_gpu=False).status == "warn"
    row = toolchain.check_package("raising", has_gpu=False)
    assert row.status == "warn"
    assert "libcuda.so.1" in row.detail


def test_a_check_that_crashes_is_a_row() -> None:
    def crash() -> Row:
        raise RuntimeError("boom")

    rows = guarded("GPUs", crash)
    assert [(row.name, row.status) for row in rows] == [("GPUs", "fail")]
    assert "boom" in rows[0].detail


def test_a_program_that_hangs_or_is_missing_is_an_answer() -> None:
    assert ask(["sleep", "5"], timeout=0.05).code is None
    missing = ask(["/no/such/program"])
    assert not missing.ok
    assert "No such file" in missing.reason


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("n/a", 0), ("fail", 1)])
def test_exit_status_table_and_json(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("Port", status, "a [detail]", "mend it")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "examine", lambda *_: [row])
    assert doctor.main([]) == code
    table = capsys.readouterr().out
    assert "a [detail]" in table
    assert "mend it" in table
    assert doctor.main(["--json"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"name": "Port", "status": status, "detail": "a [detail]", "fix": "mend it"}
    ]


def test_the_whole_command_on_this_machine(model: Path) -> None:
    """Every row of the specification is there, whatever this machine has."""
    code = f"import sys; from minisgl.doctor import main; sys.exit(main(['--json', '--model', {str(model)!r}]))"
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # or it would compile a kernel, for a minute
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False, env=environ
    )
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"Python", "torch", "NVIDIA driver", "GPUs", "CPU", "Memory", "libstdc++", "C++ compiler"} <= set(rows)
    assert {"nvcc", "tvm_ffi", "triton", "flashinfer", "Port", "Model", "Configuration"} <= set(rows)
    assert rows["Model"]["status"] == "ok"
    assert all(row["fix"] for row in rows.values() if row["status"] == "fail")
    assert done.returncode == int(any(row["status"] == "fail" for row in rows.values()))
