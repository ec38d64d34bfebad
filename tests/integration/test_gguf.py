"""Models in GGUF files: the same logits as transformers with the values that the blocks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.driver import CPU_KERNELS, engine_logits
from tests.gguf_files import write_gguf
from tests.models import hf_logits, random_prompt, tiny_model

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
KINDS += ["IQ4_NL", "IQ4_XS", "MXFP4"]
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
PROMPT = random_prompt(24)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind: str, tmp_path: Path) -> None:
    path, reference = write_gguf(tiny_model("qwen3", **WIDE), tmp_path, kind)
    torch.testing.assert_close(engine_logits(path, PROMPT), hf_logits(reference, PROMPT), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("kernels", [{}, CPU_KERNELS], ids=["torch", "kernels"])
def test_every_family(family: str, kernels: dict[str, Any], tmp_path: Path) -> None:
    path, reference = write_gguf(tiny_model(family), tmp_path, {"v_proj": "Q8_0", "down_proj": "F16", "": "Q4_0"})
    expected = hf_logits(reference, PROMPT)
    torch.testing.assert_close(engine_logits(path, PROMPT, **kernels), expected, atol=2e-3, rtol=2e-3)
