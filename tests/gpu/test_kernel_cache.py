"""Two installations share the cache of CUDA kernels: what one has compiled, the other loads, and nvcc is not called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PACKAGE = Path(__file__).parents[2] / "python" / "minisgl"
PROGRAM = """
import torch
from minisgl.kernel.jit import load_kernel
load_kernel("step", torch.cuda.get_device_capability())
"""


def test_two_installations_share_the_cuda_kernels(tmp_path: Path) -> None:
    said = []
    for place in (tmp_path / "first", tmp_path / "second"):
        shutil.copytree(PACKAGE, place / "minisgl", ignore=shutil.ignore_patterns("__pycache__"))
        paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]  # its libraries may be there
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MINISGL_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append([line for line in done.stderr.splitlines() if "compil" in line])
    (line,) = said[0]
    assert line.startswith("compiling the kernel step for sm_")
    assert said[1] == []
    assert len(list((tmp_path / "cache" / "kernels").glob("*.so"))) == 1
