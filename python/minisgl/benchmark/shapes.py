"""Well-known model shapes, for benchmarks with random weights: a `config.json` and a stand-in tokenizer."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minisgl.config.families import read_model_config
from minisgl.config.model import ModelConfig
from minisgl.errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())["shapes"]
# What random chats are made of: each word is one token of the stand-in tokenizer, and of most real ones.
WORDS = ("time", "year", "day", "way", "man", "world", "life", "hand", "part", "place", "week", "case", "work", "point")
_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def write_shape(name: str, directory: str | Path) -> Path:
    """Make `directory` a model directory of the shape `name`, or of the `config.json` in the directory `name`.

    The tokenizer is that of the directory `name` if it has one, else a stand-in (`stand_in_tokenizer`).
    Raises: ConfigError when there is no such shape, or its configuration is not one that is served.
    """
    path, source = Path(directory), Path(name)
    path.mkdir(parents=True, exist_ok=True)
    model = _write_config(name, path)
    if name not in SHAPES and (source / "tokenizer.json").is_file():
        for file in source.glob("tokenizer*.json"):
            shutil.copy(file, path)
        return path
    stand_in_tokenizer(model.vocab_size, model.eos_token_ids).save(str(path / "tokenizer.json"), pretty=False)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (path / "tokenizer_config.json").write_text(json.dumps({**kind, "chat_template": _TEMPLATE}))
    return path


def read_shape(name: str) -> ModelConfig:
    """What a model of the shape is like. Raises: ConfigError as `write_shape`."""
    with tempfile.TemporaryDirectory() as directory:
        return _write_config(name, Path(directory))


def _write_config(name: str, path: Path) -> ModelConfig:
    if name not in SHAPES and not Path(name, "config.json").is_file():
        raise ConfigError(f"shape {name!r}: expected {', '.join(SHAPES)}, or a directory with config.json")
    text = json.dumps(SHAPES[name]) if name in SHAPES else Path(name, "config.json").read_text()
    (path / "config.json").write_text(text)
    return read_model_config(path)


def stand_in_tokenizer(vocab_size: int, ends: Iterable[int] = ()) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens, each of which but `ends` is text: so that each step of a stream shows, as it
    would with real weights. Ids below 128 are ASCII characters, the next ones are `WORDS`, the others made up."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = [byte_level.pre_tokenize_str(chr(code))[0][0] for code in range(128)] + [f"Ġ{word}" for word in WORDS]
    tokens += [f"Ġw{number}" for number in range(len(tokens), vocab_size)]
    special = {end: f"<|end {end}|>" for end in ends if 128 <= end < len(tokens)}
    tokens = [special.get(number, token) for number, token in enumerate(tokens)]
    vocab = {token: number for number, token in enumerate(tokens[:vocab_size])}
    unknown = "?" if "?" in vocab else tokens[0]  # for characters beyond ASCII
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=unknown, ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special.values()])  # no grammar takes them for text
    return tokenizer
