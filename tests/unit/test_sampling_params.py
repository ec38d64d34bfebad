"""A sampling parameter is stated in few places, and its range in one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minisgl.core import RANGES, SamplingParams
from minisgl.errors import RequestError

PACKAGE = Path(__file__).parents[2] / "python" / "minisgl"
MOST_FILES = 8  # kernels, the HTTP API and its documents included


def test_few_files_name_a_parameter() -> None:
    suffixes = {".py", ".cu", ".cuh", ".cc", ".h", ".json", ".yaml"}
    files = [path for path in PACKAGE.rglob("*") if path.suffix in suffixes]
    naming = [path.name for path in files if re.search(r"\bmin_p\b", path.read_text(encoding="utf-8"))]
    assert "sampling.cu" in naming
    assert len(naming) <= MOST_FILES, naming


@pytest.mark.parametrize("name", RANGES)
def test_ranges_have_an_end_at_both_sides(name: str) -> None:
    lowest, highest, _ = RANGES[name]
    for value in (lowest - 1, highest + 1, float("nan")):
        with pytest.raises(RequestError, match=rf"^{name} must be .*, not {re.escape(repr(value))}$"):
            SamplingParams(**{name: value})  # type: ignore[arg-type]
    SamplingParams(**{name: highest})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RANGES)
def test_none_is_a_value_only_where_it_is_the_default(name: str) -> None:
    if getattr(SamplingParams(), name) is None:
        SamplingParams(**{name: None})  # type: ignore[arg-type]
        return
    with pytest.raises(RequestError, match=f"^{name} must be .*, not None$"):
        SamplingParams(**{name: None})  # type: ignore[arg-type]
