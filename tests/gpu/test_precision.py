"""bf16 on the device: the error of our logits beside the error that Hugging Face's own bf16 has, both against its fp32.

Generated tokens are judged by regret: how far below the best logit, in fp32 arithmetic, the chosen token's lies. Where
bf16 moves each logit by at most e, a greedy choice can lose 2 e, whatever kernel made it; a wrong one far more.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from minisgl import LLM
from minisgl.config.resolve import prepare
from minisgl.engine.engine import create_engine
from minisgl.engine.pooling import Computed
from minisgl.engine.tables import Batch
from minisgl.errors import ConfigError
from tests.driver import generate
from tests.gpu.conftest import DEVICE, with_defaults
from tests.integration.test_llm import GREEDY, NUM_TOKENS, make_prompts, with_tokenizer
from tests.models import FAMILIES, hf_logits, random_prompt, tiny_model

ALLOWED = 1.5  # times the error of Hugging Face's bf16
PAIRS = ["sdpa"]
if DEVICE == "cuda":
    PAIRS += [",".join(pair) for pair in itertools.product(("triton", "fi", "fa"), ("triton", "cuda", "fi", "fa"))]
HEADS = {
    "head_dim 128, groups of 2": {"head_dim": 128},
    "head_dim 64, groups of 8": {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 1},
}


def device_logits(path: Path, tokens: list[int], dtype: str) -> torch.Tensor:
    """[num_tokens, vocab_size] of one prompt, float32, on the CPU."""
    options = {"model_path": str(path), "dtype": dtype, "max_running_requests": 2}
    config = prepare(with_defaults(options)).engine
    engine = create_engine(config)
    steps = engine.steps
    forward, seen = steps.forward, []

    def record(batch: Batch) -> Computed:
        computed = forward(batch)
        seen.append(computed.logits(torch.arange(len(tokens), device=batch.tensors.positions.device)).float().cpu())
        return computed

    steps.forward = record
    generate(engine, config, [tokens], 1)
    engine.close()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_near_as_bf16_allows(family: str) -> None:
    path = tiny_model(family)
    ours, theirs = [], []
    for seed in range(3):
        tokens = random_prompt(200, seed)
        reference = hf_logits(path, tokens)
        ours.append((device_logits(path, tokens, "bfloat16") - reference) / reference.std())
        theirs.append((hf_logits(path, tokens, "bfloat16").float() - reference) / reference.std())
    error, bound = (float(torch.cat(errors).square().mean().sqrt()) for errors in (ours, theirs))
    print(f"{family}: RMS error of bf16 logits / their spread: ours {error:.5f}, Hugging Face's {bound:.5f}")
    assert error <= ALLOWED * bound


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_equal_hugging_face(family: str) -> None:
    path, tokens = tiny_model(family), random_prompt(200)
    torch.testing.assert_close(device_logits(path, tokens, "float32"), hf_logits(path, tokens), atol=1e-3, rtol=1e-3)


def regrets(path: Path, prompt: list[int], output: list[int]) -> tuple[float, float]:
    """The largest regret of a greedy output, and the largest error of Hugging Face's bf16 logits at its positions."""
    reference = hf_logits(path, [*prompt, *output[:-1]])[len(prompt) - 1 :]
    rounded = hf_logits(path, [*prompt, *output[:-1]], "bfloat16")[len(prompt) - 1 :].float()
    chosen = reference.gather(1, torch.tensor(output)[:, None])[:, 0]
    return float((reference.max(dim=1).values - chosen).max()), float((rounded - reference).abs().max())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_of_backends(pair: str, heads: str) -> None:
    """Prefill in chunks, decode, and both in one step; every page size that the pair supports."""
    path = with_tokenizer(tiny_model("qwen3", vocab_size=512, **HEADS[heads]))
    prompts = make_prompts()
    num_tried = 0
    for page_size in (1, 16, 64):
        options = {"attn": pair, "page_size": page_size, "max_prefill_length": 70, "num_pages": 2048 // page_size}
        try:
            llm = LLM(str(path), dtype="bfloat16", **options)
        except ConfigError as error:
            reason = str(error)
            continue
        with llm:
            outputs = llm.generate(prompts, GREEDY)
        assert all(len(output.token_ids) == NUM_TOKENS for output in outputs), [output.error for output in outputs]
        losses = [regrets(path, prompt, o.token_ids) for prompt, o in zip(prompts[::3], outputs[::3], strict=True)]
        regret, error = max(r for r, _ in losses), max(e for _, e in losses)
        print(f"{pair}, pages of {page_size}: regret {regret:.4f}, error of Hugging Face's bf16 {error:.4f}")
        assert regret <= 2 * ALLOWED * error
        num_tried += 1
    if not num_tried:
        pytest.skip(reason)
