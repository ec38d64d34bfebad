"""The order of tests names files that there are."""

from __future__ import annotations

from pathlib import Path

from tests.order import APART, LONGEST, InOrder, rank

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


def test_what_is_one_workers() -> None:
    def scope(nodeid: str) -> str:
        return InOrder._split_scope(None, nodeid)

    assert scope("tests/unit/test_args.py::a[x/y]") == scope("tests/unit/test_args.py::b") == "tests/unit/test_args.py"
    assert scope("tests/e2e/test_learn.py::a") != scope("tests/e2e/test_learn.py::b")
