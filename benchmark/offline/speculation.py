"""What speculation gains: tokens per second with drafts over those without, on text that comes again, on text that does
not, and with drafts of some quality.

    python benchmark/offline/speculation.py [--load quote|fresh|answer] [--streams 1] [--output-len 100]
                                            [--rounds 5] [--shape NAME] [--accept RATE] [--predict N] [--json FILE]
                                            [flags]

Two engines in this process take turns with the same prompts, so that what else the machine does falls on both. quote: a
text that is to be said again, greedily; fresh: the beginning of a story, sampled, another one in each round; answer:
questions in a chat, greedily, up to where the answers end, the same ones in each round. Without `--model` it is the
built-in model. Further flags are the engine's; `--speculate ngram` where they name no drafter. Prints both speeds
(medians), the ratio (median of the rounds'), and how many guessed tokens were right.

--shape: random weights, and prompts of random ids; with `--speculate mtp` the model has a head, and of what
`--draft-model` names no more than its config.json is read. --accept: a guessed token counts as right by a seeded coin
that says yes so often, whatever was sampled. --predict: greedily, and each request brings the plain output as its
prediction, in which one token of so many is another (0: none).
"""

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minisgl import LLM, SamplingParams
from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import describe_machine
from minisgl.benchmark.offline import engine_options, model_options
from minisgl.config.args import parse_args
from minisgl.core import Masks, Req, ScheduledReq, StepPlan
from minisgl.engine.step import Launched
from minisgl.kvcache.pages import Pages

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
SHAPE_PROMPT = 128  # tokens


def prompts(load: str, num: int, turn: int) -> list[str]:
    """No two of a load begin alike: what others had behind the same beginning would be guessed."""
    each = range(turn * num, turn * num + num)
    if load == "quote":
        return [f"{i}. {TEXT}\n\nHere is the same text again:\n\n{i}. {TEXT[:60]}" for i in each]
    return [f"{i}. Story of {TOPICS[i % 8]} and {TOPICS[(3 * i + 5) % 8]}. It begins so:" for i in each]


def with_predictions(params: SamplingParams, outputs: list[list[int]], every: int) -> list[SamplingParams]:
    """every: one token of so many is another; 0: none."""
    guesses = [[id + (every > 0 and i % every == every - 1) for i, id in enumerate(ids)] for ids in outputs]
    return [replace(params, prediction=tuple(ids)) for ids in guesses]


