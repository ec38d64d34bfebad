"""What is in a model's directory: the files that hold its weights, or what it is if it is no model."""

from __future__ import annotations

from pathlib import Path

from minisgl.config.fields import read_fields
from minisgl.errors import ConfigError

_GGUF = "GGUF files are not supported, take the model's safetensors"
_ADAPTER = "it holds an adapter (LoRA), not a model: merge it into its base model, and save that"
_ORIGINAL = "it holds the weights in their authors' own format, take those of transformers (model*.safetensors)"
_OTHERS = {  # files by which something else is known
    "*.gguf": _GGUF,
    "adapter_*": _ADAPTER,
    "model_index.json": "it holds a pipeline of diffusers, not a language model",
    "consolidated*": _ORIGINAL,
    "params.json": _ORIGINAL,
    "*.safetensors": "its name must be model.safetensors, or be in a model.safetensors.index.json",
    "*.bin": "its name must be pytorch_model.bin, or be in a pytorch_model.bin.index.json",
    "*.pt*": "take the model's safetensors",
    "*.onnx": "take the model's safetensors",
}


def check_directory(path: Path) -> None:
    """Raises: ConfigError saying what `path` is, when it is no directory with a `config.json` in it."""
    if path.is_file():
        reason = _GGUF if path.suffix == ".gguf" else "give the directory that holds config.json"
        raise ConfigError(f"{str(path)!r} is a file, not a model directory: {reason}")
    if not path.is_dir():
        raise ConfigError(f"model directory {str(path)!r} does not exist")
    if not (path / "config.json").is_file():
        raise _no_model(path, "config.json")


def weight_files(path: Path) -> list[Path]:
    """The files with the model's weights, in transformers' order of preference: safetensors in one file, or as the
    index has them; then the same for files of torch. Raises: ConfigError saying what is missing."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (path / whole).is_file():
            return [path / whole]
        weights = read_fields(path / f"{whole}.index.json").child("weight_map")
        names = sorted({weights.text(tensor, "") for tensor in weights.data})
        if missing := [name for name in names if not (path / name).is_file()]:
            raise ConfigError(f"{str(path)!r} is incomplete: {listing(missing)} missing")
        if names:
            return [path / name for name in names]
    raise _no_model(path, "model.safetensors")


def listing(items: list[str], limit: int = 8) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _no_model(path: Path, missing: str) -> ConfigError:
    if snapshots := sorted((path / "snapshots").glob("*"), key=lambda snapshot: -snapshot.stat().st_mtime):
        reason = f"it is a model's folder in the hub's cache: give {snapshots[0]}, or the repo id"
    elif not any(path.iterdir()):
        reason = "the directory is empty"
    elif below := next(path.glob(f"*/{missing}"), None):
        reason = f"it is in {below.parent}"
    else:
        reason = next((what for pattern, what in _OTHERS.items() if any(path.glob(pattern))), "")
    return ConfigError(f"{str(path)!r} is no model directory: {missing} is missing" + f"; {reason}" * bool(reason))
