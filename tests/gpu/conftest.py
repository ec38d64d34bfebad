"""Whole-engine suites on a GPU: `python -m pytest -m gpu`. Every test in this directory has the marker `gpu`.

Tests of `tests/integration` are run again here, with another default for the device. `MINISGL_TEST_DEVICE=cpu` runs
what it can on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl import llm as llm_module
from minisgl.config.args import ServerArgs, args_from_options

DEVICE = os.environ.get("MINISGL_TEST_DEVICE", "cuda")
NUM_DEVICES = torch.cuda.device_count() if DEVICE == "cuda" else 4
# Ranks share memory, which the allocator's expandable segments cannot, and rank 0 is in this process: it must not
# begin with them for an engine of one rank.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:False")
# What the options of `LLM` are here unless a test says otherwise: exact arithmetic, few graphs to capture, and not all
# of a GPU's memory for a tiny model's KV cache, which would be millions of pages.
DEFAULTS: dict[str, Any] = {"device": DEVICE, "dtype": "float32", "max_running_requests": 16, "num_pages": 4096}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        params = getattr(getattr(item, "callspec", None), "params", {})
        needed = params.get("tp_size", 2 if "tensor parallel" in str(params.get("schedule")) else 1)
        if needed > NUM_DEVICES:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, {NUM_DEVICES} are here"))


def with_defaults(options: Mapping[str, Any]) -> ServerArgs:
    aliases = {"tp": "tensor_parallel_size", "attn": "attention_backend"}
    return args_from_options({**DEFAULTS, **{aliases.get(name, name): value for name, value in options.items()}})


@pytest.fixture(scope="package", autouse=True)
def device_by_default() -> Iterator[None]:
    """`LLM` computes on the device in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_module, "args_from_options", with_defaults)
        yield
