"""How far the kernels' logits of GGUF files are from those of the same values in float32, as transformers has them.

`benchmark/cpu/quality.py` measures the same beside llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from minisgl.config.locate import load_tokenizer
from minisgl.gguf.reader import KINDS
from tests.driver import CPU_KERNELS, engine_logits
from tests.gguf_files import write_gguf
from tests.models import hf_logits, random_prompt, tiny_model
from tests.real_model import real_model

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
TEXTS = yaml.safe_load((Path(__file__).parents[2] / "benchmark/cpu/quality.yaml").read_text(encoding="utf-8"))["texts"]


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """Kullback and Leibler's, in nats, the mean of all positions."""
    p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values()])
def test_every_type(kind: str, tmp_path: Path) -> None:
    path, reference = write_gguf(tiny_model("qwen3", **WIDE), tmp_path, kind)
    prompt = random_prompt(48)
    expected = hf_logits(reference, prompt)
    logits = engine_logits(path, prompt, **CPU_KERNELS)
    in_full = kind in ("F32", "F16", "BF16")  # else activations have 8 bits
    assert divergence(expected, logits) < (1e-9 if in_full else 1e-3)
    assert float((expected - logits).square().mean().sqrt() / expected.std()) < (1e-5 if in_full else 0.03)


@pytest.mark.timeout(600)  # the model may have to be made first
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_as_it_comes(dtype: str) -> None:
    """Q4_1, the embedding Q8_0. llama.cpp's divergence on these texts is 0.003 too."""
    folder = real_model()
    (path,) = folder.glob("**/*.gguf")
    tokenizer = load_tokenizer(str(path))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        expected = hf_logits(folder, ids)
        logits = engine_logits(path, ids, dtype=dtype, **CPU_KERNELS)
        assert divergence(expected, logits) < 0.01
        assert float((expected.argmax(-1) == logits.argmax(-1)).float().mean()) > 0.9
