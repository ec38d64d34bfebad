"""Checks of the machine: Python, processor, memory, port, the model's directory, and what the server would decide."""

import platform
import sys
from pathlib import Path

from minisgl.config.args import ServerArgs
from minisgl.config.families import read_model_config, weight_files
from minisgl.config.locate import DEMO_MODEL, lfs_hint, split_revision
from minisgl.config.probe import Capabilities
from minisgl.config.resolve import ModelFiles, read_default_sampling, resolve
from minisgl.doctor.row import Row
from minisgl.errors import ConfigError
from minisgl.gguf.model import is_gguf, models_in
from minisgl.gguf.tokenizer import load_gguf_tokenizer
from minisgl.server.launch import bind_port

GIB = 1 << 30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "bf16": "BF16",
}


def check_python(version: tuple[int, ...] = sys.version_info[:3], kind: str = platform.python_implementation()) -> Row:
    """Python 3.10 or newer, CPython."""
    detail = f"{kind} {'.'.join(map(str, version))} at {sys.executable}"
    if version < (3, 10):
        return Row("Python", "fail", detail, "Install Python 3.10 or newer and make a new environment with it.")
    if kind != "CPython":
        return Row("Python", "warn", detail, "Only CPython is tested.")
    return Row("Python", "ok", detail)


def check_cpu(machine: Capabilities, arch: str = platform.machine()) -> Row:
    """Vector instructions that the CPU engine profits from, and the cores it may use."""
    found = [name for flag, name in _CPU_FLAGS.items() if flag in machine.cpu_flags]
    detail = f"{machine.num_cores} usable cores, {arch}: {', '.join(found) or 'no vector extensions known'}"
    if arch == "x86_64" and "avx2" not in machine.cpu_flags:
        fix = "Without AVX2 the CPU engine is slow; in a virtual machine pass the host's CPU."
        return Row("CPU", "warn", detail, fix)
    if machine.num_cores < 2:
        return Row("CPU", "warn", detail, "Scheduler and engine overlap best with two cores or more.")
    return Row("CPU", "ok", detail)


def check_memory(machine: Capabilities) -> Row:
    """Free memory of the host; whether a model fits is the configuration's row."""
    detail = f"{machine.memory / GIB:.1f} GiB available"
    if machine.memory < GIB:
        return Row("Memory", "warn", detail, "Close other programs, or raise the container's limit.")
    return Row("Memory", "ok", detail)


def check_port(host: str, port: int) -> Row:
    """Whether the server could listen at the address."""
    try:
        bind_port(host, port).close()
    except ConfigError as error:
        return Row(
            "Port", "fail", str(error), "Choose a port from 1024 to 65535 (--port) and a local address (--host)."
        )
    return Row("Port", "ok", f"{host}:{port} is free")


def find_model(model: str | None) -> Path | None:
    """The model's directory, as far as it is on this machine: named, built in, or in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if model is None:
        return DEMO_MODEL
    path = Path(model).expanduser()
    if path.exists() or model.startswith(("/", ".", "~")):
        found = [] if (path / "config.json").is_file() else models_in(path)
        return found[0] if len(found) == 1 else path
    try:
        name, revision = split_revision(model, None)
        return Path(snapshot_download(name or model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def check_model(model: str | None, path: Path | None) -> Row:
    """`config.json`, all weight shards and a tokenizer are there and can be read. path: as `find_model` found it."""
    label = model or "built-in demo model"
    if path is None:
        fix = "It is downloaded at the first start; without a network pass a local directory."
        return Row("Model", "warn", f"{label}: not a local directory, and not in the hub's cache", fix)
    if not path.is_dir() and not is_gguf(path):
        return Row("Model", "fail", f"{label}: no such directory", "Give the directory that holds config.json.")
    problems = _config_problems(path) + _shard_problems(path) or _tokenizer_problems(path)
    if problems:
        fix = "Download the model again, completely."
        if "supported" in problems[0] or " must be " in problems[0]:
            fix = "Choose a model of what is supported."
        return Row("Model", "fail", f"{label}: {'; '.join(problems)}", fix)
    size = sum(file.stat().st_size for file in weight_files(path)) / GIB
    return Row("Model", "ok", f"{path}: {read_model_config(path).architecture}, {size:.2f} GiB of weights")


def check_configuration(path: Path | None, machine: Capabilities) -> Row:
    """What the server would decide with no other flags, or the error that it would end with."""
    name = "Configuration"
    if path is None or not path.exists() or _config_problems(path):
        return Row(name, "n/a", "needs a model")
    try:
        files = ModelFiles(path, read_model_config(path), read_default_sampling(path))
        engine = resolve(ServerArgs(), files, machine).engine
    except ConfigError as error:
        return Row(name, "fail", str(error), "Follow that line, or choose a smaller model.")
    attention = " prefill, ".join(dict.fromkeys((engine.prefill_backend, engine.decode_backend)))
    detail = f"{engine.dtype} on {engine.device}, attention: {attention}, requests of up to {engine.max_seq_len} tokens"
    return Row(name, "ok", detail)


def _config_problems(path: Path) -> list[str]:
    if not (path / "config.json").is_file() and not is_gguf(path):
        return ["no config.json"]
    try:
        read_model_config(path)
        read_default_sampling(path)
    except ConfigError as error:
        return [str(error)]
    return []


def _tokenizer_problems(path: Path) -> list[str]:
    if not is_gguf(path):
        return [] if any((path / file).is_file() for file in TOKENIZER_FILES) else ["no tokenizer (tokenizer.json)"]
    try:
        load_gguf_tokenizer(path)
    except ConfigError as error:
        return [str(error)]
    return []


def _shard_problems(path: Path) -> list[str]:
    """Weight files that are missing or unreadable."""
    try:
        files = weight_files(path)
    except ConfigError as error:
        return [str(error)]
    return [problem for file in files if (problem := _safetensors_problem(file))]


def _safetensors_problem(file: Path) -> str | None:
    """A file whose length is not what its own header says was cut off while it was copied."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return lfs_hint(file) or None
    try:
        with safe_open(file, "numpy"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{file.name} cannot be read: {lfs_hint(file) or error}"
