"""The engine's contract: however steps are cut and mixed, each request gets the tokens that it would get alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from minisgl.attention.base import StepContext
from minisgl.config.model import RopeConfig
from minisgl.core import Admission, PageUpdate, SamplingParams, ScheduledReq, StepPlan
from minisgl.engine.engine import create_engine
from minisgl.errors import ConfigError, EngineError
from minisgl.models import decoder
from tests.driver import CPU_KERNELS, GREEDY, engine_config, engine_logits, generate
from tests.models import hf_generate, random_prompt, tiny_model


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("stagger", [0, 3])
def test_mixed_batches(page_size: int, chunk: int, stagger: int) -> None:
    path = tiny_model("qwen3", use_sliding_window=True, sliding_window=20, max_window_layers=2)
    config = engine_config(path, page_size=page_size, num_pages=2048 // page_size)
    prompts = [random_prompt(3 + 5 * i, seed=i) for i in range(16)]
    counts = [5 + 2 * (i % 7) for i in range(16)]
    engine = create_engine(config)
    outputs = generate(engine, config, prompts, counts, chunk=chunk, stagger=stagger)
    engine.close()
    assert outputs == [hf_generate(path, p, n) for p, n in zip(prompts, counts, strict=True)]


def test_shared_pages_in_one_plan() -> None:
    """Two requests of one step share a prefix that is computed in that very step."""
    path = tiny_model("llama")
    prefix = random_prompt(16)
    first, second = [*prefix, 7, 8, 9], [*prefix, 11, 12]
    engine = create_engine(engine_config(path, page_size=16, num_pages=8))
    ids = [np.array(p, dtype=np.int32) for p in (first, second)]
    plan = StepPlan(
        0,
        (Admission(0, ids[0], GREEDY), Admission(1, ids[1], GREEDY)),
        (PageUpdate(0, 0, (3, 5)), PageUpdate(1, 0, (3, 4))),
        (ScheduledReq(1, 16, 2, 1), ScheduledReq(0, 0, 19, 1)),
    )
    result = engine.submit(plan).result()
    engine.close()
    assert result.token_ids == [tuple(hf_generate(path, second, 1)), tuple(hf_generate(path, first, 1))]


def test_failed_step_does_not_stop_later_ones() -> None:
    path = tiny_model("llama")
    config = engine_config(path)
    engine = create_engine(config)
    bad = engine.submit(StepPlan(7, (), (), (ScheduledReq(10**6, 0, 1, 1),), num_decode=1))
    assert bad.wait(60)
    with pytest.raises(EngineError, match="step 7") as caught:
        bad.result()
    assert isinstance(caught.value.__cause__, IndexError)
    prompt = random_prompt(5)
    assert generate(engine, config, [prompt], 4) == [hf_generate(path, prompt, 4)]
    engine.close()


def test_life_cycle() -> None:
    engine = create_engine(engine_config(tiny_model("llama")))
    assert engine.submit(StepPlan(3, (), (), ())).result().token_ids == []
    last = engine.submit(StepPlan(4, (), (), ()))
    engine.close()
    assert last.wait(0)


def test_a_layer_with_a_forward_of_its_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our C++ computes for all layers at once is `DecoderLayer`, and no class that is derived from it."""
    path, calls = tiny_model("llama"), []

    class Watched(decoder.DecoderLayer):
        def forward(self, x: torch.Tensor, step: StepContext, inputs: torch.Tensor | None = None) -> torch.Tensor:
            calls.append(len(x))
            return super().forward(x, step, inputs)

    tokens = random_prompt(5)
    expected = engine_logits(path, tokens, **CPU_KERNELS)
    monkeypatch.setattr(decoder, "DecoderLayer", Watched)
    torch.testing.assert_close(engine_logits(path, tokens, **CPU_KERNELS), expected, atol=1e-4, rtol=1e-4)
    assert calls == [5] * engine_config(path).model.num_layers


