"""The points themselves: a fault happens once, to the worker that it is for."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import PYTHONPATH
from tests.faults.conftest import Faults
from tests.faults.points import POINTS

SCRIPT = """
from tests.faults.points import fault
for _ in range(3):
    try:
        print(fault("step"))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("action", "lines"),
    [
        ("nan 3", ["nan 3", "None", "None"]),
        ("raise engine", ["EngineError injected at step", "None", "None"]),
        ("raise memory", ["MemoryError injected at step", "None", "None"]),
        (f"wait {__file__}", ["None", "None", "None"]),  # which is there
        ("kill", []),
        ("exit", []),
    ],
)
def test_fault_happens_once(tmp_path: Path, action: str, lines: list[str]) -> None:
    faults = Faults(tmp_path)
    faults.plant("server", "step", action)
    faults.plant("TP0", "step", "kill")  # somebody else's
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=faults.env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == lines
    assert faults.is_taken("server", "step")
    assert not faults.is_taken("TP0", "step")


def test_nothing_fails_by_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["None"] * 3


def test_each_point_is_there() -> None:
    for module, wrapped in POINTS.items():
        for where, _ in wrapped:
            assert callable(functools.reduce(getattr, where.split("."), importlib.import_module(module)))
