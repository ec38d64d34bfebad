"""How far the kernels' logits of GGUF files are from those of the same values in float32, as transformers has them.

They must be no farther than those of transformers with activations in blocks of Q8_0, by what can be told.
`benchmark/cpu/quality.py` measures the same beside llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from minisgl.config.locate import load_tokenizer
from minisgl.gguf.model import KINDS
from tests.driver import CPU_KERNELS, engine_logits, engine_logits_of_each
from tests.gguf_files import write_gguf
from tests.models import hf_logits, random_prompt, tiny_model
from tests.real_model import real_model

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}
TEXTS = yaml.safe_load((Path(__file__).parents[2] / "benchmark/cpu/quality.yaml").read_text(encoding="utf-8"))["texts"]


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Kullback and Leibler's, in nats, of each position."""
    p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def logits_of_rounded(path: Path, tokens: list[int]) -> torch.Tensor:
    """Transformers' logits where the input of each product is in blocks of Q8_0, as the `gguf` package rounds it: what
    llama.cpp multiplies weights of few bits with (blocks of 256 for K-quants, which are coarser)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    kind = gguf.GGMLQuantizationType.Q8_0

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(inputs[0].numpy(), kind), kind))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values()])
def test_every_type(kind: str, tmp_path: Path) -> None:
    """With the cache that is chosen for such files. The bound is statistical: three standard errors of a difference."""
    path, reference = write_gguf(tiny_model("qwen3", **WIDE), tmp_path, kind)
    prompt = random_prompt(192)
    expected = hf_logits(reference, prompt)
    in_full = kind in ("F32", "F16", "BF16")  # else activations have 8 bits
    ours = divergence(expected, engine_logits(path, prompt, kv_cache_dtype="float16", **CPU_KERNELS))
    if in_full:
        assert float(ours.mean()) < 1e-7
        exact = engine_logits(path, prompt, **CPU_KERNELS)
        assert float(divergence(expected, exact).mean()) < 1e-9
    else:
        difference = ours - divergence(expected, logits_of_rounded(reference, prompt))
        assert float(difference.mean()) < 3 * float(difference.std()) / len(prompt) ** 0.5
        assert float(ours.mean()) < 1e-3


@pytest.mark.timeout(600)  # the model may have to be made first
def test_smollm2_as_it_comes() -> None:
    """Q4_1, the embedding Q8_0. llama.cpp's divergence on these texts is 0.003 too."""
    folder = real_model()
    (path,) = folder.glob("**/*.gguf")
    tokenizer = load_tokenizer(str(path))
    texts = [tokenizer.encode(text) for text in TEXTS]
    expected = [hf_logits(folder, ids) for ids in texts]
    for dtype in ("float32", "bfloat16"):
        found = engine_logits_of_each(path, texts, dtype=dtype, **CPU_KERNELS)
        for theirs, ours in zip(expected, found, strict=True):
            assert float(divergence(theirs, ours).mean()) < 0.01
            assert float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()) > 0.9