@pytest.mark.parametrize("kernels", [{}, CPU_KERNELS])
def test_each_layer_has_the_angles_of_its_table(kernels: dict[str, object]) -> None:
    path, tokens = tiny_model("qwen3"), random_prompt(12)
    model, expected = engine_config(path).model, engine_logits(path, tokens, **kernels)
    other = replace(model.ropes[0], theta=100.0)

    def logits(tables: tuple[RopeConfig, ...], second: int) -> torch.Tensor:
        """Odd layers use the table `second`."""
        specs = enumerate(layer.attention for layer in model.layers)
        attention = [replace(spec, rope_index=second if i % 2 else 0) for i, spec in specs]
        pairs = zip(model.layers, attention, strict=True)
        layers = tuple(replace(layer, attention=spec) for layer, spec in pairs)
        return engine_logits(path, tokens, model=replace(model, ropes=tables, layers=layers), **kernels)

    torch.testing.assert_close(logits((model.ropes[0], other), 0), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits((model.ropes[0],) * 2, 1), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits((model.ropes[0], other), 1), expected, atol=1e-2)


def test_nan_ends_one_row_only() -> None:
    """A request whose KV is poisoned gets -1; those beside it, and those that reuse its pages, are not touched."""
    path = tiny_model("llama")
    config = engine_config(path, page_size=4, num_pages=64, max_running_requests=4)
    engine = create_engine(config)
    with torch.inference_mode():
        for layer in range(config.model.num_layers):
            for tensor in engine.steps.kv.layer(layer):
                tensor.fill_(float("nan"))
    prompt, other = random_prompt(10), random_prompt(23, seed=1)
    ids = np.array(prompt, dtype=np.int32)
    poisoned = engine.submit(
        StepPlan(
            0,
            (Admission(0, ids, GREEDY), Admission(1, np.array(other, dtype=np.int32), GREEDY)),
            (PageUpdate(0, 0, (60, 61, 62)), PageUpdate(1, 0, (50, 51, 52, 53, 54, 55))),
            (ScheduledReq(0, 9, 1, 1), ScheduledReq(1, 0, 23, 1)),  # row 0 skips its prompt: reads NaN
            num_decode=1,
        )
    )
    expected = hf_generate(path, other, 3)
    assert poisoned.result().token_ids == [(-1,), (expected[0],)]
    later = StepPlan(1, (), (), (ScheduledReq(0, 10, 1, 1), ScheduledReq(1, 23, 1, 1)), num_decode=2)
    assert engine.submit(later).result().token_ids == [(-1,), (expected[1],)]
    outputs = generate(engine, config, [prompt, other], 20)  # on pages whose tails still hold NaN
    assert outputs == [hf_generate(path, prompt, 20), hf_generate(path, other, 20)]
    engine.close()


def test_sampled_tokens_do_not_depend_on_batch() -> None:
    path = tiny_model("qwen3")
    config = engine_config(path)
    engine = create_engine(config)
    params = [
        SamplingParams(temperature=0.8, seed=11),
        SamplingParams(temperature=0.0, seed=1),
        SamplingParams(temperature=1.0, top_k=20, seed=12),
        SamplingParams(temperature=1.3, top_p=0.8, seed=13),
        SamplingParams(temperature=1.0, top_k=40, top_p=0.9, min_p=0.05, seed=14),
    ]
    prompts = [random_prompt(6 + i, seed=i) for i in range(len(params))]
    together = generate(engine, config, prompts, 16, params, stagger=1)
    alone = [generate(engine, config, [p], 16, q, chunk=4)[0] for p, q in zip(prompts, params, strict=True)]
    assert together == alone
    other_seed = SamplingParams(temperature=0.8, seed=99)
    assert generate(engine, config, prompts[:1], 16, other_seed)[0] != alone[0]
    engine.close()


def test_unknown_backend_and_device() -> None:
    path = tiny_model("llama")
    with pytest.raises(ConfigError, match="fa,sdpa is not available on cpu"):
        create_engine(engine_config(path, prefill_backend="fa"))
    with pytest.raises(ConfigError, match="--device tpu"):
        create_engine(engine_config(path, device="tpu"))
