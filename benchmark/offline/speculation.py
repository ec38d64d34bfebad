"""What speculation gains: tokens per second with drafts over those without, on text that comes again and on text that
does not.

    python benchmark/offline/speculation.py [--model PATH] [--load quote|fresh|answer] [--speculate ngram|mtp]
                                            [--streams 1] [--output-len 100] [--rounds 5] [--json FILE]

Two engines in this process take turns with the same prompts, so that what else the machine does falls on both. quote:
a text that is to be said again, greedily; fresh: the beginning of a story, sampled; answer: questions in a chat,
greedily, up to where the answers end. Without `--model` it is the built-in model. Prints both speeds (medians), the
ratio (median of the rounds'), and how many guessed tokens were right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from minisgl import LLM, SamplingParams
from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import describe_machine

TEXT = """The keeper of the lighthouse counts the ships that pass in the night and writes each one into a long list.
In winter there are few of them, and the list of a week fits on one page; in summer the fishermen of four villages go
out together, and before midnight he has filled three. He writes the hour, the lights that he saw, and the way that they
went. Nobody has ever asked him for these lists. When the inspector came he looked at the lamp, at the oil and at the
clock, and left on the same boat that had brought him.""".replace("\n", " ")
TOPICS = "a ship", "the winter", "two sisters", "a clock", "the forest", "a letter", "bread", "the harbour"
QUESTIONS = (
    "Who are you?", "What is a token?", "What can you do?", "What is the capital of France?",
    "What is attention in a language model?", "How does caching help?", "Why is the sky blue?",
)  # fmt: skip


def prompts(load: str, num: int) -> list[str]:
    if load == "quote":
        return [f"{i}. {TEXT}\n\nHere is the same text again:\n\n{i}. {TEXT[:60]}" for i in range(num)]
    return [f"Story {i} of {TOPICS[i % 8]} and {TOPICS[(3 * i + 5) % 8]}. It begins so:" for i in range(num)]


def generate(engine: LLM, load: str, num_streams: int, params: SamplingParams) -> list[list[int]]:
    """The tokens of each output, in the order of the prompts."""
    if load != "answer":
        return [out.token_ids for out in engine.generate(prompts(load, num_streams), params, progress=False)]
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    groups = [chats[i : i + num_streams] for i in range(0, len(chats), num_streams)]
    return [out.token_ids for group in groups for out in engine.chat(group, params, progress=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--load", choices=("quote", "fresh", "answer"), default="quote")
    parser.add_argument("--speculate", choices=("ngram", "mtp"), default="ngram")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--output-len", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = {} if args.model is None else {"model": args.model}
    options = {"device": "cpu", "max_seq_len": 2048, "max_running_requests": max(16, args.streams), **model}
    temperature, is_answer = 0.8 if args.load == "fresh" else 0.0, args.load == "answer"
    params = SamplingParams(args.output_len, temperature, seed=1, ignore_eos=not is_answer)
    seconds: dict[str, list[float]] = {"off": [], args.speculate: []}
    num_same = num_tokens = 0
    with LLM(**options) as plain, LLM(**options, speculate=args.speculate) as drafting:
        engines = dict(zip(seconds, (plain, drafting), strict=True))
        for turn in range(args.rounds + 1):  # the first one warms up
            outputs = {}
            for name in list(engines)[:: 1 if turn % 2 else -1]:
                begin = time.perf_counter()
                outputs[name] = generate(engines[name], args.load, args.streams, params)
                seconds[name] += [time.perf_counter() - begin] if turn else []
            num_tokens = sum(map(len, outputs["off"]))
            num_same = sum(a == b for a, b in zip(*outputs.values(), strict=True))
        counts = drafting.scheduler.planner.speculation
        num_drafted, num_right = counts.num_drafted, counts.num_right
    speeds = {name: num_tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"{args.load}, {args.streams} streams, {num_tokens} tokens: {num_same} outputs the same")
    print(", ".join(f"{name} {speed:.0f} tokens/s" for name, speed in speeds.items()))
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"{num_drafted} tokens guessed, {num_right} right")
    if args.json:
        report = {"speeds": speeds, "ratios": ratios, "drafted": num_drafted, "right": num_right}
        args.json.write_text(json.dumps({**report, **describe_machine()}, indent=1))


if __name__ == "__main__":
    run_script(main)
