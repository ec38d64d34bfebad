"""Loading: sharded, tied, converted; errors that name what is wrong; memory that stays at the size of the weights."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisgl.engine.cpu import CpuRunner
from minisgl.engine.engine import create_engine
from minisgl.errors import ConfigError
from tests.driver import engine_config, generate
from tests.models import hf_generate, random_prompt, tiny_model


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def change_weights(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sharded(family: str) -> None:
    path = tiny_model(family, shard="100KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    config = engine_config(path)
    engine = create_engine(config)
    prompt = random_prompt(9)
    assert generate(engine, config, [prompt], 16) == [hf_generate(path, prompt, 16)]
    engine.close()


def test_tied_checkpoint_that_holds_the_head_too(tmp_path: Path) -> None:
    path = copy_model(tiny_model("llama", tie_word_embeddings=True), tmp_path / "model")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(path, {"lm_head.weight": embedding.clone(), inv_freq: torch.ones(4)})
    config = engine_config(path)
    engine = create_engine(config)
    prompt = random_prompt(9)
    assert generate(engine, config, [prompt], 8) == [hf_generate(path, prompt, 8)]
    engine.close()


def test_one_error_names_all_that_does_not_fit(tmp_path: Path) -> None:
    path = copy_model(tiny_model("llama"), tmp_path / "model")
    change_weights(
        path,
        {
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": torch.zeros(7, 64),
            "model.layers.0.self_attn.q_norm.weight": torch.ones(16),
        },
    )
    with pytest.raises(ConfigError) as caught:
        CpuRunner(engine_config(path), 0)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: model.layers.0.self_attn.q_norm.weight" in message
    assert "model.layers.1.mlp.up_proj.weight is [7, 64], not [96, 64]" in message
    assert str(path) in message


def test_incomplete_directories(tmp_path: Path) -> None:
    path = copy_model(tiny_model("llama", shard="100KB"), tmp_path / "sharded")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} missing"):
        CpuRunner(engine_config(path), 0)
    path = copy_model(tiny_model("llama"), tmp_path / "single")
    (path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors"):
        CpuRunner(engine_config(path), 0)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        CpuRunner(engine_config(path), 0)


def test_dummy_weights_need_no_files(tmp_path: Path) -> None:
    shutil.copy(tiny_model("qwen3") / "config.json", tmp_path)
    config = engine_config(tmp_path, dummy_weight=True)
    outputs = []
    for _ in range(2):
        engine = create_engine(config)
        outputs.append(generate(engine, config, [random_prompt(9)], 16)[0])
        engine.close()
    assert outputs[0] == outputs[1]
    assert min(outputs[0]) >= 0


MEASURE = """
import re, sys
from pathlib import Path
from tests.driver import engine_config
from minisgl.engine.cpu import CpuRunner

def peak():  # of this program; getrusage() would count the parent's as well
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

CpuRunner(engine_config(sys.argv[1], num_pages=1, max_seq_len=1), 0)  # imports, arenas, thread pools
small = peak()
runner = CpuRunner(engine_config(sys.argv[2], num_pages=1, max_seq_len=1, num_threads=2), 0)
print((peak() - small) * 1024)
"""


@pytest.mark.parametrize("num_shards", [1, 3])
def test_peak_memory(tmp_path: Path, num_shards: int) -> None:
    """A bf16 checkpoint kept as fp32: the peak is at most 1.15 times what is kept."""
    path = tmp_path / "big"
    shutil.copytree(tiny_model("llama"), path)
    fields = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "head_dim": 64,
        "vocab_size": 8192,
    }
    config = {**json.loads((path / "config.json").read_text()), **fields}
    config.update({"num_attention_heads": 16, "num_key_value_heads": 8})
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").unlink()
    shapes = _shapes(path)
    names = list(shapes)
    shards = [names[i::num_shards] for i in range(num_shards)]
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i}.safetensors" if num_shards > 1 else "model.safetensors"
        save_file({n: torch.full(shapes[n], 0.01, dtype=torch.bfloat16) for n in shard}, path / file)
        index.update(dict.fromkeys(shard, file))
    if num_shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    command = [sys.executable, "-c", MEASURE, str(tiny_model("llama")), str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONPATH": "python:."})
    peak, kept = int(done.stdout), sum(4 * math.prod(shape) for shape in shapes.values())
    assert kept > 200e6
    assert 0.9 * kept < peak <= 1.15 * kept, f"{peak / kept:.3f}"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from minisgl.distributed.comm import Communicator
    from minisgl.kernel.ops import TorchOps
    from minisgl.layers.base import LayerEnv
    from minisgl.models.decoder import DecoderModel

    env = LayerEnv(Communicator(), TorchOps(), torch.float32, torch.device("meta"))
    parts = DecoderModel(env, engine_config(path).model).parts()
    return {slot.name: slot.shape for part in parts for slot in part.slots}
