"""What a feature of a request costs: streams that use it beside plain ones, in one engine.

    python benchmark/offline/features.py [--streams 64] [--tokens 256] [--rounds 5] [--json FILE] [flags]

Each round runs every kind once: plain, then each feature in all streams, and in half of them. Every stream makes
exactly `--tokens` tokens (what grammars match is longer than that). Prints a Markdown table of medians, with the
median of each round's ratio to its own plain run: of all tokens by the clock, and where half of the streams use the
feature, of the mean rate of a stream of either half. Further flags are the engine's (`--model`, `--dummy-weight`, …).
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
ORDINARY = (
    r"([0-9]{4}-[0-9]{2}-[0-9]{2} ){200}",
    r"([01][0-9]:[0-5][0-9] ){200}",
    r"(\w+@\w+\.(com|org|net) ){200}",
    r"([0-9]{1,3}(\.[0-9]{1,3}){3}\n){200}",
    r"(\+[0-9]{2} [0-9]{3} [0-9]{6}; ){200}",
    r"(#[0-9a-f]{6} ){200}",
    r"(https://[a-z]+\.(com|org)/[a-z0-9/]+ ){200}",
    r"((red|green|blue), ){400}",
    r"([A-Z][a-z]+ [A-Z][a-z]+, [0-9]+\n){200}",
    r"(\$[0-9]+\.[0-9]{2} ){200}",
)
FEATURES: dict[str, dict[str, object]] = {
    "JSON schema": {"grammar": Grammar("json", SCHEMA)},
    "regular expression": {"grammar": Grammar("regex", "([a-z]+ ){5000}")},
    "ten regular expressions": {"grammar": [Grammar("regex", text) for text in ORDINARY]},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": ((5, 1.0), (6, -1.0))},
    "logprobs, 5": {"logprobs": 5},
}


HALVES = (", even streams", ", odd streams")
Rates = dict[str, list[float]]  # tokens per second of each round, by kind; and of a stream of either half


def make_params(seed: int, tokens: int, **feature: object) -> SamplingParams:
    """Of a stream, by its number. What is a list is for one stream after the other."""
    given = {
        name: value[seed // 2 % len(value)] if isinstance(value, list) else value for name, value in feature.items()
    }
    return SamplingParams(tokens, 0.8, seed=seed, ignore_eos=True, **given)  # type: ignore[arg-type]


def tokens_per_second(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> tuple[float, float, float]:
    """Of all streams together, and the mean of streams of even and odd numbers."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    duration = time.perf_counter() - start
    for output, one in zip(outputs, params, strict=True):
        if (length := len(output.token_ids)) != one.max_tokens:
            raise RuntimeError(f"a stream of {length} tokens: {output.finish_reason}, {one}: …{output.text[-200:]!r}")
    each = [len(output.token_ids) / output.metrics.total_time for output in outputs]
    even, odd = (statistics.mean(each[i::2] or each) for i in (0, 1))
    return len(prompts) * len(outputs[0].token_ids) / duration, even, odd


def print_table(rates: Rates) -> None:
    print("| streams | tokens/s | of plain | its streams | plain streams |\n|---|---:|---:|---:|---:|")
    for kind in (kind for kind in rates if not kind.endswith(HALVES)):
        ratios = [
            [rate / plain for rate, plain in zip(rates[kind + half], rates["plain" + half], strict=True)]
            for half in ("", *HALVES)
        ]
        whole, *halves = (f"{statistics.median(ratio):.3f}" for ratio in ratios)
        shown = " | ".join(halves if "every second" in kind else ["", ""])
        print(f"| {kind} | {statistics.median(rates[kind]):,.0f} | {whole} | {shown} |")


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
    rates: Rates = {kind + half: [] for kind in kinds for half in ("", *HALVES)}
    numbers = random.Random(0)
    with LLM(**engine_options(parse_args(flags))) as llm:
        for number in range(args.rounds + 1):
            for kind, (feature, every) in kinds.items():
                prompts = [[numbers.randrange(10, 4000) for _ in range(32)] for _ in range(args.streams)]
                params = [make_params(i, args.tokens, **({} if i % every else feature)) for i in range(args.streams)]
                found = tokens_per_second(llm, prompts, params)
                for half, rate in zip(("", *HALVES), found, strict=True):
                    rates[kind + half] += [rate] * (number > 0)  # the first round warms up
    print_table(rates)
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "tokens_per_second": rates}))


if __name__ == "__main__":
    run_script(main)
