"""Some cases of the hunt (`tests/gpu/hunt.py`), of one family after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minisgl.errors import ConfigError
from tests.gpu import hunt
from tests.gpu.conftest import DEVICE
from tests.gpu.hunt import is_refusal, judge, serve, work
from tests.gpu.hunt_cases import draw, make


@pytest.mark.timeout(600)  # compiles
@pytest.mark.parametrize("number", range(40, 64))
def test_a_case(number: int, tmp_path: Path) -> None:
    case = draw(number, 1, DEVICE)
    made = make(case, tmp_path)
    try:
        outputs, _ = serve(case, made.path, DEVICE, 1)
    except ConfigError as error:
        if not is_refusal(error):
            raise
        pytest.skip(str(error))
    wrong, figures = judge(case, made, outputs)
    assert not wrong, (figures, case)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("cannot compile the kernel norm_router for sm_90a: nvcc failed", "wrong"),
        ("the model does not fit the GPU (139 GiB)", "wrong"),
        ("--speculate mtp: the model has no head", "refused"),
    ],
)
def test_what_does_not_compile_or_fit_is_no_refusal(
    said: str, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ConfigError(said)

    monkeypatch.setattr(hunt, "make", fail)
    work([40], DEVICE, 1, float("inf"))
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line.get(kind) for line in told] == [None, said]
