"""What the package holds is what its sources make: byte for byte, where node and the page's packages are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from minisgl.page.routes import ASSETS

PAGE = Path(__file__).parents[2] / "page"


def test_the_same_sources_make_the_same_bytes(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (PAGE / "node_modules").is_dir():
        if os.environ.get("REQUIRE_NODE"):
            pytest.fail("node 20 and `npm ci --prefix page` are missing")
        pytest.skip("needs node 20 and `npm ci --prefix page`")
    subprocess.run([node, PAGE / "build.mjs", tmp_path], check=True, timeout=250)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made.keys() == {path.name for path in ASSETS.iterdir()}
    stale = [name for name, data in made.items() if data != (ASSETS / name).read_bytes()]
    assert not stale, "run `npm run build --prefix page`"
