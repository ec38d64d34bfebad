"""What is compiled before a server is ready."""

from __future__ import annotations

import pytest
import torch

from minisgl.engine.memory import WARM_UP_TOKENS
from tests.triton_cpu import MARKS

pytestmark = MARKS
CAPTURED, LARGEST = 256, 8192  # tokens of steps, by default: up to the one graphs are captured, the other is the most


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (128, 8), (256, 8), (512, 10)])
def test_steps_sort_pairs_with_what_is_compiled_at_start(num_experts: int, top_k: int) -> None:
    """Otherwise all streams would wait for Triton once."""
    from minisgl.kernel.triton.grouped_gemm import LONG, moe_config

    def kind(num_tokens: int) -> tuple[int, bool]:
        pairs = num_tokens * top_k
        return moe_config(pairs, num_experts, torch.bfloat16, (9, 0))[0].block_m, pairs > LONG

    compiled = {kind(num) for num in (*range(1, CAPTURED + 1), *WARM_UP_TOKENS, LARGEST)}
    assert {kind(num) for num in range(1, LARGEST + 1)} == compiled
