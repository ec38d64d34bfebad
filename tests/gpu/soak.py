"""A random load on one engine in this process: aborts at any time, shared prefixes, too few pages.

    python -m tests.gpu.soak [--seconds 300] [--device cuda] [--tp 1] [--seed 0] [--shape NAME|DIR]

The planner walks all its pages after every step. In fp32 (the default, on a tiny model) equal requests must get equal
tokens, whatever runs beside them. In the end nothing runs, and every page is free or evictable.
Prints counts; fails with an AssertionError. `--shape` takes bf16 and random weights, and compares no tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from minisgl import LLM, SamplingParams
from minisgl.benchmark.shapes import write_shape
from minisgl.message.codec import pack_ids, unpack_ids
from minisgl.message.tokenizer import IdsPrompt
from tests.integration.test_llm import with_tokenizer
from tests.models import tiny_model

KINDS = [
    SamplingParams(1, 0.0, seed=0),
    SamplingParams(1, 0.0, seed=0, ignore_eos=True),
    SamplingParams(1, 0.8, seed=5, ignore_eos=True),
    SamplingParams(1, 1.0, top_k=20, seed=6, ignore_eos=True),
    SamplingParams(1, 0.8, top_p=0.9, min_p=0.02, seed=7, ignore_eos=True),
]


class CheckedLLM(LLM):
    """Walks all pages after every step, and counts retractions."""

    num_retracted = 0

    def _start_scheduler(self, config: Any, supervisor: Any) -> Any:
        strict = replace(config, scheduler=replace(config.scheduler, check_integrity=True))
        scheduler = super()._start_scheduler(strict, supervisor)
        retract = scheduler.planner._retract

        def counted(req: Any) -> None:
            self.num_retracted += 1
            retract(req)

        scheduler.planner._retract = counted  # type: ignore[method-assign]
        return scheduler


class Load:
    """Submits, aborts and checks. answers: the longest output so far of each prompt and kind of sampling."""

    def __init__(self, llm: CheckedLLM, seed: int, compare: bool) -> None:
        self._llm, self._rng, self._compare = llm, Random(seed), compare
        self._prefixes = [self._ids(n) for n in (5, 16, 33, 60)]
        self._tails = [self._ids(n) for n in (1, 2, 7, 16, 40)]
        self._open: dict[int, tuple[Any, ...]] = {}
        self.answers: dict[Any, list[int]] = {}
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(self._open) < 24 and self._rng.random() < 0.5:
                self._submit()
            elif self._open and self._rng.random() < 0.02:
                self._abort(self._rng.choice(list(self._open)))
            self._turn()
        for uid in list(self._open)[::2]:
            self._abort(uid)
        while self._open or not self._llm._scheduler.planner.is_idle:
            self._turn()

    def _ids(self, count: int) -> list[int]:
        return [self._rng.randint(3, 250) for _ in range(count)]

    def _submit(self) -> None:
        prompts, params = [], []
        for _ in range(self._rng.randint(1, 4)):
            tail = self._rng.choice(self._tails) if self._rng.random() < 0.7 else self._ids(self._rng.randint(1, 60))
            prompts.append(self._rng.choice(self._prefixes) + tail)
            params.append(replace(self._rng.choice(KINDS), max_tokens=self._rng.choice([1, 9, 30, 150, 150])))
        uids = self._llm._submit([IdsPrompt(pack_ids(prompt)) for prompt in prompts], params)
        for uid, prompt, given in zip(uids, prompts, params, strict=True):
            self._open[uid] = (tuple(prompt), given)
        self.counts["submitted"] += len(uids)

    def _abort(self, uid: int) -> None:
        del self._open[uid]
        self._llm._abort([uid])
        self.counts["aborted"] += 1

    def _turn(self) -> None:
        if not self._open and self._llm._scheduler.planner.is_idle:
            return  # it would wait for ever
        for uid in self._llm._turn():
            pending = self._llm._pending.pop(uid)
            assert pending.replies[-1].error is None, pending.replies[-1].error
            prompt, params = self._open.pop(uid)
            ids = [token for reply in pending.replies for token in unpack_ids(reply.token_ids)]
            self.counts["finished"] += 1
            self.counts["tokens"] += len(ids)
            assert 1 <= len(ids) <= params.max_tokens
            if self._compare:
                self._check((prompt, replace(params, max_tokens=1)), ids)

    def _check(self, key: Any, ids: list[int]) -> None:
        known = self.answers.setdefault(key, ids)
        common = min(len(known), len(ids))
        assert known[:common] == ids[:common], f"{key}: {ids} after {known}"
        self.counts["compared"] += known is not ids
        if len(ids) > common:
            self.answers[key] = ids


def main(argv: Sequence[str] | None = None) -> Counter[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {"device": args.device, "tp": args.tp, "page_size": 8, "num_pages": 48}
    options |= {"max_running_requests": 16, "max_prefill_length": 64, "max_seq_len": 256}
    with tempfile.TemporaryDirectory() as directory:
        if args.shape:
            path = write_shape(args.shape, directory)
            options |= {"dummy_weight": True, "dtype": "bfloat16"}
        else:
            path = with_tokenizer(tiny_model("qwen3", vocab_size=512))
            options["dtype"] = "float32"
        with CheckedLLM(str(path), **options) as llm:
            load = Load(llm, args.seed, compare=not args.shape)
            load.run(args.seconds)
            planner = llm._scheduler.planner
            planner.check_integrity()
            assert planner.num_free_pages == options["num_pages"], "pages are lost"
            load.counts["retracted"] = llm.num_retracted
    print(", ".join(f"{count:,} {name}" for name, count in load.counts.items()), "- every page is accounted for")
    return load.counts


if __name__ == "__main__":
    main()
