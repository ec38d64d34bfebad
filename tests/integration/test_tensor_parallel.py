"""Two and four ranks over gloo, in spawned processes, give the tokens of one."""

from __future__ import annotations

import multiprocessing as mp
import queue
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from minisgl.core import SamplingParams
from minisgl.engine.engine import create_engine
from minisgl.errors import ConfigError
from minisgl.kernel.ops import LayerOps
from tests.driver import CPU_KERNELS, GREEDY, engine_config, generate
from tests.models import random_prompt, tiny_model

PARAMS = [GREEDY, SamplingParams(temperature=0.9, seed=5), SamplingParams(top_k=30, top_p=0.9, seed=6), GREEDY]
PARAMS += [SamplingParams(seed=7, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2, prompt_logprobs=1)]
PROMPTS = [random_prompt(4 + 9 * i, seed=i) for i in range(len(PARAMS))]


def run_rank(rank: int, cases: list[tuple[Path, int, str]], fields: dict[str, Any], results: Any) -> None:
    """All cases, one engine after the other in the same process. fields: `late_from` is of `LayerOps`."""
    LayerOps.late_from = fields.pop("late_from", LayerOps.late_from)
    for i, (path, tp_size, init_method) in enumerate(cases):
        if rank >= tp_size:
            continue
        config = engine_config(path, tp_size=tp_size, init_method=init_method, **fields)
        engine = create_engine(config, rank)
        outputs = generate(engine, config, PROMPTS, 12, PARAMS, chunk=20, stagger=1)
        engine.close()
        results.put((i, rank, outputs))


def run_ranks(cases: list[tuple[Path, int]], **fields: Any) -> dict[tuple[int, int], list[list[int]]]:
    """Outputs by (case, rank)."""
    context = mp.get_context("spawn")
    results = context.Queue()
    directory = tempfile.mkdtemp(prefix="minisgl-test-")
    meetings = [(path, tp_size, f"file://{directory}/{i}") for i, (path, tp_size) in enumerate(cases)]
    num_ranks = max(tp_size for _, tp_size in cases)
    processes = [context.Process(target=run_rank, args=(rank, meetings, fields, results)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    found: dict[tuple[int, int], list[list[int]]] = {}
    try:
        while len(found) < sum(tp_size for _, tp_size in cases):
            assert all(process.exitcode in (None, 0) for process in processes), "a rank failed"
            try:
                case, rank, outputs = results.get(timeout=1)
            except queue.Empty:
                continue
            found[case, rank] = outputs
    finally:
        for process in processes:
            process.join(10) if len(found) == sum(n for _, n in cases) else process.kill()
            process.join()
            process.close()
        results.close()
        results.join_thread()
        shutil.rmtree(directory)
    return found


def assert_as_one_rank(cases: list[tuple[Path, int]], found: dict[tuple[int, int], list[list[int]]]) -> None:
    for case, (path, tp_size) in enumerate(cases):
        config = engine_config(path)
        engine = create_engine(config)
        expected = generate(engine, config, PROMPTS, 12, PARAMS)
        engine.close()
        for rank in range(tp_size):
            assert found[case, rank] == expected, (case, rank)


def test_ranks_agree_with_one_rank() -> None:
    models = [
        (tiny_model("qwen3", vocab_size=255), 2),  # a vocabulary that two does not divide
        (tiny_model("llama", attention_bias=True, mlp_bias=True, vocab_size=255, tie_word_embeddings=True), 2),
        (tiny_model("llama", num_key_value_heads=1), 2),  # fewer KV heads than ranks
        (tiny_model("mistral", sliding_window=16), 2),
        (tiny_model("qwen2"), 2),  # biases of queries, keys and values alone
        (tiny_model("qwen3_moe"), 2),
        (tiny_model("qwen2_moe"), 2),  # a shared expert
        (tiny_model("olmo2", attention_bias=True), 2),  # norms over the heads of all ranks, and of what is added
        (tiny_model("glm4"), 2),  # heads in another order, fused in the file
        (tiny_model("gemma3_text"), 2),
        (tiny_model("gemma4_text"), 2),  # heads of two sizes, one repeated; inputs for each layer
        (tiny_model("qwen3_5_text"), 2),  # states, and gates beside queries
        (tiny_model("qwen3_next"), 2),  # fused in the file
        (tiny_model("gpt_oss"), 2),  # sinks, biases of experts
        (tiny_model("lfm2"), 2),
        (tiny_model("lfm3"), 2),  # windows, and gates of heads
        (tiny_model("exaone4"), 2),  # some layers are not rotated
        (tiny_model("granitemoe"), 2),  # experts whose gate and up are one stack
        (tiny_model("olmoe"), 2),  # norms over the heads of all ranks, and experts
        (tiny_model("granitemoehybrid"), 2),
    ]
    found = run_ranks(models, **{**CPU_KERNELS, "num_threads": 1})
    assert_as_one_rank(models, found)


def test_one_rank_adds_biases_in_the_norm_ahead() -> None:
    """As GPUs have it from some tokens on; here from 8, so that both ways alternate."""
    models = [(tiny_model("gpt_oss"), 2), (tiny_model("llama", attention_bias=True), 2)]
    found = run_ranks(models, late_from=8)
    assert_as_one_rank(models, found)


def test_dummy_weights_do_not_depend_on_ranks() -> None:
    path = tiny_model("qwen3")
    found = run_ranks([(path, 2)], dummy_weight=True, seed=3)
    config = engine_config(path, dummy_weight=True, seed=3)
    engine = create_engine(config)
    assert found[0, 0] == found[0, 1] == generate(engine, config, PROMPTS, 12, PARAMS)
    engine.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, "3 attention heads"),
        ({"intermediate_size": 97}, "97 features of gate_proj"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}, "3 KV heads"),
    ],
)
def test_ranks_that_do_not_fit(overrides: dict[str, Any], message: str) -> None:
    from minisgl.layers.base import LayerEnv
    from minisgl.models.decoder import DecoderModel

    class TwoRanks:
        rank, size = 0, 2

    import torch

    from minisgl.kernel.ops import TorchOps

    env = LayerEnv(TwoRanks(), TorchOps(), torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size 2 .*{message}"):
        DecoderModel(env, engine_config(tiny_model("llama", **overrides)).model)
