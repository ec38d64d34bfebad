"""From what the user named to a directory with a model in it."""

from __future__ import annotations

from pathlib import Path

from minisgl.errors import ConfigError

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]


def locate_model(model: str | None, source: str) -> Path:
    """The model's directory: the built-in one for None, a local one as it is, else a download from the hub.

    Raises: ConfigError in one line when it is neither a directory nor a repository that can be fetched.
    """
    if model is None:
        return DEMO_MODEL
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise ConfigError(f"--model {model}: neither a directory nor a repo id such as Qwen/Qwen3-0.6B")
    return _from_modelscope(model) if source == "modelscope" else _from_huggingface(model)


def _from_huggingface(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OS errors
        raise ConfigError(f"--model {repo_id}: cannot be fetched: {_first_line(error)}") from None


def _from_modelscope(repo_id: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ConfigError("--model-source modelscope needs the extra: pip install 'minisgl[modelscope]'") from None
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_PATTERNS))
    except Exception as error:  # as above
        raise ConfigError(f"--model {repo_id}: cannot be fetched: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
