"""Headers of GGUF files that somebody has tampered with, or that were cut off: nothing but a ConfigError of one line
comes out, and no more memory is taken than the file has."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minisgl.config.chat import read_chat_template
from minisgl.config.families import read_model_config
from minisgl.config.model import ModelConfig
from minisgl.config.resolve import read_default_sampling
from minisgl.errors import ConfigError
from minisgl.gguf.model import GgufFile, GgufModel

HIDDEN, HEADS, INNER, VOCAB = 64, 4, 96, 40
TENSORS = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, INNER),
    "rope_freqs.weight": (HIDDEN // HEADS // 2,),
}
HOSTILE = [0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def write(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_feed_forward_length(INNER)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(2.0)
    writer.add_float32("general.sampling.temp", 0.7)
    writer.add_token_list([f"<{i}>" for i in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        [{"name": "default", "template": "{{ messages }}"}, {"name": "tools", "template": "{{ tools }}"}]
    )
    for name, shape in TENSORS.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    for key, value in changes.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def read_all(path: Path) -> ModelConfig:
    read_default_sampling(path)
    read_chat_template(path)
    GgufFile(path).values()
    return read_model_config(path)


def survives(path: Path) -> bool:
    """Whether it can be read."""
    problem, size = "", path.stat().st_size
    tracemalloc.start()
    try:
        read_all(path)
    except ConfigError as error:
        problem = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in problem
    assert len(problem) < 1000
    assert peak < 100_000 + 20 * size
    return not problem


def test_the_whole_file(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(whole)
    model = read_all(path)
    assert (model.vocab_size, model.hidden_size, model.num_layers, model.ropes[0].theta) == (VOCAB, HIDDEN, 1, 10000.0)
    assert read_default_sampling(path) == {"temperature": pytest.approx(0.7)}
    assert sorted(read_chat_template(path).splitlines()) == ["{{ messages }}", "{{ tools }}"]


def test_every_length(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    for size in range(0, len(whole), 13):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"cut off|cannot read|no GGUF file"):
            GgufModel(path)


edits = st.tuples(st.integers(0, 4000), st.sampled_from(HOSTILE), st.sampled_from(["<B", "<I", "<Q"]))


@given(st.lists(edits, min_size=1, max_size=3))
@example([(8, 2**63, "<Q")])
@example([(16, 2**64 - 1, "<Q")])
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_that_are_others(whole: bytes, tmp_path: Path, edits: list[tuple[int, int, str]]) -> None:
    data = bytearray(whole)
    for at, number, form in edits:
        at = min(at, len(data) - 8)
        data[at : at + struct.calcsize(form)] = struct.pack(form, number % 2 ** (8 * struct.calcsize(form)))
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    survives(path)


@given(st.binary(max_size=200))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "noise.gguf"
    for data in (noise, b"GGUF" + noise, b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + noise):
        path.write_bytes(data)
        assert not survives(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"llama__embedding_length": 128},
            r"tensor token_embd.weight is \[40, 64\]; by the metadata it is \[40, 128\]",
        ),
        ({"llama__block_count": 0}, "num_hidden_layers must be a whole number, 1 to 4096, not 0"),
        ({"general__alignment": 48}, "general.alignment is 48, which is no power of 2"),
        ({"llama__attention__head_count_kv": 3}, "3 key-value heads do not divide"),
    ],
)
def test_metadata_that_contradicts_the_tensors(changes: dict[str, int], reason: str, tmp_path: Path) -> None:
    path = rewritten(tmp_path / "model.gguf", changes)
    with pytest.raises(ConfigError, match=f"^{path}(/config.json)?: {reason}"):
        read_model_config(path)


def rewritten(path: Path, changes: dict[str, int]) -> Path:
    """A file whose keys have other values, or that has others."""
    known = {"llama__embedding_length": HIDDEN, "llama__block_count": 1}
    write(path, **{key: value for key, value in changes.items() if key not in known})
    for key, value in changes.items():
        if key in known:
            name = key.replace("__", ".").encode()
            at = path.read_bytes().index(name) + len(name) + 4
            data = bytearray(path.read_bytes())
            data[at : at + 4] = struct.pack("<I", value)
            path.write_bytes(data)
    return path


def test_types_and_architectures_that_are_not_known(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "gptneox")
    with pytest.raises(ConfigError, match=rf"^{path}: architecture not supported: 'gptneox' \(supported: llama, "):
        read_model_config(path)
    data = write(path).read_bytes()
    at = data.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 16
    for number, name in ((34, "TQ1_0"), (24, "I8"), (999, "999")):
        path.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])
        with pytest.raises(ConfigError, match=f"tensor blk.0.ffn_down.weight is of type {name}, not supported .*Q4_K"):
            read_model_config(path)


def test_tensors_do_not_overlap(whole: bytes, tmp_path: Path) -> None:
    """A small file could stand for a model of any size."""
    name, path = b"blk.0.attn_q.weight", tmp_path / "model.gguf"
    at = whole.index(name) + len(name) + 4 + 16 + 4
    path.write_bytes(whole[:at] + struct.pack("<Q", 0) + whole[at + 8 :])
    with pytest.raises(ConfigError, match=r"tensor .* cannot be at byte \d+"):
        GgufModel(path)


def test_a_large_vocabulary_is_read_in_no_time(tmp_path: Path) -> None:
    """It stays in the file: nothing is made of a token before somebody asks."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token number {i}" for i in range(150_000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tracemalloc.start()
    file = GgufFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert file.values("tokenizer.ggml.tokens").data["tokenizer.ggml.tokens"][149_999] == "token number 149999"
