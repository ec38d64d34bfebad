"""Some cases of the hunt (`tests/gpu/hunt.py`), of one family after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from minisgl.errors import ConfigError
from tests.gpu.conftest import DEVICE
from tests.gpu.hunt import judge, serve
from tests.gpu.hunt_cases import draw, make


@pytest.mark.timeout(600)  # compiles
@pytest.mark.parametrize("number", range(40, 64))
def test_a_case(number: int, tmp_path: Path) -> None:
    case = draw(number, 1, DEVICE)
    made = make(case, tmp_path)
    try:
        outputs, _ = serve(case, made.path, DEVICE, 1)
    except ConfigError as error:
        pytest.skip(str(error))
    wrong, figures = judge(case, made, outputs)
    assert not wrong, (figures, case)
