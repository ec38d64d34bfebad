"""Checks of the machine: Python, processor, memory, port, and the model's directory."""

from __future__ import annotations

import errno
import json
import platform
import socket
import sys
from pathlib import Path

from minisgl.config.locate import DEMO_MODEL
from minisgl.config.model import read_model_config
from minisgl.config.probe import Capabilities, probe
from minisgl.config.resolve import read_default_sampling
from minisgl.doctor.row import Row
from minisgl.errors import ConfigError

GIB = 1 << 30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def check_python(version: tuple[int, ...] = sys.version_info[:3], implementation: str | None = None) -> Row:
    """Python 3.10 or newer, CPython."""
    implementation = implementation or platform.python_implementation()
    detail = f"{implementation} {'.'.join(map(str, version))} at {sys.executable}"
    if version < (3, 10):
        return Row("Python", "fail", detail, "Install Python 3.10 or newer and make a new environment with it.")
    if implementation != "CPython":
        return Row("Python", "warn", detail, "Only CPython is tested.")
    return Row("Python", "ok", detail)


def usable_cores(affinity: int, cpu_max: str) -> float:
    """Cores that this process may use: its affinity mask, cut by the control group's quota (`cpu.max`)."""
    quota, _, period = cpu_max.partition(" ")
    if not quota.isdigit() or not period.strip().isdigit():
        return float(affinity)
    return min(float(affinity), int(quota) / int(period))


def check_cpu(machine: Capabilities | None = None, arch: str | None = None, cpu_max: str | None = None) -> Row:
    """Vector instructions that the CPU engine profits from, and the cores it may use."""
    machine, arch = machine or probe(), arch or platform.machine()
    cores = usable_cores(machine.num_cores, _read("/sys/fs/cgroup/cpu.max") if cpu_max is None else cpu_max)
    flags = machine.cpu_flags
    names = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    names |= {"asimd": "NEON", "bf16": "BF16"}
    found = [name for flag, name in names.items() if flag in flags]
    detail = f"{cores:g} usable cores, {arch}: {', '.join(found) or 'no vector extensions known'}"
    if arch == "x86_64" and "avx2" not in flags:
        return Row(
            "CPU", "warn", detail, "Without AVX2 the CPU engine is slow; in a virtual machine pass the host's CPU."
        )
    if cores < 2:
        return Row("CPU", "warn", detail, "Scheduler and engine overlap best with two cores or more.")
    return Row("CPU", "ok", detail)


def check_memory(available: int | None = None, needed: int = 0) -> Row:
    """Free memory, in bytes, against the weights that are to be loaded."""
    available = probe().memory if available is None else available
    detail = f"{available / GIB:.1f} GiB available"
    if needed:
        detail += f", the model's weights take {needed / GIB:.1f} GiB"
    if available < needed:
        return Row("Memory", "fail", detail, "Close other programs, or choose a smaller model or a smaller --dtype.")
    if available < needed + GIB:
        return Row("Memory", "warn", detail, "Little is left for the KV cache: set --num-pages, or free some memory.")
    return Row("Memory", "ok", detail)


def check_port(host: str, port: int) -> Row:
    """Whether the server could listen at the address."""
    name = "Port"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                fix = f"Stop the program that uses it (ss -ltnp 'sport = :{port}'), or choose another with --port."
                return Row(name, "fail", f"{host}:{port} is taken", fix)
            return Row(name, "fail", f"{host}:{port}: {error}", "Choose a port from 1024 to 65535 and a local address.")
    return Row(name, "ok", f"{host}:{port} is free")


def check_model(model: str | None) -> Row:
    """The model's directory: `config.json`, all weight shards and a tokenizer are there and can be read."""
    if model is None:
        return _check_model_directory(DEMO_MODEL, "built-in demo model")
    path = Path(model).expanduser()
    if path.exists() or model.startswith(("/", ".", "~")):
        return _check_model_directory(path, model)
    cached = _cached_snapshot(model)
    if cached is None:
        fix = "It is downloaded at the first start; without a network pass a local directory."
        return Row("Model", "warn", f"{model}: not a local directory, and not in the hub's cache", fix)
    return _check_model_directory(cached, f"{model} (from the hub's cache)")


def weight_bytes(model: str | None) -> int:
    """Size of the model's weight files, in bytes; 0 when it is not on this machine."""
    path = DEMO_MODEL if model is None else Path(model).expanduser()
    if model is not None and not path.is_dir():
        path = _cached_snapshot(model) or path
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _check_model_directory(path: Path, label: str) -> Row:
    name = "Model"
    if not path.is_dir():
        builtin = path == DEMO_MODEL
        fix = "Install minisgl again, or pass --model." if builtin else "Give the directory that holds config.json."
        return Row(name, "fail", f"{label}: no such directory", fix)
    problems = _config_problems(path / "config.json") + _shard_problems(path)
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        problems.append("no tokenizer (tokenizer.json)")
    if problems:
        fix = "Download the model again, completely; only safetensors weights are read."
        if "not supported" in problems[0]:
            fix = "Choose a model of a supported architecture."
        return Row(name, "fail", f"{label}: {'; '.join(problems)}", fix)
    config = read_model_config(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / GIB
    return Row(name, "ok", f"{label}: {config.architecture}, {size:.2f} GiB of weights")


def _config_problems(config: Path) -> list[str]:
    if not config.is_file():
        return ["no config.json"]
    try:
        read_model_config(config.parent)
        read_default_sampling(config.parent)
    except ConfigError as error:
        return [str(error)]
    return []


def _shard_problems(path: Path) -> list[str]:
    """Weight files that the index names, or the single file, and that are missing or unreadable."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"{index.name} cannot be read: {type(error).__name__}: {error}"]
    else:
        shards = sorted(file.name for file in path.glob("*.safetensors"))
        if not shards:
            return ["no *.safetensors"]
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        return [f"{len(missing)} of {len(shards)} weight files are missing ({missing[0]} …)"]
    return [problem for shard in shards if (problem := _safetensors_problem(path / shard))]


def _safetensors_problem(file: Path) -> str | None:
    """A file whose length is not what its own header says was cut off while it was copied."""
    try:
        with file.open("rb") as stream:
            header_len = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_len <= 100_000_000:
                return f"{file.name} is not a safetensors file"
            header = json.loads(stream.read(header_len))
        end = max((tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{file.name} cannot be read: {type(error).__name__}: {error}"
    size = file.stat().st_size
    return None if size == 8 + header_len + end else f"{file.name} is cut off: {size} bytes of {8 + header_len + end}"


def _cached_snapshot(repo: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _read(path: str) -> str:
    """A small system file's text, or nothing where there is no such file."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
