"""A random load on one engine in this process: aborts at any time, shared prefixes, too few pages.

    python -m tests.gpu.soak [--seconds 300] [--device cuda] [--tp 1] [--seed 0] [--shape NAME|DIR]

The planner walks all its pages after every step. In fp32 (the default, on a tiny model) equal requests must get equal
tokens, whatever runs beside them, unless two choices are so near that rounding decides (`tests/near_ties.py`): where
answers part, Hugging Face's logits must explain every token of both. So they must for a random share of all answers,
lest all be wrong alike. In the end nothing runs, and every page is free or evictable.
Prints counts; fails with an AssertionError. `--shape` takes bf16 and random weights, and compares no tokens.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from minisgl import LLM, SamplingParams
from minisgl.benchmark.shapes import write_shape
from minisgl.message.messages import IdsPrompt, pack_ids, unpack_ids
from minisgl.scheduler.integrity import check_integrity
from tests.integration.test_llm import with_tokenizer
from tests.models import hf_model, tiny_model
from tests.near_ties import check_answer

KINDS = [
    SamplingParams(1, 0.0, seed=0),
    SamplingParams(1, 0.0, seed=0, ignore_eos=True),
    SamplingParams(1, 0.8, seed=5, ignore_eos=True),
    SamplingParams(1, 1.0, top_k=20, seed=6, ignore_eos=True),
    SamplingParams(1, 0.8, top_p=0.9, min_p=0.02, seed=7, ignore_eos=True),
]
# A forward pass of the reference takes some 10 ms. Of long runs it checks no more than a few seconds' worth.
VERIFIED_SHARE, MAX_VERIFIED = 0.02, 500
ALWAYS_VERIFIED = 3  # the first that finish, so that a short run verifies some


class Load:
    """Submits, aborts and checks. answers: the longest output so far of each prompt and kind of sampling.

    reference: the model's directory; None: no tokens are compared.
    """

    def __init__(self, llm: LLM, seed: int, reference: Path | None) -> None:
        self._llm, self._rng, self._lots = llm, Random(seed), Random(seed + 1)
        self._reference = reference
        self._prefixes = [self._ids(n) for n in (5, 16, 33, 60)]
        self._tails = [self._ids(n) for n in (1, 2, 7, 16, 40)]
        self._open: dict[int, tuple[Any, ...]] = {}
        self.answers: dict[Any, list[int]] = {}
        self.counts: Counter[str] = Counter()
        self._explained: set[Any] = set()  # answers that parted from others
        self.num_checked = 0  # tokens
        if reference is not None:
            hf_model(reference)  # loaded before the clock starts

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
        while self._open or not self._llm.scheduler.planner.is_idle:
            self._turn()

    def _ids(self, count: int) -> list[int]:
        return [self._rng.randint(3, 250) for _ in range(count)]

    def _submit(self) -> None:
        prompts, params = [], []
        for _ in range(self._rng.randint(1, 4)):
            tail = self._rng.choice(self._tails) if self._rng.random() < 0.7 else self._ids(self._rng.randint(1, 60))
            prompts.append(self._rng.choice(self._prefixes) + tail)
            params.append(replace(self._rng.choice(KINDS), max_tokens=self._rng.choice([1, 9, 30, 150, 150])))
        requests = self._llm.submit([IdsPrompt(pack_ids(prompt)) for prompt in prompts], params)
        for request, given in zip(requests, params, strict=True):
            self._open[request.uid] = (tuple(request.prompt_ids), given)
        self.counts["submitted"] += len(requests)

    def _abort(self, uid: int) -> None:
        del self._open[uid]
        self._llm.abort(uid)
        self.counts["aborted"] += 1

    def _turn(self) -> None:
        if not self._open and self._llm.scheduler.planner.is_idle:
            return  # it would wait for ever
        for pending in self._llm.turn():
            assert pending.replies[-1].error is None, pending.replies[-1].error
            prompt, params = self._open.pop(pending.uid)
            ids = [token for reply in pending.replies for token in unpack_ids(reply.token_ids)]
            self.counts["finished"] += 1
            self.counts["tokens"] += len(ids)
            assert 1 <= len(ids) <= params.max_tokens
            if self._reference is not None:
                key = (prompt, replace(params, max_tokens=1))
                self.compare(key, ids)
                self.verify(key, ids)

    def compare(self, key: Any, ids: list[int]) -> None:
        known = self.answers.setdefault(key, ids)
        common = min(len(known), len(ids))
        if known[:common] != ids[:common]:
            self._explain_parting(key, known, ids)
        self.counts["compared"] += known is not ids
        self.num_checked += common if known is not ids else 0
        if len(ids) > common:
            self.answers[key] = ids

    def _explain_parting(self, key: Any, known: list[int], ids: list[int]) -> None:
        """Two answers to the same request differ: that is right only if the reference explains both wholly."""
        self.counts["near-ties"] += 1
        for answer in (known, ids):
            if (key, tuple(answer)) in self._explained:
                continue
            try:
                self._check(key, answer)
            except AssertionError as error:
                raise AssertionError(f"{key}: {ids} after {known}, and no near-tie: {error}") from None
            self._explained.add((key, tuple(answer)))

    def verify(self, key: Any, ids: list[int]) -> None:
        """Compare a random share of the answers with the reference."""
        num = self.counts["verified"]
        if num >= ALWAYS_VERIFIED and (num >= MAX_VERIFIED or self._lots.random() >= VERIFIED_SHARE):
            return
        self.counts["near-ties"] += self._check(key, ids)
        self.counts["verified"] += 1
        self.num_checked += len(ids)

    def _check(self, key: Any, ids: list[int]) -> int:
        prompt, params = key
        assert self._reference is not None
        return check_answer(self._reference, prompt, ids, params)

    def check_rate(self) -> None:
        """Errors of a few 1e-6 in the logits decide far fewer choices than this; more would mean larger errors."""
        assert self.counts["near-ties"] * 1000 <= self.num_checked, (self.counts, self.num_checked)


def main(argv: Sequence[str] | None = None) -> Counter[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {"device": args.device, "tp": args.tp, "page_size": 8, "num_pages": 48}
    options |= {"max_running_requests": 16, "max_prefill_length": 64, "max_seq_len": 256, "check_integrity": 1}
    with patch.dict(os.environ, MINISGL_INTEGRITY_FATAL="1"), tempfile.TemporaryDirectory() as directory:
        if args.shape:
            path = write_shape(args.shape, directory)
            options |= {"dummy_weight": True, "dtype": "bfloat16"}
        else:
            path = with_tokenizer(tiny_model("qwen3", vocab_size=512))
            options["dtype"] = "float32"
        with LLM(str(path), **options) as llm:
            load = Load(llm, args.seed, None if args.shape else path)
            load.run(args.seconds)
            load.check_rate()
            planner = llm.scheduler.planner
            check_integrity(planner)
            assert planner.pages.num_free == options["num_pages"], "pages are lost"
            load.counts["retracted"] = planner.num_retracted
            load.counts["near-ties"] += 0  # named even where there were none
    print(", ".join(f"{count:,} {name}" for name, count in load.counts.items()), "- every page is accounted for")
    return load.counts


if __name__ == "__main__":
    main()
