"""Checkpoints of few bits on the device, from the disk to log-probabilities, in prefill and in decode steps: those of
transformers with the values that the weights stand for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
import torch
from torch.nn import Linear

from minisgl import LLM, SamplingParams
from minisgl.distributed.comm import Communicator
from minisgl.formats import create_format
from minisgl.kernel import cuda
from minisgl.kernel.cuda import create_cuda_ops
from minisgl.kernel.packed_gemm import PackedMatrix
from minisgl.layers.base import LayerEnv
from minisgl.llm import RequestOutput
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderModel
from tests.driver import engine_config
from tests.gguf_files import byte_tokens, write_gguf
from tests.integration.test_float8_gpu import rounded
from tests.integration.test_llm import make_prompts, with_tokenizer
from tests.integration.test_quantized_checkpoints import quantized
from tests.models import hf_model, tiny_model

SIZES = {"vocab_size": 512, "hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "moe_intermediate_size": 128}
PROMPTS = [[token % 256 for token in prompt] for prompt in make_prompts()[:6]]
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
        return llm.generate(PROMPTS, PARAMS, progress=False)


@contextmanager
def rounding(model: torch.nn.Module) -> Iterator[None]:
    """Linear layers but the head take tokens as Hopper's products of several with e4m3 take them."""

    def hook(_: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        return rounded(args[0].flatten(0, -2), 128).view_as(args[0])

    layers = [layer for name, layer in model.named_modules() if isinstance(layer, Linear) and name != "lm_head"]
    hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
    yield
    for handle in hooks:
        handle.remove()


def check(outputs: list[RequestOutput], model: torch.nn.Module, is_rounded: bool = False) -> None:
    """Log-probabilities of all tokens but each prompt's first are as near to the model's as those of its bfloat16 copy
    are: by the median, and by the mean, to which a token that is routed to another expert counts much.

    is_rounded: the copy is the model itself, whose layers take tokens rounded to e4m3. What ours rounds differs by an
    error of bfloat16, which is enough for some to become the next number of e4m3: so the two are not compared directly.
    """
    copy_of = model if is_rounded else copy.deepcopy(model).bfloat16()
    ours, theirs = list[float](), list[float]()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([[*prompt, *output.token_ids]])
        with torch.inference_mode():
            exact = model(ids).logits[0].float().log_softmax(-1)
            with rounding(model) if is_rounded else nullcontext():
                near = copy_of(ids).logits[0].float().log_softmax(-1)
        reported = [*(output.prompt_logprobs or ()), *output.logprobs][1:]
        assert [token.token_id for token in reported] == ids[0, 1:].tolist()
        for i, token in enumerate(reported):
            ours.append(abs(token.logprob - float(exact[i, token.token_id])))
            theirs.append(abs(float(near[i, token.token_id] - exact[i, token.token_id])))
    assert median(ours) < 1.5 * median(theirs) + 0.005
    assert fmean(ours) < 2 * fmean(theirs) + 0.01


@pytest.mark.timeout(600)  # compiles
@pytest.mark.parametrize(
    "case", ["awq", "gptq with zeros", "gptq in order of activations", "compressed", "fp8 of blocks"]
)
def test_a_checkpoint(case: str, tmp_path: Path, packed: list[int]) -> None:
    path, model = quantized(tmp_path / "model", case, "qwen3", **SIZES)
    is_rounded = "fp8" in case and torch.cuda.get_device_capability() == (9, 0)
    check(outputs_of(with_tokenizer(path)), model, is_rounded)
    assert bool(packed[0]) == ("fp8" not in case)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["awq", "gptq of rows", "fp8 of blocks", "fp8 of tensors"])
def test_experts(case: str, tmp_path: Path) -> None:
    """In one product of all, within graphs."""
    path, model = quantized(tmp_path / "model", case, "qwen3_moe", **SIZES)
    check(outputs_of(with_tokenizer(path)), model)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_a_gguf_file(kind: str, tmp_path: Path, packed: list[int]) -> None:
    path, reference = write_gguf(tiny_model("qwen3", **SIZES | {"vocab_size": 256}), tmp_path, kind, **byte_tokens())
    check(outputs_of(path), hf_model(reference))
    assert bool(packed[0]) == kind.startswith("Q4")


class OneOfTwo(Communicator):
    """A rank of two, whose sums are its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.size = rank, 2


def loaded(path: Path, rank: int) -> DecoderModel:
    """What a rank of two holds."""
    device, checkpoint = torch.device("cuda", 0), Checkpoint(path)
    config = engine_config(path, device="cuda", dtype="bfloat16")
    form, ops = create_format(config, device, checkpoint.header()), create_cuda_ops(device, torch.bfloat16, "triton")
    with torch.inference_mode():
        model = DecoderModel(LayerEnv(OneOfTwo(rank), ops, torch.bfloat16, device, form), config.model)
        load_weights(model.parts(), checkpoint)
    return model


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ["awq", "gptq with zeros", "compressed", "compressed fp8 of rows"])
def test_two_ranks_on_one_device(case: str, tmp_path: Path, packed: list[int]) -> None:
    """Each with its part of every layer, one after the other: together they compute what the checkpoint says."""
    path, model = quantized(tmp_path / "model", case, "qwen3", **SIZES)
    ranks = [loaded(path, rank).layers[1] for rank in (0, 1)]
    expected, x, gain = model.get_submodule("model.layers.1"), torch.randn(5, 256).bfloat16(), torch.ones(256)
    on_gpu = x.cuda(), gain.bfloat16().cuda(), 1e-6
    with torch.inference_mode():
        normed = torch.nn.functional.rms_norm(x.float(), (256,), gain, 1e-6)
        inner = [rank.mlp.gate_up_proj.project(*on_gpu) for rank in ranks]
        found = [
            sum(rank.mlp.down_proj.matrix.apply(y).float() for rank, y in zip(ranks, inner, strict=True)),
            torch.cat([rank.self_attn.qkv_proj.project(*on_gpu)[:, :128] for rank in ranks], 1).float(),
            sum(
                rank.self_attn.o_proj.matrix.apply(part).float()
                for rank, part in zip(ranks, x.cuda().chunk(2, 1), strict=True)
            ),
        ]
        attention = expected.self_attn

        def wanted_of_all() -> tuple[torch.Tensor, ...]:
            return expected.mlp(normed), attention.q_proj(normed), attention.o_proj(x.float())

        exact = wanted_of_all()
        with rounding(expected) if "fp8" in case else nullcontext():
            near = wanted_of_all()
        for actual, wanted, rounded_once in zip(found, exact, near, strict=True):
            limit = 0.01 * wanted.norm() + 1.5 * (rounded_once - wanted).norm()
            assert (actual.cpu() - wanted).norm() < limit
    assert bool(packed[0]) == ("fp8" not in case)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp_size", [2])
@pytest.mark.parametrize(
    ("case", "family"), [("awq", "qwen3"), ("compressed", "qwen3_moe"), ("fp8 of tensors", "qwen3_moe")]
)
def test_ranks(case: str, family: str, tp_size: int, tmp_path: Path) -> None:
    path, model = quantized(tmp_path / "model", case, family, **SIZES)
    check(outputs_of(with_tokenizer(path), tp_size), model)
