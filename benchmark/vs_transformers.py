"""minisgl beside Hugging Face `generate()`, on the same weights, in one run.

    python benchmark/vs_transformers.py [--rounds 3] [--layers 28] [--output FILE.json]

A random model of Qwen3-0.6B's shape in float32. The two take turns, so that a machine whose speed drifts slows both;
medians over the rounds are compared. Three measurements:

- one stream: tokens per second of a single request, after its first token;
- mixed: 16 requests of mixed prompt and output lengths arriving together. `generate()` gets them as one batch, padded
  on the left, and runs until the longest output is there; tokens past a request's own length do not count;
- prefix cache: time to the first token of a 1,024-token prompt, cold, and with its first 1,000 tokens cached.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from minisgl import LLM, SamplingParams

SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def make_checkpoint(directory: Path, num_layers: int) -> Any:
    """Random weights on disk, and the same model in transformers. The tokenizer is a stand-in: prompts are ids."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SHAPE, num_hidden_layers=num_layers)
    model = transformers.Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(directory)
    from minisgl.config.locate import DEMO_MODEL

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((DEMO_MODEL / name).read_bytes())
    return model


def mixed_workload() -> tuple[list[list[int]], list[int]]:
    """16 requests; lengths are log-uniform, as those of real traffic: many short ones, a few long ones."""
    rng = random.Random(0)

    def length(low: int, high: int) -> int:
        return round(low * (high / low) ** rng.random())

    prompts = [[rng.randrange(10_000) for _ in range(length(16, 512))] for _ in range(16)]
    return prompts, [length(8, 128) for _ in range(16)]


def random_ids(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10_000) for _ in range(length)]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


class Transformers:
    """`generate()` as its documentation uses it for batches: left padding and an attention mask."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Seconds to generate `num_tokens` for every prompt."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - start


def measure_round(reference: Transformers, llm: LLM, seed: int) -> dict[str, float]:
    """One round of each measurement, the two in turn. Keys ending in `_hf` are transformers'."""
    prompt, num_tokens = random_ids(128, seed), 33
    first = reference.generate([prompt], 1)
    results = {"one_stream_hf": (num_tokens - 1) / (reference.generate([prompt], num_tokens) - first)}
    metrics = llm.generate(prompt, greedy(num_tokens))[0].metrics
    results["one_stream"] = (num_tokens - 1) / (metrics.total_time - metrics.time_to_first_token)

    prompts, lengths = mixed_workload()
    prompts = [[*ids[:-1], seed] for ids in prompts]
    start = time.perf_counter()
    llm.generate(prompts, [greedy(length) for length in lengths], progress=False)
    results["mixed"] = sum(lengths) / (time.perf_counter() - start)
    results["mixed_hf"] = sum(lengths) / reference.generate(prompts, max(lengths))

    cold = random_ids(1024, seed + 1000)
    warm = cold[:1000] + random_ids(24, seed + 2000)
    results["ttft_cold"] = llm.generate(cold, greedy(1))[0].metrics.time_to_first_token
    output = llm.generate(warm, greedy(1))[0]
    assert output.cached_tokens >= 992, output.cached_tokens
    results["ttft_cached"] = output.metrics.time_to_first_token
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        reference = Transformers(make_checkpoint(Path(directory), args.layers))
        with LLM(directory, dtype="float32", max_seq_len=2048, num_pages=2048, page_size=16) as llm:
            llm.generate(random_ids(64, 1), greedy(4))
            reference.generate([random_ids(64, 1)], 4)
            rounds = []
            for seed in range(args.rounds):
                rounds.append(measure_round(reference, llm, seed))
                print(json.dumps({name: round(value, 3) for name, value in rounds[-1].items()}), flush=True)
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, unit in (("one_stream", "tok/s"), ("mixed", "tok/s")):
        ours, theirs = medians[name], medians[f"{name}_hf"]
        ratio = statistics.median(r[name] / r[f"{name}_hf"] for r in rounds)
        print(f"{name}: minisgl {ours:.2f}, transformers {theirs:.2f} {unit}, ratio {ratio:.2f}")
    cold, cached = medians["ttft_cold"], medians["ttft_cached"]
    print(f"prefix cache: cold {cold:.3f} s, cached {cached:.3f} s, ratio {cached / cold:.3f}")
    if args.output:
        args.output.write_text(json.dumps({"rounds": rounds, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
