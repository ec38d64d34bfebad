"""What the prefix cache gives and costs a model with recurrent states: the times of a chat's turns with and without it,
and throughput where nothing is found.

    python benchmark/offline/chats.py [--turns 10] [--new 100] [--tokens 64] [--streams 8] [--rounds 6] [flags]

Random weights of Qwen3.5-0.8B's shape, with `--layers` layers and a vocabulary of 32,000. One process has an engine
with the cache and one without, which take turns, in alternating order. A turn of a chat has `--new` tokens more than
the last one and its answer of `--tokens`. Throughput is that of `--streams` requests at once that share nothing, of
`--prompt` and `--tokens` tokens, in `--rounds` pairs. Further flags are the engines'.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from minisgl import LLM, SamplingParams
from minisgl.benchmark import run_script
from minisgl.benchmark.offline import engine_options
from minisgl.benchmark.shapes import write_shape
from minisgl.config.args import parse_args

SHAPE = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 32000,
}


def ids(numbers: random.Random, count: int) -> list[int]:
    return [numbers.randrange(200, 30000) for _ in range(count)]


def turn_times(llm: LLM, seed: int, args: argparse.Namespace) -> list[float]:
    """Milliseconds to the first token of each turn of one chat."""
    numbers, times = random.Random(seed), list[float]()
    history = ids(numbers, args.new)
    for _ in range(args.turns):
        (output,) = llm.generate([history], SamplingParams(args.tokens, 0.0, ignore_eos=True))
        times.append(1000 * output.metrics.time_to_first_token)
        history += output.token_ids + ids(numbers, args.new)
    return times


def throughput(llm: LLM, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Tokens for each second, those of prompts included, and for each second of the processor's time."""
    numbers, begin = random.Random(seed), (time.perf_counter(), time.process_time())
    prompts = [ids(numbers, args.prompt) for _ in range(args.streams)]
    outputs = llm.generate(prompts, SamplingParams(args.tokens, 0.0, ignore_eos=True))
    assert not any(output.cached_tokens for output in outputs)
    num_tokens = args.streams * (args.prompt + args.tokens)
    return num_tokens / (time.perf_counter() - begin[0]), num_tokens / (time.process_time() - begin[1])


def measure(llms: dict[str, LLM], args: argparse.Namespace) -> None:
    if args.turns:
        times = {kind: turn_times(llm, 1, args) for kind, llm in llms.items()}
        print("| turn | with, ms | without, ms | ratio |\n|---|---:|---:|---:|")
        for turn, (cached, not_cached) in enumerate(zip(*times.values(), strict=True)):
            print(f"| {turn + 1} | {cached:.0f} | {not_cached:.0f} | {cached / not_cached:.3f} |")
    rates: dict[str, list[tuple[float, float]]] = {kind: [] for kind in llms}
    for number in range(args.rounds + 1):
        for kind in [*llms][:: 1 if number % 2 else -1]:
            rate = throughput(llms[kind], 1000 + number, args)
            if number:  # the first round warms up
                rates[kind].append(rate)
    for index, what in enumerate(("tokens/s", "tokens for each second of the processor") if args.rounds else ()):
        print({kind: [round(values[index]) for values in rounds] for kind, rounds in rates.items()})
        ratios = [one[index] / other[index] for one, other in zip(*rates.values(), strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{what}, with / without: {middle:.3f}, half of the rounds within {low:.3f} to {high:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"turns": 10, "new": 100, "tokens": 64, "streams": 8, "prompt": 200, "rounds": 6, "layers": 24}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "shape")
        source.mkdir()
        (source / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": args.layers}))
        path = write_shape(str(source), Path(folder, "model"))
        options: dict[str, Any] = {**engine_options(parse_args(flags)), "dummy_weight": True}
        with LLM(str(path), **options) as cached, LLM(str(path), **options, cache_type="naive") as plain:
            measure({"with": cached, "without": plain}, args)


if __name__ == "__main__":
    run_script(main)
