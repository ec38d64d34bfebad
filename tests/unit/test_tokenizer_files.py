"""Tokenizers in other files than tokenizer.json, or larger than their model; code of a repo, which never runs."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from minisgl.config.families import read_model_config
from minisgl.config.locate import DEMO_MODEL
from minisgl.errors import ConfigError
from minisgl.grammar.source import VocabularyConfig, load_vocabulary
from minisgl.tokenizer.tokenize import HFTextCodec
from tests.tokenizer_reader import SAMPLES, read
from tests.tokenizers_fixture import TEXT, make_byte_level, make_sentencepiece

SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "eos_token_id": 2}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 400, **SHAPE}


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as older checkpoints have it: `tokenizer.model` alone."""
    path = tmp_path_factory.mktemp(request.param)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(path / "tokenizer"),
        model_type=request.param,
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_a_sentencepiece_model_alone(model_file: Path) -> None:
    codec = HFTextCodec(str(model_file))
    theirs = AutoTokenizer.from_pretrained(model_file)
    for text in SAMPLES:
        assert codec.encode(text, special=True) == theirs(text).input_ids
        assert codec.decode(codec.encode(text, special=False)).strip() == text.strip()


def test_structured_output_with_a_sentencepiece_model_alone(model_file: Path) -> None:
    vocabulary = load_vocabulary(VocabularyConfig(str(model_file), 400, (2,)))
    assert vocabulary.special["</s>"] == 2


def make_tiktoken(path: Path) -> Path:
    """As Llama 3 came first: bytes and what they merge to, in order; special tokens are in the configuration."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w"]
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces)]
    (path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    added = {"261": {"content": "<|end|>", "special": True}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "added_tokens_decoder": added}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": None}))
    return path


def test_a_tiktoken_file(tmp_path: Path) -> None:
    codec = HFTextCodec(str(make_tiktoken(tmp_path)))
    ids = codec.encode("hello world<|end|>", special=False)
    assert ids == [259, 260, *b"orld", 261]
    assert codec.decode(ids, skip_special=False) == "hello world<|end|>"
    assert read_model_config(tmp_path).eos_token_ids == (261,)


@pytest.mark.parametrize("package", ["sentencepiece", "tiktoken"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    path = model_file if package == "sentencepiece" else make_tiktoken(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"tokenizer.model needs the extra: pip install 'minisgl\[{package}\]'"):
        HFTextCodec(str(path))


@pytest.mark.parametrize("make", [make_byte_level, make_sentencepiece])
def test_a_tokenizer_that_is_larger_than_its_model(tmp_path: Path, make: object) -> None:
    """Structured output works with the tokens that the model has: masks are as wide as its logits."""
    path = str(make(tmp_path))  # type: ignore[operator]
    size = HFTextCodec(path).vocab_size - 7
    whole, part = (load_vocabulary(VocabularyConfig(path, n, (2,))) for n in (size + 7, size))
    assert (whole.tokenizer.vocab_size, part.tokenizer.vocab_size) == (size + 7, size)
    assert part.tokenizer.decode_bytes([5]) == whole.tokenizer.decode_bytes([5])
    assert max(part.tokenizer.tokenize_str("the w hello")) < size


MALICE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("where", ["tokenizer", "config", "both"])
@pytest.mark.parametrize("files", [(), ("vocab.json",), ("tokenizer.json",), ("tokenizer.model",)])
def test_code_of_a_repo_never_runs(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, where: str, files: tuple[str, ...]
) -> None:
    """Nor is anybody asked whether it may."""
    marker, path = tmp_path / "executed", tmp_path / "model"
    path.mkdir()
    for name in ("tokenization_evil", "configuration_evil", "modeling_evil"):
        (path / f"{name}.py").write_text(MALICE.format(marker=str(marker)))
    own = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    classes = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    tokenizer = {"tokenizer_class": "Evil"} | ({"auto_map": own} if where != "config" else {})
    config = {**CONFIG, "model_type": "evil"} | ({"auto_map": {**own, **classes}} if where != "tokenizer" else {})
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "config.json").write_text(json.dumps(config))
    for name in files:
        content = b'{"a": 0}'
        if name == "tokenizer.json":
            content = (make_byte_level(tmp_path / "whole") / name).read_bytes()
        elif name == "tokenizer.model":
            content = (model_file / name).read_bytes()
        (path / name).write_bytes(content)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    try:
        HFTextCodec(str(path))
        said = ""
    except ConfigError as error:
        said = str(error)
    assert not marker.exists() and not asked
    assert "\n" not in said
    if not files:
        assert "there is no tokenizer.json" in said


def test_a_process_with_a_part_of_transformers_reads_the_same(tmp_path: Path) -> None:
    """What the plain class does not read is loaded by all of transformers, as ever."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson if tools else '' }}"
    (tmp_path / "tiktoken").mkdir()
    paths = [DEMO_MODEL, make_byte_level(tmp_path / "bytes"), make_byte_level(tmp_path / "bos", bos=True)]
    paths += [make_sentencepiece(tmp_path / "sentencepiece"), make_tiktoken(tmp_path / "tiktoken")]
    for path in paths[3:]:
        (path / "chat_template.jinja").write_text(template)
    command = [sys.executable, "-m", "tests.tokenizer_reader", *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRANSFORMERS_VERBOSITY": "error"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    for path in paths:
        *same, needs_only_a_part = found[str(path)]
        assert json.loads(json.dumps(read(str(path)))) == same
        assert needs_only_a_part == (path.name != "tiktoken")
