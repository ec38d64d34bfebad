"""From what the user named to a directory with a model in it, to the files with its weights, and to its tokenizer."""

import importlib.util
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from minisgl.errors import ConfigError
from minisgl.gguf.model import is_gguf, models_in, open_model
from minisgl.gguf.tokenizer import load_gguf_tokenizer
from minisgl.utils.fields import Fields
from minisgl.utils.log import told

logger = logging.getLogger(__name__)
DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
_FILES = msgspec.yaml.decode(Path(__file__).with_name("files.yaml").read_bytes())
_LFS_POINTER, _TIKTOKEN_LINE = b"version https://git-lfs", re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")
_UNLIKE: dict[str, str] = _FILES["unlike"]


def split_revision(model: str | None, revision: str | None) -> tuple[str | None, str | None]:
    """`org/name@revision` apart, unless there is such a directory. Raises: ConfigError for two revisions."""
    if model is None or "@" not in model or Path(model).expanduser().exists():
        return model, revision
    name, _, own = model.rpartition("@")
    if revision is not None and revision != own:
        raise ConfigError(f"--revision {revision}: --model {model} already names one")
    return name, own


def is_remote(model: str | None) -> bool:
    """Whether it is a repo id, which takes a while to fetch."""
    if model is None or model.startswith(("/", ".", "~")) or Path(model).expanduser().exists():
        return False
    return model.count("/") == 1 and not model.endswith(".gguf")


def locate_model(model: str | None, source: str, revision: str | None = None) -> Path:
    """The model's directory, or GGUF file: the built-in one for None, a local one as it is, else a download from the
    hub. Raises: ConfigError in one line when it is none of these, or cannot be fetched."""
    path = DEMO_MODEL if model is None else Path(model).expanduser()
    if model is None or path.is_dir() or is_gguf(path):
        if revision is not None:
            raise ConfigError(f"--revision {revision}: it is of repos on a hub, and {path} is local")
        path = path.resolve() if path.is_dir() else path.absolute()  # links of the hub's cache lead to other names
        has_weights = any(next(path.glob(_FILES[kind][0]), None) for kind in ("weights", "torch_weights"))
        if has_weights and models_in(path):
            logger.info("%s holds GGUF files, too, which are not loaded: to have one of them, give its name", path)
        return path if has_weights else one_of(models_in(path), path)
    if path.is_file():
        check_directory(path)
    if not is_remote(model):
        raise ConfigError(f"--model {model}: no directory, no GGUF file, and no repo id such as Qwen/Qwen3-0.6B")
    return download(model, source, revision)


def download(repo_id: str, source: str, revision: str | None) -> Path:
    """The repo's files that are read, torch's where it has no safetensors; of `org/name:Q4_K_M` that GGUF file."""
    repo_id, _, which = repo_id.partition(":")
    there: list[str] = []
    try:
        if source == "modelscope":
            from modelscope import snapshot_download
        else:
            from huggingface_hub import list_repo_files, snapshot_download
    except ImportError:
        raise ConfigError("--model-source modelscope needs the extra: pip install 'minisgl[modelscope]'") from None
    at = f"{repo_id}@{revision}" if revision else repo_id
    try:
        for kind in ("gguf",) if which else ("weights", "torch_weights"):
            wanted = [text.format(name) for text in _FILES[kind] for name in {which, which.upper(), which.lower()}]
            patterns = {"allow_patterns": _FILES["others"] + wanted, "ignore_patterns": _FILES["ignored"]}
            with told(f"fetching {at}"):
                path = Path(snapshot_download(repo_id, revision=revision, **patterns))
            if found := models_in(path, wanted) if which else list(path.glob(_FILES[kind][0])):
                break
        if not found and source != "modelscope":
            there = [name for name in list_repo_files(repo_id, revision=revision) if name.endswith(".gguf")]
    except Exception as error:  # the hubs' clients raise their own, requests', httpx' and OS errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = f"without a network, give a local directory, {_FILES['elsewhere'][source]}"
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            hint = "check its name; private and gated repos need the hub's token (HF_TOKEN, MODELSCOPE_API_TOKEN)"
        raise ConfigError(f"--model {at}: cannot be fetched: {reason}; {hint}") from None
    if not found and (which or there or source == "modelscope"):
        names = f"; there are {listing(there)}" if there else ""
        raise ConfigError(f"--model {at}: say which of its GGUF files, as in {repo_id}:Q4_K_M{names}")
    return one_of(found, path) if which else path


