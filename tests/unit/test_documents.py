"""README.md says what the program does: its flags are the parser's. And the check of what documents name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minisgl.config.args import parse_args
from tools.check_docs import missing_extras, missing_paths, read_extras

README = Path(__file__).parents[2] / "README.md"


def test_the_flags_of_the_readme_are_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    table = README.read_text().partition("## Flags")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    documented = {flag for cell in first_cells for flag in re.findall(r"`(--[a-z-]+)`", cell)}
    with pytest.raises(SystemExit):
        parse_args(["--help"], {})
    options = re.findall(r"^  (?:-h, )?(--.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    real = {flag for line in options for flag in re.findall(r"(--[a-z-]+)", line.split("  ")[0])}
    assert documented == real - {"--help", "--version"}


def test_files_and_extras_that_are_not_there_are_named() -> None:
    assert missing_paths(README, "see `core.py`, `docs/adr/`, [this](docs/features.md) and `config/nowhere.py`") == [
        "file: config/nowhere.py"
    ]
    extras = read_extras((README.parent / "pyproject.toml").read_text())
    assert {"cuda", "fa", "fi"} <= extras
    text = "pip install 'minisgl[cuda,fa]', 'minisgl[rocm]', the extra `fi` or the extra `mps`"
    assert missing_extras(text, extras) == ["extra: mps", "extra: rocm"]
