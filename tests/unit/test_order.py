"""The order of tests names files that there are."""

from __future__ import annotations

from pathlib import Path

from tests.order import APART, LONGEST, rank

ROOT = Path(__file__).parents[2]


def test_the_order_names_files_that_there_are() -> None:
    assert all((ROOT / name).exists() for name in (*LONGEST, *APART))


def test_files_come_before_their_folder_and_units_last() -> None:
    names = [
        "tests/unit/test_args.py::a",
        "tests/e2e/test_api.py::b",
        "tests/e2e/test_learn.py::c",
        "tests/soak/x.py::d",
    ]
    assert sorted(names, key=rank) == names[::-1]
