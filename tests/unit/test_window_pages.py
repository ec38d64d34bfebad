"""Layers whose windows slide have pages of their own: how many, and what becomes of them."""

from dataclasses import replace
from typing import Any

import pytest

from minisgl.config.model import AttentionSpec, DenseMLP, LayerSpec, ModelConfig, PagedKV, RopeConfig
from minisgl.config.runtime import EngineConfig, SchedulerConfig
from minisgl.core import SamplingParams, StepResult
from minisgl.message.messages import StatsMsg
from minisgl.scheduler.integrity import check_integrity
from minisgl.scheduler.observer import Status
from minisgl.scheduler.planner import Planner
from tests.simulator import SimulatedEngine, expected_output

GIB = 2**30


def gemma(num_layers: int = 26, heads: int = 1, dim: int = 256, window: int = 512, every: int = 6) -> ModelConfig:
    """Gemma 3's shapes, by default that of 1B: every sixth layer sees all."""
    kv = PagedKV(heads, dim, dim)
    specs = [AttentionSpec(kv, None if every and (i + 1) % every == 0 else window) for i in range(num_layers)]
    layers = tuple(LayerSpec(spec, DenseMLP(6912)) for spec in specs)
    fields: dict[str, Any] = {"architecture": "Gemma3ForCausalLM", "vocab_size": 262144, "hidden_size": 1152}
    return ModelConfig(**fields, num_qo_heads=4, head_dim=dim, rms_norm_eps=1e-6, max_position=32768, layers=layers,
                       ropes=(RopeConfig(1e6),), dtype="bfloat16")  # fmt: skip


def engine(model: ModelConfig, window: int | None = None, **changes: Any) -> EngineConfig:
    fields: dict[str, Any] = {
        "model_path": "",
        "model": model,
        "dtype": "bfloat16",
        "device": "cuda",
        "tp_size": 1,
        "num_pages": 0,
        "page_size": 16,
        "max_running_requests": 256,
        "max_prefill_length": 8192,
        "max_seq_len": 32768,
        "prefill_backend": "triton",
        "decode_backend": "cuda",
        "num_threads": 1,
        "dummy_weight": True,
        "kv_cache_dtype": "bfloat16",
        "window": model.window if window is None else window,
    }
    return EngineConfig(**fields | changes)


GPT_OSS = gemma(24, 8, 64, 128, every=2)


