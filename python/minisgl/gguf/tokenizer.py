"""The tokenizer that a GGUF file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_gguf_tokenizer(path: Path) -> Any:
    """A tokenizer of transformers, with the file's chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
