"""Every automatic choice, from options, a model's shape and a machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minisgl.config.args import args_from_options
from minisgl.config.locate import DEMO_MODEL, locate_model
from minisgl.config.model import ModelConfig, RopeConfig
from minisgl.config.probe import Capabilities, probe
from minisgl.config.resolve import ModelFiles, read_default_sampling, resolve
from minisgl.config.runtime import ServerConfig
from minisgl.errors import ConfigError

MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_qo_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope=RopeConfig(1e6),
    max_position=40960,
    tie_word_embeddings=True,
    dtype="bfloat16",
    eos_token_ids=(7, 8),
)
MACHINE = Capabilities(num_cores=8, memory=24 * 2**30, cpu_flags=frozenset({"avx2", "fma"}))


def decide(machine: Capabilities = MACHINE, model: ModelConfig = MODEL, **options: Any) -> ServerConfig:
    return resolve(args_from_options(options), ModelFiles(Path("/m"), model, {}), machine)


def test_bfloat16_only_where_the_cpu_multiplies_it() -> None:
    assert decide().engine.dtype == "float32"
    fast = replace(MACHINE, cpu_flags=frozenset({"avx512_bf16"}))
    assert decide(fast).engine.dtype == "bfloat16"
    assert decide(fast, replace(MODEL, dtype="float32")).engine.dtype == "float32"
    assert decide(dtype="bfloat16").engine.dtype == "bfloat16"


def test_kv_cache_fills_the_memory_that_the_weights_leave() -> None:
    config = decide(memory_ratio=0.5)
    taken = config.engine.num_pages * config.engine.page_size * MODEL.kv_bytes_per_token("float32")
    budget = 0.5 * MACHINE.memory - MODEL.weight_bytes("float32")
    assert 0.99 * budget < taken <= budget
    assert decide(memory_ratio=0.25).engine.num_pages < config.engine.num_pages


def test_kv_cache_is_no_larger_than_requests_can_use() -> None:
    config = decide(max_running_requests=2, max_seq_len=1000, page_size=16)
    assert config.engine.num_pages == 2 * 63


def test_too_little_memory_says_what_takes_it() -> None:
    with pytest.raises(ConfigError, match=r"--memory-ratio 0\.9: 2\.0 GiB .* weights take 2\.\d GiB"):
        decide(replace(MACHINE, memory=2 * 2**30))


def test_one_request_always_fits_the_cache() -> None:
    config = decide(num_pages=10, page_size=16)
    assert config.scheduler.max_seq_len == config.tokenizer.max_seq_len == config.engine.max_seq_len == 160
    with pytest.raises(ConfigError, match="--max-seq-len 500"):
        decide(num_pages=10, page_size=16, max_seq_len=500)
    with pytest.raises(ConfigError, match="--max-seq-len 50000: the model's context is 40960"):
        decide(max_seq_len=50_000)


def test_threads_are_shared_between_ranks() -> None:
    assert decide().engine.num_threads == 8
    assert decide(tp=2).engine.num_threads == 4
    small = replace(MODEL, vocab_size=4096, hidden_size=256, num_layers=10, intermediate_size=640, head_dim=16)
    assert decide(model=small).engine.num_threads == 1, "threads wait for one another longer than they compute"
    with pytest.raises(ConfigError, match="--tensor-parallel-size 3"):
        decide(tp=3)


def test_backends_and_devices_that_are_not_here() -> None:
    assert (decide(attention_backend="sdpa").engine.prefill_backend, decide().engine.decode_backend) == ("sdpa", "sdpa")
    for backend in ("fi", "sdpa,fa", "sdpa,sdpa,sdpa", ","):
        with pytest.raises(ConfigError, match="--attention-backend"):
            decide(attention_backend=backend)
    with pytest.raises(ConfigError, match="--device cuda"):
        decide(device="cuda")


def test_the_rest_is_passed_on() -> None:
    config = decide(cache_type="naive", schedule_policy="lpm", disable_overlap=True, num_tokenizer=2, port=5)
    scheduler = config.scheduler
    assert (scheduler.cache_type, scheduler.schedule_policy, scheduler.overlap) == ("naive", "lpm", False)
    assert scheduler.eos_token_ids == (7, 8)
    assert (config.num_tokenizer, config.port) == (2, 5)
    assert decide(model_path="org/name").served_model_name == "org/name"
    assert decide(served_model_name="x").served_model_name == "x"


def test_recommended_sampling(tmp_path: Path) -> None:
    assert read_default_sampling(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1}))
    assert read_default_sampling(tmp_path) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert read_default_sampling(tmp_path) == {"temperature": 0.0}
    for wrong in ("{", '{"temperature": "hot"}', '{"top_k": [1]}', '{"top_p": 2}'):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read_default_sampling(tmp_path)


def test_where_models_are_found(tmp_path: Path) -> None:
    assert locate_model(None, "huggingface") == DEMO_MODEL
    assert locate_model(str(tmp_path), "huggingface") == tmp_path.resolve()
    for wrong in (str(tmp_path / "missing"), "./missing", "missing", "a/b/c"):
        with pytest.raises(ConfigError, match="neither a directory nor a repo id"):
            locate_model(wrong, "huggingface")


def test_a_repo_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route to the hub\ndetails")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"^--model org/name: cannot be fetched: no route to the hub$"):
        locate_model("org/name", "huggingface")


def test_this_machine_can_be_probed() -> None:
    machine = probe()
    assert machine.num_cores >= 1
    assert machine.memory > 2**20
