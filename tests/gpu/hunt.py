"""Random small models of shapes that checkpoints have or could have, served in random ways, against `transformers`.

    python -m tests.gpu.hunt [--seconds 90] [--workers 12] [--seed 0] [--tp 1] [--device cuda] [--only 17 230]

A case is a number: it says a family and its sizes, a format of weights, a type, and how requests are served (pages,
graphs, drafts, chunks, ...). What was generated is judged token by token, by the exact model's logits: a token may be
worse than the best one by as much as rounding moves logits, and its log-probability is as near to the exact one as a
copy of the model in the same type comes. Prints what is wrong, and every kind of refusal once. A worker whose process
dies (an illegal access does that) is named with its case, and another one goes on behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch
import transformers

from minisgl import LLM, SamplingParams
from minisgl.config import resolve
from minisgl.core import Req
from minisgl.errors import ConfigError
from minisgl.kernel import cuda
from minisgl.llm import RequestOutput
from minisgl.scheduler import speculation
from tests.gpu.hunt_cases import Case, Made, draw, make

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:False")  # ranks share memory
CASE_SECONDS = 100  # then a worker is taken to hang
FAULTS = "cannot compile", "does not fit"  # in errors that are no refusals, of models this small
NOT_FIRST = 1e-3  # in logits of fp32
FLOAT8_CACHE = 0.5  # how far a cache of 8 bits may move a log-probability, about


class Noise:
    """Drafts that are right only by chance."""

    def __init__(self, *_: Any) -> None:
        pass

    def propose(self, req: Req, num_pending: int, most: int) -> list[int]:
        rng = Random(len(req.tokens) + num_pending)
        return [rng.randrange(3, 250) for _ in range(rng.randint(0, most))]

    def forget(self, uid: int) -> None:
        pass


def prompts_of(case: Case) -> list[list[int]]:
    """Some begin alike, some repeat themselves, some are one token."""
    rng = Random(case.number)
    lengths = [rng.choice([1, 2, 3, 9, 16, 17, 33, 64, 65, 100, 150]) for _ in range(case.num_prompts)]
    prompts = [[rng.randrange(3, 250) for _ in range(length)] for length in lengths]
    for i in range(2, len(prompts), 3):
        prompts[i] = prompts[i - 1][: rng.randint(1, len(prompts[i - 1]))] + prompts[i][:9]
    for i in range(1, len(prompts), 4):
        prompts[i] = (prompts[i][: rng.randint(2, 6)] * 20)[: len(prompts[i]) + 1]
    return prompts


def serve(case: Case, path: Path, device: str, tp_size: int) -> tuple[list[RequestOutput], list[str]]:
    """Two rounds: what the second one asks is in part known."""
    prompts = prompts_of(case)
    asked = {"prompt_logprobs": 0} if case.asks_prompts else {}
    params = SamplingParams(case.num_tokens, 0.0, ignore_eos=True, logprobs=0, **asked)
    with ExitStack() as stack:
        stack.enter_context(patch.object(resolve, "step_costs", lambda _: (0.0, 0.0)))
        if case.stays_packed:
            stack.enter_context(patch.object(cuda, "PACKED_WEIGHTS", 0))
        if case.drafts == "noise":
            for name in ("TreePath", "Lookup"):
                stack.enter_context(patch.object(speculation, name, Noise))
        options = {"device": device, "dtype": case.dtype, "tensor_parallel_size": tp_size, **case.options}
        llm = stack.enter_context(LLM(str(path), **options))
        outputs = llm.generate(prompts, params, progress=False)
        longer = [[*prompt, *output.token_ids[:5]] for prompt, output in zip(prompts, outputs, strict=True)]
        outputs += llm.generate([*longer[::2], *prompts[1::2]], params, progress=False)
        planner = llm.scheduler.planner
        tags = {"retracted": planner.num_retracted > 0, "hits": any(output.cached_tokens for output in outputs)}
        if planner.pages.num_free != llm.config.engine.num_pages:
            raise AssertionError("pages are lost")
    return outputs, [tag for tag, is_so in tags.items() if is_so]


def judge(case: Case, made: Made, outputs: Sequence[RequestOutput]) -> tuple[str, dict[str, float]]:
    """What is wrong ("": nothing), and by how much tokens and log-probabilities are off."""
    ours, theirs, regret, moved = list[float](), list[float](), 0.0, 0.0
    with torch.inference_mode():
        for output in outputs:
            if output.error or len(output.token_ids) != case.num_tokens:
                return f"{output.finish_reason}: {output.error}, {len(output.token_ids)} tokens", {}
            ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]])
            exact, near = (logits[0].float() for logits in made.logits(ids[:, :-1]))
            chosen, begin = ids[0, 1:], len(output.prompt_token_ids) - 1
            known = [*output.prompt_logprobs[1:], *output.logprobs] if output.prompt_logprobs else output.logprobs
            first = len(chosen) - len(known)
            found = torch.tensor([token.logprob for token in known])
            true, copied = (x.log_softmax(-1).gather(1, chosen[:, None])[first:, 0] for x in (exact, near))
            ours += (found - true).abs().tolist()
            theirs += (copied - true).abs().tolist()
            best = exact[begin:].max(-1).values - exact[begin:].gather(1, chosen[begin:, None])[:, 0]
            regret = max(regret, float(best.max()))
            moved = max(moved, float((near - exact)[begin:].abs().max()))
    figures = {"median": median(ours), "of copy": median(theirs), "mean": fmean(ours), "mean of copy": fmean(theirs)}
    figures |= {"regret": regret, "moved": moved, "largest": max(ours)}
    return _verdict(case, figures), figures


def _verdict(case: Case, at: dict[str, float]) -> str:
    if any(value != value for value in at.values()):
        return "not a number"
    if case.options.get("kv_cache_dtype") == "fp8":
        is_far = at["median"] > 2 * at["of copy"] + 0.15 or at["regret"] > 3 * at["moved"] + 3 * FLOAT8_CACHE
        return "far for a cache of 8 bits" if is_far else ""
    if case.dtype == "float32" and case.is_exact:
        # A router's near-tie takes another expert, which is no error, but may be one: those are few.
        is_far = at["median"] > 2e-4 or (at["largest"] > 5e-3 and not case.has_experts) or at["mean"] > 1e-2
        return "far for fp32" if is_far or at["regret"] > (1 if case.has_experts else NOT_FIRST) else ""
    few = 0.02 if case.has_experts or not case.is_exact else 0.006
    if at["median"] > 2 * at["of copy"] + few or at["mean"] > 3 * at["mean of copy"] + 4 * few:
        return "log-probabilities are far"
    return "a worse token" if at["regret"] > 3 * at["moved"] + 10 * few else ""


def is_refusal(error: ConfigError) -> bool:
    """Whether the case is one that is not served; else there is a fault."""
    return not any(fault in str(error) for fault in FAULTS)


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def work(numbers: Sequence[int], device: str, tp_size: int, deadline: float) -> None:
    """One after the other. What a broken device leaves is of no use: then the process ends."""
    for number in numbers:
        if time.monotonic() > deadline:
            return
        begin, case = time.monotonic(), draw(number, tp_size, device)
        tell(begin=number)
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                made = make(case, Path(folder))
                ready = time.monotonic()
                outputs, more = serve(case, made.path, device, tp_size)
                served = time.monotonic()
                wrong, figures = judge(case, made, outputs)
            times = [round(at, 1) for at in (ready - begin, served - ready, time.monotonic() - served)]
            tell(end=number, wrong=wrong, figures=figures, case=str(case), tags=case.tags() + more, seconds=times)
        except ConfigError as error:
            tell(end=number, case=str(case), **{"refused" if is_refusal(error) else "wrong": str(error)})
        except BaseException as error:
            where = "".join(traceback.format_exception(error)[-4:])[-1500:]
            tell(end=number, wrong=f"{type(error).__name__}: {str(error)[:300]}", trace=where, case=str(case))
            if "CUDA" in str(error) or not isinstance(error, Exception):
                os._exit(1)
        faulthandler.cancel_dump_traceback_later()


class Hunt:
    """Workers as processes, and what they tell."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._deadline, self._lock = args, time.monotonic() + args.seconds, threading.Lock()
        self.tags: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.refused: dict[str, list[int]] = defaultdict(list)
        self.seconds: list[list[float]] = []

    def follow(self, numbers: list[int]) -> None:
        while numbers and time.monotonic() < self._deadline:
            command = [sys.executable, "-m", "tests.gpu.hunt", f"--device={self._args.device}", f"--tp={self._args.tp}"]
            command += ["--until", str(self._deadline), "--only", *map(str, numbers)]
            with tempfile.TemporaryFile("w+") as errors:
                child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
                timer = threading.Timer(self._deadline + self._args.grace - time.monotonic(), child.kill)
                timer.start()
                at = self._read(child, numbers)
                code = child.wait()
                timer.cancel()
                if at is None or time.monotonic() > self._deadline:
                    return
                errors.seek(0)
                if code:
                    text = errors.read()[-1500:]
                    self._complain({"end": at, "wrong": f"the process ended with {code}", "trace": text})
            numbers = numbers[numbers.index(at) + 1 :]

    def _read(self, child: subprocess.Popen[str], numbers: list[int]) -> int | None:
        """The case that a worker had begun when it ended; None: it had finished all."""
        at: int | None = numbers[0]
        assert child.stdout is not None
        for line in child.stdout:
            try:
                told = json.loads(line)
            except ValueError:
                continue
            at = told.get("begin", at)
            if "end" in told:
                with self._lock:
                    self._note(told)
                if told["end"] == numbers[-1]:
                    at = None
        return at

    def _note(self, told: dict[str, Any]) -> None:
        self.tags["cases"] += 1
        self.tags.update(told.get("tags", ()))
        if told.get("wrong"):
            self._complain(told)
        if told.get("refused"):
            self.refused["".join(c for c in told["refused"] if not c.isdigit())].append(told["end"])
        self.seconds += [told["seconds"]] if "seconds" in told else []

    def _complain(self, told: dict[str, Any]) -> None:
        self.wrong.append(told)
        figures = {name: round(value, 4) for name, value in told.get("figures", {}).items()}
        parts = told["end"], told["wrong"], figures or "", told.get("case", ""), told.get("trace", "")
        print("WRONG", *parts, sep=" | ", flush=True)

    def report(self) -> None:
        for reason, numbers in self.refused.items():
            print(f"refused {len(numbers)} ({numbers[:3]}): {reason}"[:300])
        means = [round(fmean(part), 1) for part in zip(*self.seconds, strict=True)]
        print(f"{len(self.wrong)} wrong;", ", ".join(f"{n} {tag}" for tag, n in self.tags.most_common()), "; s:", means)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--grace", type=float, default=10, help="seconds that a last case may take beyond")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=int, nargs="*", help="these cases, in this process")
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only:
        logging.disable(logging.WARNING)
        transformers.utils.logging.disable_progress_bar()
        work(args.only, args.device, args.tp, args.until)
        return 0
    hunt = Hunt(args)
    lots = [list(range(args.seed + i, args.seed + 10000, args.workers)) for i in range(args.workers)]
    threads = [threading.Thread(target=hunt.follow, args=(numbers,)) for numbers in lots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hunt.report()
    return bool(hunt.wrong)


if __name__ == "__main__":
    sys.exit(main())
