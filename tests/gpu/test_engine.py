"""The engine's contract on the device, where no planner makes the plans."""

from __future__ import annotations

import pytest

from minisgl.config.resolve import prepare
from tests.gpu.conftest import with_defaults
from tests.integration.test_engine import check_page_copies
from tests.models import tiny_model


@pytest.mark.parametrize("graphs", [0, 2])
def test_pages_are_copied_before_a_step(graphs: int) -> None:
    path = tiny_model("qwen3")
    options = {"model_path": str(path), "max_running_requests": 2, "num_pages": 64, "page_size": 8}
    check_page_copies(path, prepare(with_defaults({**options, "cuda_graph_max_bs": graphs})).engine)
