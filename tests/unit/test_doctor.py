"""`minisgl doctor`: each check on faked machines, and the whole command on this one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minisgl import doctor
from minisgl.config.probe import Capabilities
from minisgl.doctor import system, toolchain
from minisgl.doctor.row import Answer, Row, ask, guarded
from minisgl.doctor.toolchain import Gpu, TorchInfo

CPU_TORCH = TorchInfo("2.13.0+cpu", None, "AVX2")
H100 = Gpu("NVIDIA H100", (9, 0), 80 << 30)
CUDA_TORCH = TorchInfo("2.13.0", "13.0", "AVX2", (H100,))
SMI = Answer(0, "| NVIDIA-SMI 580.1    Driver Version: 580.1   CUDA Version: 13.0  |", "")


def test_python_too_old_fails_and_says_what_to_do() -> None:
    assert system.check_python((3, 11, 7), "CPython").status == "ok"
    row = system.check_python((3, 9, 18), "CPython")
    assert row.status == "fail"
    assert "3.10" in row.fix
    assert system.check_python((3, 11, 7), "PyPy").status == "warn"


@pytest.mark.parametrize(("cpu_max", "expected"), [("", 8.0), ("max 100000", 8.0), ("150000 100000", 1.5)])
def test_cores_respect_the_control_groups_quota(cpu_max: str, expected: float) -> None:
    assert system.usable_cores(8, cpu_max) == expected


def test_cpu_names_what_it_has() -> None:
    def cpu(flags: str, arch: str = "x86_64", num_cores: int = 8) -> Row:
        return system.check_cpu(Capabilities(num_cores, 0, frozenset(flags.split())), arch, "max 100000")

    row = cpu("fpu avx2 avx512f amx_bf16")
    assert row.status == "ok"
    assert "8 usable cores" in row.detail
    assert "AVX512" in row.detail
    assert "AMX-BF16" in row.detail
    assert cpu("fpu sse2").status == "warn"
    assert cpu("asimd bf16", "aarch64").status == "ok"
    assert cpu("avx2", num_cores=1).status == "warn"


@pytest.mark.parametrize(("available", "status"), [(1, "fail"), (10, "warn"), (20, "ok")])
def test_memory_against_the_models_weights(available: int, status: str) -> None:
    assert system.check_memory(available << 30, needed=(10 << 30) - 1).status == status


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
    row = system.check_model(str(model))
    assert row.status == "ok", row
    assert "LlamaForCausalLM" in row.detail
    assert system.weight_bytes(str(model)) > 16


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model-00002-of-00002.safetensors", "1 of 2 weight files are missing"),
    ],
)
def test_a_model_with_a_file_missing(model: Path, file: str, expected: str) -> None:
    (model / file).unlink()
    row = system.check_model(str(model))
    assert row.status == "fail"
    assert expected in row.detail


def test_a_model_with_damaged_files(model: Path) -> None:
    _write_shard(model / "model-00001-of-00002.safetensors", cut=3)
    assert "is cut off" in system.check_model(str(model)).detail
    (model / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "not a safetensors file" in system.check_model(str(model)).detail
    (model / "model.safetensors.index.json").write_text("[]")
    assert "index.json cannot be read" in system.check_model(str(model)).detail
    (model / "config.json").write_text("{")
    assert "cannot read" in system.check_model(str(model)).detail
    (model / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    row = system.check_model(str(model))
    assert "MambaForCausalLM" in row.detail
    assert "again" not in row.fix  # a second download would not help


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    assert system.check_model(str(tmp_path / "none")).status == "fail"
    assert system.check_model("someone/not-cached").status == "warn"


def test_torch_missing_old_and_fine() -> None:
    assert toolchain.check_torch(CPU_TORCH).status == "ok"
    assert toolchain.check_torch(TorchInfo("2.9.1", "12.8")).status == "fail"
    row = toolchain.check_torch(TorchInfo(error="ModuleNotFoundError: No module named 'torch'"))
    assert row.status == "fail"
    assert "No module named" in row.detail


def test_driver() -> None:
    assert toolchain.check_driver(None, CPU_TORCH).status == "n/a"
    assert toolchain.check_driver(SMI, CUDA_TORCH).status == "ok"
    old = Answer(0, "Driver Version: 550.1  CUDA Version: 12.4", "")
    row = toolchain.check_driver(old, CUDA_TORCH)
    assert row.status == "fail"
    assert "12.4" in row.detail
    assert "13.0" in row.detail
    assert toolchain.check_driver(Answer(9, "", "couldn't communicate with the driver"), CUDA_TORCH).status == "fail"


def test_gpus() -> None:
    assert toolchain.check_gpus(None, CPU_TORCH).status == "n/a"
    assert "sm_90" in toolchain.check_gpus(SMI, CUDA_TORCH).detail
    assert toolchain.check_gpus(SMI, CPU_TORCH).status == "warn"
    assert toolchain.check_gpus(SMI, TorchInfo("2.13.0", "13.0")).status == "fail"
    assert toolchain.check_gpus(SMI, TorchInfo("2.13.0", "13.0", "", (Gpu("P100", (6, 0), 1),))).status == "warn"


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


def _fake_nvcc(path: Path, release: str, build_status: int) -> str:
    nvcc = path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V1" && exit 0\n'
        f"echo 'unsupported GNU version' >&2\nexit {build_status}\n"
    )
    nvcc.chmod(0o755)
    return str(nvcc)


def test_nvcc(tmp_path: Path) -> None:
    assert toolchain.check_nvcc(None, CPU_TORCH).status == "n/a"
    assert toolchain.check_nvcc(None, CUDA_TORCH).status == "warn"
    assert toolchain.check_nvcc(_fake_nvcc(tmp_path, "13.1", 0), CUDA_TORCH).status == "ok"
    row = toolchain.check_nvcc(_fake_nvcc(tmp_path, "12.4", 0), CUDA_TORCH)
    assert row.status == "fail"
    assert "CUDA 12.4, but torch is built for CUDA 13.0" in row.detail
    row = toolchain.check_nvcc(_fake_nvcc(tmp_path, "13.1", 1), CUDA_TORCH)
    assert row.status == "fail"
    assert "unsupported GNU version" in row.detail
    assert toolchain.check_nvcc(_fake_nvcc(tmp_path, "13.1", 1), CPU_TORCH).status == "warn"


def test_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.check_backend("no_such_module", "no-such", "x", has_gpu=False).status == "n/a"
    assert toolchain.check_backend("no_such_module", "no-such", "x", has_gpu=True).status == "warn"
    assert toolchain.check_backend("rich", "rich", "tables", has_gpu=True).status == "ok"
    (tmp_path / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "raising.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert toolchain.check_backend("crashing", "crashing", "x", has_gpu=False).status == "warn"
    row = toolchain.check_backend("raising", "raising", "x", has_gpu=False)
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"Python", "torch", "NVIDIA driver", "GPUs", "CPU", "Memory", "libstdc++", "C++ compiler"} <= set(rows)
    assert {"nvcc", "tvm_ffi", "triton", "flashinfer", "Port", "Model"} <= set(rows)
    assert rows["Model"]["status"] == "ok"
    assert all(row["fix"] for row in rows.values() if row["status"] == "fail")
    assert done.returncode == int(any(row["status"] == "fail" for row in rows.values()))
