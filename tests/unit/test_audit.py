"""The scan of dependencies: weaknesses fail a build, a missing network does not. The service is a stand-in."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tools import audit

STAND_IN = """
import sys, time
time.sleep({delay})
names = [line.strip().split("==") for line in open(sys.argv[sys.argv.index("--requirement") + 1])]
said = [{{"name": name, "version": version, **{about}}} for name, version in names]
if {answers}:
    import json
    json.dump({{"dependencies": said}}, open(sys.argv[sys.argv.index("--output") + 1], "w"))
else:
    sys.exit("requests.exceptions.ConnectionError: no route to host")
"""
WEAK = {"vulns": [{"id": "PYSEC-1", "fix_versions": ["9.9"]}]}


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, about: Any, *flags: str, answers: bool = True, delay: int = 0
) -> int:
    text = STAND_IN.format(delay=delay, about=json.dumps(about), answers=answers)
    (folder / "pip_audit.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return audit.main([*flags])


def test_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, tmp_path, {"vulns": []}) == 0
    assert "0 weaknesses" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path, WEAK) == 1
    assert "fastapi" in (said := capsys.readouterr().out)
    assert "PYSEC-1; mended in 9.9" in said
    for about, answers in (({}, False), ({"skip_reason": "not found"}, True)):
        for flags, status in (((), 0), (("--strict",), 1)):
            assert run(monkeypatch, tmp_path, about, *flags, answers=answers) == status
            assert "nothing was scanned" in capsys.readouterr().out


def test_it_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(audit, "SECONDS", 1)
    begin = time.monotonic()
    assert run(monkeypatch, tmp_path, WEAK, delay=200) == 0
    assert time.monotonic() - begin < 100


def test_what_is_needed() -> None:
    packages = audit.needed("minisgl")
    assert {"fastapi", "uvicorn", "h11", "torch", "transformers"} <= set(packages)
    assert not {"pytest", "minisgl"} & set(packages)
    assert all("+" not in version for version in packages.values())
