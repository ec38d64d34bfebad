"""`benchmark/draft_host.py`: that what it measures is what a GPU's engine does."""

from __future__ import annotations

import re
import sys
from collections import deque
from typing import Any

import pytest
import torch

from benchmark import draft_host
from minisgl.core import StepPlan, StepResult
from minisgl.engine import step
from minisgl.engine.shapes import GraphShape
from minisgl.engine.step import Launched


def test_steps_follow_on_the_device_and_tell_what_was_sampled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results are read when the next step has been launched."""
    sampled, num_read, num_following = deque[list[int]](), 0, 0
    launch, replay, result = draft_host.Steps._launch, draft_host.NoGraphs.replay, Launched.result

    def launched(self: draft_host.Steps, plan: StepPlan, *others: Any) -> Launched:
        nonlocal num_following
        num_following += any(share.follows for share in plan.reqs)
        return launch(self, plan, *others)

    def replayed(self: draft_host.NoGraphs, shape: GraphShape) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids, told = replay(self, shape)
        sampled.append(ids.tolist())
        return ids, told

    def read(self: Launched, plan: StepPlan) -> StepResult:
        nonlocal num_read
        if self.plan.reqs:  # of no prompts
            num_read += 1
            assert self.ids.tolist() == sampled.popleft()[: len(self.ids)]
        return result(self, plan)

    def resolved(*_: object) -> StepPlan:
        raise AssertionError("the host waits for the step before")

    monkeypatch.setattr(draft_host.Steps, "_launch", launched)
    monkeypatch.setattr(draft_host.NoGraphs, "replay", replayed)
    monkeypatch.setattr(Launched, "result", read)
    monkeypatch.setattr(step, "resolved", resolved)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["draft_host.py", "--streams", "3", "--output-len", "40"])
    draft_host.main()
    found = re.fullmatch(r"3 streams, (\d+) steps, ms: gap .*launch .*\n", capsys.readouterr().out)
    assert found and 5 < int(found[1]) <= num_read and not sampled
    assert num_following > 5
