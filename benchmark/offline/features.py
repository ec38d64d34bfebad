"""What a feature of a request costs: streams that use it beside plain ones, in one engine.

    python benchmark/offline/features.py [--streams 64] [--tokens 256] [--rounds 5] [--json FILE] [flags]

Each round runs every kind once: plain, then each feature in all streams, and in half of them. Every stream makes
exactly `--tokens` tokens (the schema's arrays are longer than that). Prints a Markdown table of medians, with the
median of each round's ratio to its own plain run. Further flags are the engine's (`--model`, `--dummy-weight`, …).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from minisgl import LLM, SamplingParams
from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import describe_machine
from minisgl.benchmark.offline import engine_options
from minisgl.config.args import parse_args
from minisgl.core import Grammar

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"enum": ["red", "green"]}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = json.dumps({"type": "array", "items": ITEM, "minItems": 1000})
FEATURES: dict[str, dict[str, object]] = {
    "JSON schema": {"grammar": Grammar("json", SCHEMA)},
    "regular expression": {"grammar": Grammar("regex", "([a-z]+ ){5000}")},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": ((5, 1.0), (6, -1.0))},
    "logprobs, 5": {"logprobs": 5},
}


def make_params(seed: int, tokens: int, **feature: object) -> SamplingParams:
    return SamplingParams(tokens, 0.8, seed=seed, ignore_eos=True, **feature)  # type: ignore[arg-type]


def tokens_per_second(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    duration = time.perf_counter() - start
    lengths = {len(output.token_ids) for output in outputs}
    assert lengths == {params[0].max_tokens}, f"streams of other lengths: {sorted(lengths)}"
    return len(prompts) * len(outputs[0].token_ids) / duration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(FEATURES), choices=list(FEATURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures")
    args, flags = parser.parse_known_args()
    kinds: dict[str, tuple[dict[str, object], int]] = {"plain": ({}, 1)}
    for name in args.only:
        kinds |= {name: (FEATURES[name], 1), f"{name}, every second stream": (FEATURES[name], 2)}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    numbers = random.Random(0)
    with LLM(**engine_options(parse_args(flags))) as llm:
        for number in range(args.rounds + 1):
            for kind, (feature, every) in kinds.items():
                prompts = [[numbers.randrange(10, 4000) for _ in range(32)] for _ in range(args.streams)]
                params = [make_params(i, args.tokens, **({} if i % every else feature)) for i in range(args.streams)]
                rate = tokens_per_second(llm, prompts, params)
                if number:  # the first round warms up
                    rates[kind].append(rate)
    print("| streams | tokens/s | of plain |\n|---|---:|---:|")
    for kind, values in rates.items():
        ratio = statistics.median(rate / plain for rate, plain in zip(values, rates["plain"], strict=True))
        print(f"| {kind} | {statistics.median(values):,.0f} | {ratio:.3f} |")
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "tokens_per_second": rates}))


if __name__ == "__main__":
    run_script(main)
