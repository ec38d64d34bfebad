"""A child's line to its supervisor."""

from __future__ import annotations

import multiprocessing

import pytest

from minisgl.message.control import Ready, decode_control
from minisgl.server import workers


@pytest.mark.timeout(20)
def test_beats_never_wait_for_a_parent_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks that `LLM` starts have such a parent: an hour of beats fills the pipe, and the rank would hang."""
    monkeypatch.setattr(workers, "HEARTBEAT_SECONDS", 0.0)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    control = workers.Control(theirs)
    control.ready(pages=1)
    for _ in range(10_000):
        control.beat()
    assert decode_control(ours.recv_bytes()) == Ready(info={"pages": 1})
    ours.close()
    theirs.close()
