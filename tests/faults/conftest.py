"""Servers that are broken on purpose: those of the end-to-end tests, with a folder of faults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import Server, fake, model_path, real, server, short_path, start, tiny_path
from tests.forked import INJECTED

__all__ = ["Faults", "Server", "fake", "model_path", "real", "server", "short_path", "start", "tiny_path"]


class Faults:
    """A folder of faults (`points.py`). env: what a server is started with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"FAULTS": str(folder), "PYTHONPATH": INJECTED}

    def plant(self, worker: str, point: str, action: str) -> None:
        """The worker (`TP0`, `detokenizer-0` …) does `action` when it passes the point next."""
        draft = self.folder / f"draft-{worker}.{point}"
        draft.write_text(action)
        os.rename(draft, self.folder / f"{worker}.{point}")

    def is_taken(self, worker: str, point: str) -> bool:
        """Whether the worker has passed the point, and done it."""
        return not (self.folder / f"{worker}.{point}").exists()


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    folder = tmp_path / "faults"
    folder.mkdir()
    return Faults(folder)
