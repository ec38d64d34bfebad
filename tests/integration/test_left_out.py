"""Files that only a GPU runs are not collected without one. They can be imported nevertheless, and have their tests."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tests.conftest import ONLY_GPU, is_left_out

ROOT = Path(__file__).parents[2]


def test_they_can_be_imported() -> None:
    files = [file for folder in ("gpu", "integration") for file in (ROOT / "tests" / folder).glob("test_*.py")]
    assert sum(file.parent.name == "gpu" or bool(ONLY_GPU.search(file.read_text())) for file in files) > 10
    for file in filter(is_left_out, files):
        module = import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        assert any(name.startswith("test_") for name in vars(module)), file
