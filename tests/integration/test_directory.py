"""What is no checkpoint says what it is; what a download takes and leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from minisgl.config.args import parse_args
from minisgl.config.families import read_model_config, weight_files
from minisgl.config.locate import locate_model, split_revision
from minisgl.config.resolve import prepare
from minisgl.errors import ConfigError
from minisgl.models.checkpoint import Checkpoint
from minisgl.tokenizer.tokenize import HFTextCodec

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
CONFIG = json.dumps(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
)


def made(path: Path, *names: str, content: str = "") -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(CONFIG if name == "config.json" else content)
    return path


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "config.json is missing; the directory is empty"),
        (["notes.txt"], "config.json is missing$"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter .LoRA., not a model: merge it"),
        (["refs/main", "snapshots/abc123/config.json"], "hub's cache: give .*/snapshots/abc123, or the repo id"),
        (["qwen-q4.gguf"], "give the GGUF file itself"),
        (["model_index.json", "unet/config.json"], "it is in .*/unet"),
        (["model_index.json"], "a pipeline of diffusers"),
        (["params.json", "consolidated.00.pth"], "in their authors' own format"),
        (["inner/config.json", "inner/model.safetensors"], "it is in .*/inner"),
    ],
)
def test_no_model_at_all(tmp_path: Path, files: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}.*{says}") as caught:
        read_model_config(made(tmp_path, *files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "model.safetensors is missing$"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter"),
        (["adapter_model.bin"], "an adapter"),
        (["consolidated.safetensors"], "in their authors' own format"),
        (["q4.gguf"], "give the GGUF file itself"),
        (["weights.safetensors"], "name must be model.safetensors"),
        (["weights.bin"], "name must be pytorch_model.bin"),
        (["model.pt"], "take the model's safetensors"),
        (["onnx/model.safetensors"], "it is in .*/onnx"),
        (["model-00002-of-00002.safetensors"], "be in a model.safetensors.index.json"),
    ],
)
def test_no_weights(tmp_path: Path, files: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        weight_files(made(tmp_path, "config.json", *files))


@pytest.mark.parametrize(
    "weight_map", [[], "x", {"a": 1}, {"a": ["x"]}, {"a": {}}, {"a": "gone.safetensors"}, {"a": None}]
)
def test_an_index_that_leads_nowhere(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=r"weight_map|missing"):
        weight_files(tmp_path)


def test_safetensors_come_before_files_of_torch(tmp_path: Path) -> None:
    made(tmp_path, "pytorch_model.bin", "model.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_files_that_git_has_not_fetched(tmp_path: Path) -> None:
    """Of every kind: the message says what they are, not what a parser thinks of them."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        made(tmp_path, "config.json")
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ConfigError, match=rf"{name}': it is a Git LFS pointer"):
            read_model_config(tmp_path)
        (tmp_path / name).unlink()
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ConfigError, match=rf"{name}': it is a Git LFS pointer"):
            Checkpoint(tmp_path)
        (tmp_path / name).unlink()
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ConfigError, match=rf"{name}: it is a Git LFS pointer"):
            HFTextCodec(str(tmp_path))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["config.json", "model.GGUF"])
def test_a_file_in_place_of_a_directory(name: str, tmp_path: Path) -> None:
    made(tmp_path, name)
    with pytest.raises(ConfigError, match=rf"{name}' is a file: give the directory .*, or a file named \*\.gguf$"):
        locate_model(str(tmp_path / name), "huggingface")


REPO = {  # what large repos hold: what we read of it, and what only costs time
    True: "config.json generation_config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors "
    "model.safetensors.index.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json qwen.tiktoken tekken.json "
    "additional_chat_templates/tools.jinja",
    False: "consolidated.safetensors consolidated.00.pth original/params.json original/tokenizer.model "
    "original/consolidated.00.pth adapter_config.json adapter_model.safetensors pytorch_model.bin "
    "pytorch_model.bin.index.json onnx/model.onnx onnx/config.json q4.gguf README.md modeling_x.py "
    "tokenization_x.py tokenizer.py coreml/model.mlpackage flax_model.msgpack tf_model.h5 runs/x.json "
    "model/x.safetensors checkpoint-5/model.safetensors "
    "checkpoint-5/optimizer.pt training_args.bin LICENSE metal/model.bin",
}


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("has_safetensors", [True, False])
def test_what_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_safetensors: bool, source: str
) -> None:
    repo = [name for part in REPO.values() for name in part.split()]
    repo = [name for name in repo if has_safetensors or not name.startswith("model")]
    revisions = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        revisions.append(revision)
        made(tmp_path, *filter_repo_objects(repo, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    if source == "modelscope":
        monkeypatch.setitem(__import__("sys").modules, "modelscope", type("M", (), {"snapshot_download": download}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate_model("org/name", source, "v1.0") == tmp_path
    taken = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    expected = {name for name in REPO[True].split() if name in repo}
    if not has_safetensors:
        expected |= {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert taken == expected
    assert set(revisions) == {"v1.0"}


def test_where_a_revision_may_stand(tmp_path: Path) -> None:
    assert split_revision("a/b@main", None) == ("a/b", "main")
    assert split_revision("a/b", "main") == ("a/b", "main")
    assert split_revision("a/b@x", "x") == ("a/b", "x")
    assert split_revision(None, None) == (None, None)
    (tmp_path / "a@b").mkdir()
    assert split_revision(str(tmp_path / "a@b"), None) == (str(tmp_path / "a@b"), None)
    for flags in (
        ["--model", "a/b@x", "--revision", "y"],
        ["--model", str(tmp_path), "--revision", "y"],
        ["--revision", "y"],
    ):
        with pytest.raises(ConfigError, match=r"^--revision y: "):
            prepare(parse_args(flags, {}))
