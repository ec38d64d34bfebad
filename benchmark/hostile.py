"""What streams keep of their speed beside those of a client that asks for dear things, in one engine.

    python benchmark/hostile.py [--streams 16] [--hostile 16] [--tokens 128] [--rounds 3] [--vocab-size 151936]
                                [--shape NAME] [--only KIND …] [--json FILE] [flags]

Each round runs the plain streams alone, beside as many more plain ones as there are hostile ones, and beside each kind
of hostile ones. All make `--tokens` tokens. Prints a Markdown table of medians: what the plain streams make until the
last of them has ended, and the median of each round's ratio to its run beside plain ones, and to its run alone.

Without `--vocab-size` and `--shape` the built-in model runs, whose vocabulary of 4,096 makes masks cheap. With
`--vocab-size` it is its shape, with `--shape` a well-known one (`minisgl.benchmark.shapes`), with random weights and a
vocabulary of made-up words. Further flags are the engine's (`--device cpu`, `--max-running-requests 64`, …).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minisgl import LLM, SamplingParams
from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import describe_machine
from minisgl.benchmark.offline import engine_options
from minisgl.benchmark.shapes import write_shape
from minisgl.config.args import parse_args
from minisgl.config.locate import DEMO_MODEL
from minisgl.core import Grammar

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"enum": ["red", "green"]}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = json.dumps({"type": "array", "items": ITEM, "minItems": 1000})


def hostile(kind: str, number: int) -> dict[str, Any]:
    """What the stream of this number asks for."""
    if kind == "new grammars":  # each is compiled, takes memory, and is used once
        return {"grammar": Grammar("choice", json.dumps([f"{number} {i} and then some" * 2 for i in range(4000)]))}
    return KINDS[kind]


KINDS: dict[str, dict[str, Any]] = {
    "regular expression": {"grammar": Grammar("regex", "([a-z]+ ){5000}")},
    "counted regular expression": {"grammar": Grammar("regex", "([a-zA-Z ]{1,400}x){100}")},
    "JSON schema": {"grammar": Grammar("json", SCHEMA)},
    "new grammars": {},
    "logprobs, 20": {"logprobs": 20},
    "long prompts": {},
    "long prompts, prompt_logprobs": {"prompt_logprobs": 20},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
}
SYLLABLES = [a + b + c for a in ("", *"bdfghklmnprstvw", "ch", "st") for b in "aeiou" for c in ("", *"nrstl")]


def tokenizer_of_words(vocab_size: int) -> Tokenizer:
    """All bytes, and made-up words, as in real vocabularies: half with a blank before them, some with capitals."""
    rng = random.Random(0)
    vocab = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(vocab) < vocab_size:
        word = "".join(rng.choices(SYLLABLES, k=rng.choice((1, 1, 2, 2, 2, 3, 3, 4))))
        word = word if rng.random() < 0.8 else word.capitalize()
        vocab.setdefault(rng.choice(("", "Ġ")) + word, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_model(directory: Path, shape: str | None, vocab_size: int) -> Path:
    """A model directory for random weights."""
    source = directory / "source"
    source.mkdir()
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    if shape is not None:
        config = json.loads((write_shape(shape, directory / "shape") / "config.json").read_text())
    config["vocab_size"] = vocab_size or config["vocab_size"]
    config["eos_token_id"] = 0
    (source / "config.json").write_text(json.dumps(config))
    tokenizer_of_words(config["vocab_size"]).save(str(source / "tokenizer.json"), pretty=False)
    return write_shape(str(source), directory / "model")


def run(llm: LLM, kind: str, args: argparse.Namespace, numbers: random.Random) -> tuple[float, float]:
    """Tokens per second of the plain streams, and of those beside them."""

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[numbers.randrange(300, 4000) for _ in range(length)] for _ in range(count)]

    plain = [SamplingParams(args.tokens, 0.8, seed=i, ignore_eos=True) for i in range(args.streams)]
    beside = []
    if kind != "alone":
        fields = [{} if kind == "plain" else hostile(kind, numbers.randrange(10**9)) for _ in range(args.hostile)]
        beside = [SamplingParams(args.tokens, 0.8, seed=i, ignore_eos=True, **each) for i, each in enumerate(fields)]
    length = 512 if kind.startswith("long prompts") else 32
    outputs = llm.generate([*prompts(len(beside), length), *prompts(len(plain), 32)], [*beside, *plain], progress=False)

    def rate(part: list[Any]) -> float:
        seconds = max((output.metrics.total_time for output in part), default=1.0)
        return sum(len(output.token_ids) for output in part) / seconds

    return rate(outputs[len(beside) :]), rate(outputs[: len(beside)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16, help="plain streams")
    parser.add_argument("--hostile", type=int, default=16, help="streams beside them")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=0)
    parser.add_argument("--shape", metavar="NAME")
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures")
    args, flags = parser.parse_known_args()
    rates: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ("alone", "plain", *args.only)}
    numbers = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        options = engine_options(parse_args(flags))
        if args.shape or args.vocab_size:
            options |= {
                "model_path": str(make_model(Path(directory), args.shape, args.vocab_size)),
                "dummy_weight": True,
            }
        with LLM(**options) as llm:
            for number in range(args.rounds + 1):
                for kind in rates:
                    pair = run(llm, kind, args, numbers)
                    if number:  # the first round warms up
                        rates[kind].append(pair)
    print(f"{args.streams} plain streams beside {args.hostile}\n")
    print("| beside | plain, tokens/s | of beside plain | of alone | the others, tokens/s |\n|---|---:|---:|---:|---:|")
    for kind, pairs in rates.items():
        ratios = [
            statistics.median(mine[0] / base[0] for mine, base in zip(pairs, rates[to], strict=True))
            for to in ("plain", "alone")
        ]
        own, others = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {kind} | {own:,.0f} | {ratios[0]:.3f} | {ratios[1]:.3f} | {others:,.0f} |")
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "tokens_per_second": rates}))


if __name__ == "__main__":
    run_script(main)