def one_of(models: list[Path], path: Path) -> Path:
    """The only one of the GGUF files in a directory; else that. Raises: ConfigError where there are several."""
    if len(models) > 1:
        raise ConfigError(f"{str(path)!r} holds several models, give one: {listing([file.name for file in models])}")
    return models[0] if models else path


def check_directory(path: Path) -> None:
    """Raises: ConfigError saying what `path` is, when it is no GGUF file, and no directory with a `config.json`."""
    if is_gguf(path):
        return
    if path.is_file():
        raise ConfigError(f"{str(path)!r} is a file: give the directory that holds config.json, or a file named *.gguf")
    if not path.is_dir():
        raise ConfigError(f"model directory {str(path)!r} does not exist")
    if not (path / "config.json").is_file():
        raise no_model(path, "config.json")


def listing(items: list[str], limit: int = 8) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def no_model(path: Path, missing: str) -> ConfigError:
    """What is wrong with a directory that lacks this file, as an error to raise."""
    if snapshots := sorted((path / "snapshots").glob("*"), key=lambda snapshot: -snapshot.stat().st_mtime):
        reason = f"it is a model's folder in the hub's cache: give {snapshots[0]}, or the repo id"
    elif not any(path.iterdir()):
        reason = "the directory is empty"
    elif below := next(path.glob(f"*/{missing}"), None):
        reason = f"it is in {below.parent}"
    else:
        reason = next((what for pattern, what in _UNLIKE.items() if any(path.glob(pattern))), "")
    return ConfigError(f"{str(path)!r} is no model directory: {missing} is missing" + f"; {reason}" * bool(reason))


def load_tokenizer(model_path: str) -> Any:
    """A tokenizer of transformers, never from the network, and never by running code of the repo. `tokenizer.json` is
    complete by itself, so it is loaded with the plain class: `AutoTokenizer` first imports all models' configurations.

    Raises: ConfigError naming the directory when there is no usable tokenizer in it, or the package that it needs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    path = Path(model_path)
    if is_gguf(path):
        return load_gguf_tokenizer(path)
    if not path.is_dir():
        raise ConfigError(f"{model_path}: no such model directory")
    for name in ("tokenizer.json", "tokenizer.model"):
        if hint := lfs_hint(path / name):
            raise ConfigError(f"{path / name}: {hint}")
    try:
        if (path / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(model_path, local_files_only=True)
        if (path / "tokenizer.model").is_file():  # transformers would try something else, and say so at length
            with (path / "tokenizer.model").open("rb") as file:
                extra = "tiktoken" if _TIKTOKEN_LINE.match(file.read(1000)) else "sentencepiece"
            if importlib.util.find_spec(extra) is None:
                raise ConfigError(f"tokenizer.model needs the extra: pip install 'minisgl[{extra}]'")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
            raise ValueError("its files are missing")  # transformers makes an empty one up
        return tokenizer
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error):
            reason = "it is code of the repo (auto_map), which is never run"
        lack = "" if (path / "tokenizer.json").is_file() else "; there is no tokenizer.json"
        raise ConfigError(f"{model_path}: cannot load the tokenizer: {reason}{lack}") from error


def stores_head(files: list[Path]) -> bool:
    """Whether these files, if they are of safetensors, have a head's tensors, as they are and not packed: no others."""
    own, needed = set[str](), ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    with suppress(OSError, SafetensorError):
        opened: list[Any] = [safe_open(str(file), "np") for file in files]
        own = {name for file in opened for name in file.keys() if name.startswith("mtp.")}  # noqa: SIM118
    rest = {name for name in own if not re.fullmatch(r"mtp\.layers\.0\..+\.weight", name)}
    return rest == {f"mtp.{name}.weight" for name in needed} < own


def lfs_hint(path: Path) -> str:
    """What to do about a file whose content Git LFS has not fetched; "" for any other file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return ""
    return "it is a Git LFS pointer, not the file itself; run git lfs pull, or download the model again" * is_pointer


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or in one that a GGUF file's "directory" would have. Raises: ConfigError naming it."""
    if is_gguf(path.parent):
        return open_model(path.parent).read_json(path.name)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {lfs_hint(path) or error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} does not hold a JSON object")
    return data


def read_fields(path: Path) -> Fields:
    """The fields of a JSON file; none where there is no such file. Raises: ConfigError naming the file."""
    return Fields(read_json(path) if path.is_file() or is_gguf(path.parent) else {}, str(path))
