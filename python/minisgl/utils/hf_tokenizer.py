"""Loading a model's tokenizer from its directory: never from the network, and never by running code of the repo."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from minisgl.errors import ConfigError

LFS_POINTER = b"version https://git-lfs"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")


def load_tokenizer(model_path: str) -> Any:
    """A tokenizer of transformers. `tokenizer.json` is complete by itself, so it is loaded with the plain class: that
    takes a second, where `AutoTokenizer` first imports every model's configuration.

    Raises: ConfigError naming the directory when there is no usable tokenizer in it, or the package that it needs.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    path = Path(model_path)
    if not path.is_dir():
        raise ConfigError(f"{model_path}: no such model directory")
    for name in ("tokenizer.json", "tokenizer.model"):
        if hint := lfs_hint(path / name):
            raise ConfigError(f"{path / name}: {hint}")
    try:
        if (path / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(model_path, local_files_only=True)
        _check_packages(path / "tokenizer.model")
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


def _check_packages(model: Path) -> None:
    """Whether what reads a `tokenizer.model` is there; transformers would try something else, and say so at length."""
    if not model.is_file():
        return
    with model.open("rb") as file:
        extra = "tiktoken" if _TIKTOKEN_LINE.match(file.read(1000)) else "sentencepiece"
    if importlib.util.find_spec(extra) is None:
        raise ConfigError(f"tokenizer.model needs the extra: pip install 'minisgl[{extra}]'")


def lfs_hint(path: Path) -> str:
    """What to do about a file whose content Git LFS has not fetched; "" for any other file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return ""
    return "it is a Git LFS pointer, not the file itself; run git lfs pull, or download the model again" * is_pointer


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # sentencepiece's


class TokenBytes(dict[int, bytes]):
    """Token id → bytes, worked out when asked for. The bytes of a text's tokens, joined, are the text's (but for the
    space that sentencepiece puts first).

    tokenizer: of Hugging Face.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
        self._byte_of = byte_alphabet() if '"ByteLevel"' in decoder else None

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> bytes:
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        if added is not None:
            return str(added.content).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None
        if piece is None:
            return b""  # the model's vocabulary is padded
        if self._byte_of is not None:
            table = self._byte_of
            return b"".join(table[c] if c in table else c.encode() for c in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()


def byte_alphabet() -> dict[str, bytes]:
    """The printable character by which byte-level BPE writes each byte (GPT-2): bytes that print stand for themselves,
    the others follow from U+0100 on, in order."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    table = {chr(byte): bytes([byte]) for byte in printing}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