def generate(engine: LLM, load: str, texts: list[Any], params: Any) -> list[list[int]]:
    """The tokens of each output, in the order of the prompts; of questions, as many at a time as there are texts."""
    if load != "answer":
        return [out.token_ids for out in engine.generate(texts, params, progress=False)]
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    groups = [chats[i : i + len(texts)] for i in range(0, len(chats), len(texts))]
    return [out.token_ids for group in groups for out in engine.chat(group, params, progress=False)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=("quote", "fresh", "answer"), default="quote")
    parser.add_argument("--streams", type=int, default=[1], nargs="+")
    parser.add_argument("--output-len", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape")
    parser.add_argument("--accept", type=float)
    parser.add_argument("--predict", type=int)
    parser.add_argument("--json", type=Path)
    return parser


def all_options(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """The drafting engine's."""
    given = engine_options(parse_args(flags))
    samples = 8 if "draft_model" in given else 4  # of a stream: DFlash's drafts are longer than a head's
    room = {"max_seq_len": 2048, "max_running_requests": max(16, samples * max(args.streams))}
    kind = "ngram" if args.predict is None and "draft_model" not in given else "off"
    options = {**room, "speculate": kind, **given}
    if args.shape is not None:  # several fit one device
        num_pages = max(args.streams) * (SHAPE_PROMPT + args.output_len + 64) // 16 + 256
        options = {"num_pages": num_pages, "max_prefill_length": 2048, **options}
        if options["speculate"] == "mtp":
            options["config_override"] = {"mtp_num_hidden_layers": 1}
    return options


def compare(engines: dict[str, LLM], args: argparse.Namespace, num: int) -> dict[str, Any]:
    """So many streams, in turns."""
    numbers, load = random.Random(0), args.load
    temperature = 0.8 if load == "fresh" and args.predict is None else 0.0
    load = load if args.shape is None else "fresh"

    def texts_of(turn: int) -> list[Any]:
        if args.shape is None:
            return [*prompts(load, num, turn)]
        return [[numbers.randrange(10, 4000) for _ in range(SHAPE_PROMPT)] for _ in range(num)]

    texts = texts_of(0)
    params = SamplingParams(args.output_len, temperature, seed=1, ignore_eos=load != "answer")
    each: dict[str, Any] = dict.fromkeys(engines, params)
    if args.predict is not None:
        plain = generate(engines["plain"], load, texts, params)
        each["drafts"] = with_predictions(params, plain, args.predict)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    speculation = engines["drafts"].scheduler.planner.speculation
    before, num_same, num_tokens = (speculation.num_drafted.total(), speculation.num_right.total()), 0, 0
    for turn in range(args.rounds + 1):  # the first one warms up
        outputs = {}
        texts = texts if args.predict is not None else texts_of(turn)
        for name in list(engines)[:: 1 if turn % 2 else -1]:
            begin = time.perf_counter()
            outputs[name] = generate(engines[name], load, texts, each[name])
            seconds[name] += [time.perf_counter() - begin] if turn else []
        num_same = sum(a == b for a, b in zip(*outputs.values(), strict=True))
        num_tokens = sum(map(len, outputs["plain"]))
    speeds = {name: num_tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    drafted, right = speculation.num_drafted.total() - before[0], speculation.num_right.total() - before[1]
    print(f"{args.shape or args.load}, {num} streams, {num_tokens} tokens: {num_same} outputs the same")
    print(", ".join(f"{name} {speed:.0f} tokens/s" for name, speed in speeds.items()))
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"{drafted} tokens guessed, {right} right", flush=True)
    return {"streams": num, "speeds": speeds, "ratios": ratios, "drafted": drafted, "right": right}


class Coin:
    """Says which drafted tokens hold, to see what drafts of some quality would gain: what is generated then makes no
    sense. A step that follows one whose end is not known on the host is told by the coin, too."""

    def __init__(self, engine: LLM, rate: float) -> None:
        self._coin, self._rate, self._tossed = random.Random(1), rate, dict[ScheduledReq, int]()
        executor: Any = engine.rank.engine
        self._steps = executor.steps
        speculation = engine.scheduler.planner.speculation
        self._settle, self._launch, self._last = speculation.settle, self._steps.launch, tuple[ScheduledReq, ...]()
        speculation.settle, self._steps.launch = self.settle, self.launch  # type: ignore[method-assign]

    def toss(self, share: ScheduledReq) -> int:
        """How many tokens of its draft hold."""
        draft = range(share.num_samples - 1)
        if share not in self._tossed:
            self._tossed[share] = next((i for i in draft if self._coin.random() >= self._rate), len(draft))
        return self._tossed[share]

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Launched:
        last, self._last = self._last, plan.reqs
        if any(share.follows for share in plan.reqs) and getattr(self._steps, "left", None):
            kept = torch.tensor([self.toss(share) for share in last], dtype=torch.int32, pin_memory=True)
            self._steps.left[0][: len(kept)].copy_(kept, non_blocking=True)
        return self._launch(plan, masks)

    def settle(
        self, req: Req, share: ScheduledReq, draft: Sequence[int], ids: tuple[int, ...], pages: Pages
    ) -> tuple[int, ...]:
        right = self.toss(share)
        del self._tossed[share]
        return self._settle(req, share, [id + (i >= right) for i, id in enumerate(ids[: len(draft)])], ids, pages)


def main() -> None:
    args, flags = make_parser().parse_known_args()
    options = all_options(args, flags)
    with contextlib.ExitStack() as stack:
        options = stack.enter_context(model_options(args.shape, options))
        plain = {name: value for name, value in options.items() if name != "draft_model"} | {"speculate": "off"}
        kinds = {"plain": plain, "drafts": options}
        engines = {name: stack.enter_context(LLM(**kind)) for name, kind in kinds.items()}
        if args.accept is not None:
            Coin(engines["drafts"], args.accept)
        reports = [compare(engines, args, num) for num in args.streams]
    if args.json:
        args.json.write_text(json.dumps({"runs": reports, **describe_machine()}, indent=1))


if __name__ == "__main__":
    run_script(main)
