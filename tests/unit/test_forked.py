"""Which servers of tests are forked: those that a new process would not be unlike."""

from __future__ import annotations

import pytest

from tests.forked import BASE, INJECTED, can_be_forked

SERVER = ["-m", "minisgl", "--port", "0"]


@pytest.mark.parametrize(
    ("args", "changes", "expected"),
    [
        (SERVER, {}, True),
        (["-m", "tests.fake_server", "model"], {}, True),
        (SERVER, {"MINISGL_DRAIN_TIMEOUT": "1", "TMPDIR": "/tmp", "PYTEST_CURRENT_TEST": "a"}, True),
        (SERVER, {"PYTHONPATH": INJECTED, "FAULTS": "folder"}, True),
        (["-c", "pass"], {}, False),
        (SERVER, {"CXX": "compiler"}, False),
        (SERVER, {"HF_HUB_OFFLINE": "as it is not"}, False),
        (SERVER, {"PYTHONPATH": f"/hidden:{BASE['PYTHONPATH']}"}, False),
    ],
)
def test_what_imports_would_see_is_not_forked(args: list[str], changes: dict[str, str], expected: bool) -> None:
    assert can_be_forked(args, {**BASE, **changes}) == expected
