"""Checkpoints of few bits on the device, from the disk to log-probabilities, in prefill and in decode steps: those of
transformers with the values that the weights stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl import LLM, SamplingParams
from minisgl.kernel import cuda
from minisgl.kernel.packed_gemm import PackedMatrix
from minisgl.llm import RequestOutput
from tests.gguf_files import write_gguf
from tests.integration.test_llm import make_prompts, with_tokenizer
from tests.integration.test_quantized_checkpoints import quantized
from tests.models import hf_model, tiny_model

SIZES = {"vocab_size": 512, "hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 128}
PARAMS = SamplingParams(12, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a product was asked of weights of 4 bits, however few they are."""
    count = [0]
    multiply = PackedMatrix.multiply

    def counted(matrix: PackedMatrix, *args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        return multiply(matrix, *args, **kwargs)

    monkeypatch.setattr(PackedMatrix, "multiply", counted)
    monkeypatch.setattr(cuda, "PACKED_WEIGHTS", 0)
    return count


def outputs_of(path: Path, tp_size: int = 1) -> list[RequestOutput]:
    with LLM(str(path), dtype="bfloat16", tp=tp_size, num_pages=256) as llm:  # whatever else is on the device
        return llm.generate(make_prompts()[:6], PARAMS, progress=False)


def check(outputs: list[RequestOutput], model: torch.nn.Module, limit: float = 0.03) -> None:
    """limit: of the mean difference of log-probabilities, of all tokens but each prompt's first."""
    differences = []
    for prompt, output in zip(make_prompts(), outputs, strict=False):
        ids = [*prompt, *output.token_ids]
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        reported = [*(output.prompt_logprobs or ()), *output.logprobs][1:]
        assert [token.token_id for token in reported] == ids[1:]
        differences += [abs(token.logprob - float(expected[i, token.token_id])) for i, token in enumerate(reported)]
    assert sum(differences) / len(differences) < limit
    assert max(differences) < 10 * limit


@pytest.mark.timeout(600)  # compiles
@pytest.mark.parametrize(
    "case", ["awq", "gptq with zeros", "gptq in order of activations", "compressed", "fp8 of blocks"]
)
def test_a_checkpoint(case: str, tmp_path: Path, packed: list[int]) -> None:
    path, model = quantized(tmp_path / "model", case, "qwen3", **SIZES)
    check(outputs_of(with_tokenizer(path)), model, 0.1 if "fp8" in case else 0.03)  # tokens become e4m3 too
    assert bool(packed[0]) == ("fp8" not in case)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_a_gguf_file(kind: str, tmp_path: Path, packed: list[int]) -> None:
    path, reference = write_gguf(with_tokenizer(tiny_model("qwen3", **SIZES)), tmp_path, kind)
    check(outputs_of(path), hf_model(reference))
    assert bool(packed[0]) == kind.startswith("Q4")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp_size", [2])
def test_ranks(tp_size: int, tmp_path: Path) -> None:
    path, model = quantized(tmp_path / "model", "awq", "qwen3", **SIZES)
    check(outputs_of(with_tokenizer(path), tp_size), model)