@pytest.mark.parametrize("num_bytes", [4 * GIB, 16 * GIB, 100 * GIB])
@pytest.mark.parametrize(("model", "factor"), [(gemma(), 3.5), (GPT_OSS, 1.8)], ids=["gemma-3-1b", "gpt-oss-20b"])
def test_times_the_tokens_in_the_same_memory(model: ModelConfig, factor: float, num_bytes: int) -> None:
    config, plain = engine(model), engine(model, window=0)
    num_pages, num_window_pages = config.pages_for(num_bytes)
    assert 0.99 * num_bytes < config.kv_bytes(num_pages, num_window_pages) <= num_bytes
    assert num_pages >= factor * plain.pages_for(num_bytes)[0]
    assert plain.pages_for(num_bytes) == (num_bytes // plain.kv_bytes(1, 0), 0)


def most_running(config: EngineConfig, num_bytes: int, prompt_len: int) -> int:
    """Requests of so many tokens that run at once before one has to go back to the queue."""
    num_pages, num_window_pages = config.pages_for(num_bytes)
    pages = {"window": config.window, "num_window_pages": num_window_pages}
    planner, most = Planner(SchedulerConfig(256, 8192, 32768, num_pages, 16, **pages)), 0
    for uid in range(256):
        planner.add(uid, [uid] * prompt_len, SamplingParams(max_tokens=600, seed=0, ignore_eos=True))
    while not planner.num_retracted and (planned := planner.plan()) is not None:
        samples = [(7,) for share in planned.plan.reqs if share.num_samples]
        planner.retire(StepResult(planned.plan.step_id, samples))
        most = max(most, len(planner.running))
        if planner.running[0].num_tokens > prompt_len + 500:
            break
    return most


@pytest.mark.parametrize("prompt_len", [4_000, 14_000])
def test_three_times_the_requests(prompt_len: int) -> None:
    """The planner itself, in the same memory."""
    run, before = (most_running(engine(gemma(), window), 2 * GIB, prompt_len) for window in (512, 0))
    assert before > 2 and run >= 3 * before


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (gemma(), {}),
        (gemma(62, 16, 128, 1024), {"max_seq_len": 2048}),
        (gemma(48, 8, 256, 1024), {"max_prefill_length": 64, "max_running_requests": 4}),
        (gemma(26, 4, 256, 4096, every=2), {"max_seq_len": 8192}),
        (gemma(32, 8, 128, 4096, every=0), {}),  # no layer sees all
    ],
)
@pytest.mark.parametrize("num_bytes", [10_000_000, 300_000_000, 3 * GIB, 40 * GIB, 1000 * GIB])
def test_what_is_planned_fits_and_serves_one_request(
    model: ModelConfig, changes: dict[str, Any], num_bytes: int
) -> None:
    config = engine(model, **changes)
    num_pages, num_window_pages = config.pages_for(num_bytes)
    longest = config.max_seq_len // config.page_size
    assert config.kv_bytes(num_pages, num_window_pages) <= num_bytes
    assert num_pages >= min(longest, num_bytes // engine(model, window=0).kv_bytes(1, 0))
    alone = (config.window + min(config.max_prefill_length, config.max_seq_len)) // config.page_size + 2
    assert num_window_pages >= min(num_pages, alone)
    asked = replace(config, num_pages=longest)
    assert asked.pages_for(0)[0] == longest and min(longest, alone) <= asked.pages_for(0)[1] <= longest


CONFIG = SchedulerConfig(
    max_running_requests=4, max_prefill_length=16, max_seq_len=200, num_pages=200, page_size=4, window=11,
    num_window_pages=9, check_integrity=1,
)  # fmt: skip


class Driver:
    def __init__(self, config: SchedulerConfig = CONFIG) -> None:
        self.planner, self.engine, self.num_requests = Planner(config), SimulatedEngine(config), 0

    def generate(self, *prompts: list[int]) -> list[int]:
        """→ of each prompt, how many tokens were cached. Outputs must be the right ones."""
        begin, outputs, cached = self.num_requests, dict[int, list[int]](), dict[int, int]()
        for uid, prompt in enumerate(prompts, begin):
            self.planner.add(uid, prompt, SamplingParams(max_tokens=20, seed=0, ignore_eos=True))
        while not self.planner.is_idle:
            planned = self.planner.plan()
            assert planned is not None
            for output in self.planner.retire(self.engine.submit(planned.plan).result()):
                outputs.setdefault(output.req.uid, []).extend(output.token_ids)
                cached[output.req.uid] = output.req.num_cached
            check_integrity(self.planner)
        self.num_requests += len(prompts)
        for uid, prompt in enumerate(prompts, begin):
            assert outputs[uid] == expected_output(prompt, len(prompt) + 20, ())
        return [cached[uid] for uid in range(begin, self.num_requests)]


def test_a_long_context_takes_the_window_alone() -> None:
    """A request of 170 tokens runs where there are pages for 36, and the next turn finds all of it."""
    driver, prompt = Driver(), [*range(5, 155)]
    assert driver.generate(prompt) == [0]
    turn = prompt + expected_output(prompt, 170, ())
    assert driver.generate([*turn, 1, 2, 3]) == [168]
    assert driver.planner.num_retracted == 0


def test_what_is_read_again_is_found_again() -> None:
    """The window before a branch is gone: the branch reads all of it, and the one after finds it."""
    driver, prompt = Driver(), [*range(5, 105)]
    driver.generate(prompt)
    assert driver.generate([*prompt[:61], 1]) == [0]
    assert driver.generate([*prompt[:61], 2]) == [60]


def test_with_room_for_all_nothing_is_forgotten() -> None:
    driver, prompt = Driver(replace(CONFIG, num_window_pages=200)), [*range(5, 155)]
    driver.generate(prompt)
    assert driver.generate([*prompt[:61], 1], prompt) == [60, 148]


WITH_STATES = replace(CONFIG, has_states=True, num_snapshots=12, snapshot_tokens=8)


@pytest.mark.parametrize("num_window_pages", range(9, 17))
@pytest.mark.parametrize("num_others", [1, 5, 9, 20])
def test_a_snapshot_is_of_use_only_with_its_own_window(num_others: int, num_window_pages: int) -> None:
    """What came in between has taken the window before the last snapshot, but not the one at the end of what is known:
    the simulated device notices who goes on without."""
    driver, prompt = Driver(replace(WITH_STATES, num_window_pages=num_window_pages)), [*range(5, 105)]
    driver.generate(prompt, [*range(200, 200 + num_others)])
    driver.generate([*range(300, 300 + num_others)])
    assert driver.generate([*prompt, *expected_output(prompt, 120, ()), 1, 2, 3]) in ([0], [116])


def test_the_end_of_an_output_keeps_its_window() -> None:
    """The snapshot before, that it replaces, goes alone."""
    driver, prompt = Driver(replace(WITH_STATES, num_window_pages=20)), [*range(5, 105)]
    driver.generate(prompt)
    assert driver.generate([*prompt, *expected_output(prompt, 120, ()), 1, 2, 3]) == [116]


def test_snapshots_that_make_room_leave_windows_behind() -> None:
    driver, prompt = Driver(replace(WITH_STATES, num_window_pages=60, num_snapshots=1)), [*range(5, 105)]
    driver.generate(prompt)
    num_lent = len(driver.planner.pages.windows.lent)
    driver.planner.pages.free_slots.append(slot := driver.planner.pages.take_slot() or -1)
    assert slot >= 0 and not driver.planner.pages.snapshots
    assert len(driver.planner.pages.windows.lent) == num_lent


def test_several_long_requests_take_turns() -> None:
    driver = Driver(replace(CONFIG, num_window_pages=16))
    driver.generate(*([i, *range(5, 100 + i)] for i in range(4)))


def test_use_is_told_of_the_pages_that_are_scarcer() -> None:
    """Where pages of windows are few, they are used up while most of the others are free."""
    planner, status = Planner(replace(CONFIG, num_window_pages=14)), Status()
    status.attached(planner, lambda: None)
    planner.add(0, list(range(16)), SamplingParams(max_tokens=2, seed=0))
    planner.plan()
    pages, reply = planner.pages, status.reply(StatsMsg(1))
    near = 1 - pages.windows.num_free / 14
    assert near > 2 * (1 - pages.num_free / CONFIG.num_pages) > 0
    assert reply.num_used_pages / reply.num_pages == pytest.approx(near, abs=1 / CONFIG.num_pages)
    planner.abort(0)
    planner.retire(StepResult(0, [(1,)]))
    assert status.reply(StatsMsg(2)).num_used_pages == 0
