"""A plan maker as small as it can be, to test engines without the planner: no cache, no retraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisgl.config.families import read_model_config
from minisgl.config.runtime import EngineConfig
from minisgl.core import Admission, Executor, PageUpdate, SamplingParams, ScheduledReq, StateCopy, StepPlan
from minisgl.engine.cpu import CpuRunner
from minisgl.engine.tables import StepIndex

GREEDY = SamplingParams(temperature=0.0, seed=0)
CPU_KERNELS = {"cpu_kernels": True, "prefill_backend": "cpu", "decode_backend": "cpu", "num_threads": 2}


def engine_config(path: Path, **overrides: Any) -> EngineConfig:
    """A small engine for a tiny model."""
    fields: dict[str, Any] = {
        "model_path": str(path),
        "model": read_model_config(path),
        "dtype": "float32",
        "device": "cpu",
        "tp_size": 1,
        "init_method": "",
        "num_pages": 2048,
        "page_size": 1,
        "max_running_requests": 16,
        "max_prefill_length": 8192,
        "max_seq_len": 512,
        "prefill_backend": "sdpa",
        "decode_backend": "sdpa",
        "num_threads": 1,
        "dummy_weight": False,
        "kv_cache_dtype": overrides.get("dtype", "float32"),
    }
    return EngineConfig(**{**fields, **overrides})


def engine_logits(path: Path, tokens: list[int], **overrides: Any) -> torch.Tensor:
    """Logits of every position of one sequence: [num_tokens, vocab]."""
    return engine_logits_of_each(path, [tokens], **overrides)[0]


def engine_logits_of_each(path: Path, sequences: list[list[int]], **overrides: Any) -> tuple[torch.Tensor, ...]:
    """The same of several sequences, from one step of one engine."""
    config = engine_config(path, **overrides)
    runner = CpuRunner(config, rank=0)
    admissions, updates, reqs, first = [], [], [], 0
    for row, tokens in enumerate(sequences):
        pages = range(first, first := first - (-len(tokens) // config.page_size))
        admissions.append(Admission(row, torch.tensor(tokens, dtype=torch.int32).numpy(), GREEDY))
        updates.append(PageUpdate(row, 0, tuple(pages)))
        reqs.append(ScheduledReq(row, 0, len(tokens), 1))
    plan = StepPlan(0, tuple(admissions), tuple(updates), tuple(reqs))
    lengths = [*map(len, sequences)]
    with torch.inference_mode():
        index, tables = StepIndex.of(plan.reqs), runner.steps.tables
        tables.host.apply(plan)
        tables.send(plan, index)
        logits = runner.steps.forward(runner.steps.batch(index, 0)).logits(torch.arange(sum(lengths))).float()
    runner.close()
    return logits.split(lengths)


@dataclass
class _Seq:
    row: int
    prompt: list[int]
    params: SamplingParams
    num_tokens: int
    arrival: int
    length: int = 0  # tokens that are known or planned
    computed: int = 0
    num_pages: int = 0
    output: list[int] = field(default_factory=list)


def generate(
    engine: Executor,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    num_tokens: int | Sequence[int],
    params: SamplingParams | Sequence[SamplingParams] = GREEDY,
    chunk: int = 8192,
    stagger: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """Outputs of all prompts, run together. A step has at most `chunk` tokens; request i arrives at step i * stagger.

    Pages are handed out in a random order (`seed`). Steps are submitted one ahead of their results.
    """
    counts = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else list(num_tokens)
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    seqs = [
        _Seq(i, list(p), q, n, i * stagger, length=len(p))
        for i, (p, q, n) in enumerate(zip(prompts, each, counts, strict=True))
    ]
    free = [np.random.default_rng(seed).permutation(config.num_pages).tolist()]
    if config.window:  # no page is given back
        free.append(list(range(config.pages_for(0)[1])))
    step, pending = 0, []
    while any(s.length < len(s.prompt) + s.num_tokens for s in seqs):
        plan, sampling = _plan(step, seqs, free, config.page_size, chunk)
        pending.append((engine.submit(plan), sampling))
        if len(pending) > 1:
            _collect(*pending.pop(0))
        step += 1
    for item in pending:
        _collect(*item)
    return [s.output for s in seqs]


def _plan(
    step: int, seqs: list[_Seq], free: list[list[int]], page_size: int, budget: int
) -> tuple[StepPlan, list[_Seq]]:
    admissions, updates, planned = [], [], []
    for s in seqs:
        if step < s.arrival or s.length >= len(s.prompt) + s.num_tokens or budget == 0:
            continue
        if s.computed == 0:
            admissions.append(Admission(s.row, np.array(s.prompt, dtype=np.int32), s.params, len(s.prompt)))
        num_new = min(s.length - s.computed, budget)
        num_pages = -(-(s.computed + num_new) // page_size)
        if num_pages > s.num_pages:
            pages = (tuple(some.pop() for _ in range(num_pages - s.num_pages)) for some in free)
            updates.append(PageUpdate(s.row, s.num_pages, *pages))
            s.num_pages = num_pages
        last = s.computed + num_new == s.length
        planned.append((ScheduledReq(s.row, s.computed, num_new, int(last)), s))
        s.computed += num_new
        budget -= num_new
        if last:
            s.length += 1
    planned.sort(key=lambda item: item[0].num_new != item[0].num_samples)
    reqs = tuple(req for req, _ in planned)
    plan = StepPlan(step, tuple(admissions), tuple(updates), reqs, sum(req.num_new == req.num_samples for req in reqs))
    plan = plan._replace(states=tuple(StateCopy(-1, admission.row) for admission in admissions))
    return plan, [s for req, s in planned if req.num_samples]


def _collect(handle: Any, sampling: list[_Seq]) -> None:
    ids = handle.result().token_ids
    for s, sampled in zip(sampling, ids, strict=True):
        s.output += sampled
