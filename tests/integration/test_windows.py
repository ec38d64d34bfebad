"""Layers whose windows slide give back their pages: contexts far beyond the window, with pages for little more than the
window, give the tokens of transformers in every schedule; and what is behind a window is never read."""

import multiprocessing as mp
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.config.families import read_model_config
from minisgl.config.model import PagedKV
from minisgl.config.runtime import EngineConfig, SchedulerConfig
from minisgl.core import SamplingParams
from minisgl.engine.engine import create_engine
from minisgl.scheduler.integrity import check_integrity
from minisgl.scheduler.planner import Planner
from tests.driver import CPU_KERNELS, engine_config
from tests.models import hf_greedy, random_prompt, tiny_model

NUM_TOKENS = 64
FEW = 20  # of ranks, which wait for each other in each step: more than windows, as prompts are
WINDOW = {"sliding_window": 11}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3_text": {},
    "gpt_oss": {},
    "gemma4_text": {},  # layers that have others' keys and values, and heads of two sizes
    "gemma2": {},
    "olmo3": {"sliding_window": 13},
    "mistral": WINDOW,  # all layers have windows
    "lfm3": {},  # and states, which are found at snapshots alone
}
LONG = random_prompt(150, seed=9)
PROMPTS = [random_prompt(5, seed=5), random_prompt(60, seed=6), LONG, random_prompt(33, seed=7)]


def check(family: str, prompts: list[list[int]], outputs: list[list[int]], num_tokens: int = NUM_TOKENS) -> None:
    """They are what transformers generates."""
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == num_tokens
        assert output == hf_greedy(tiny_model(family, **FAMILIES[family]), prompt, output), family


def configs(family: str, num_window_pages: int, **fields: Any) -> tuple[EngineConfig, SchedulerConfig]:
    """Steps of 24 tokens, in pages of 4."""
    path = tiny_model(family, **FAMILIES[family])
    states = {"num_snapshots": 16} if read_model_config(path).states else {}
    sizes = {"page_size": 4, "num_pages": 400, "max_running_requests": 4, "max_prefill_length": 24}
    config = engine_config(path, **sizes, **states, **fields)
    config = replace(config, window=config.model.window, num_window_pages=num_window_pages)
    pages = {"window": config.window, "num_window_pages": num_window_pages, "has_states": bool(states), **states}
    planning = SchedulerConfig(4, 24, 512, 400, 4, check_integrity=1, integrity_fatal=True, **pages)
    return config, planning


class Server:
    """A planner and an engine. spoils: before each step, window pages that nobody has become NaN."""

    def __init__(self, config: EngineConfig, planning: SchedulerConfig, rank: int = 0, spoils: bool = False) -> None:
        self.engine, self.planner, self._spoils = create_engine(config, rank), Planner(planning), spoils
        specs = enumerate(config.model.layers)
        own = [(i, spec.attention) for i, spec in specs if spec.attention.source is None and spec.attention.window]
        self._layers, self.most = [i for i, spec in own if isinstance(spec.cache, PagedKV)], 0
        self._size, self._device = planning.page_size, config.device
        assert self._layers

    def generate(self, prompts: list[list[int]], num_tokens: int = NUM_TOKENS) -> tuple[list[list[int]], list[int]]:
        """Tokens, and how many tokens of each prompt were cached."""
        params = SamplingParams(temperature=0.0, seed=0, ignore_eos=True, max_tokens=num_tokens)
        outputs, cached, handles = [list[int]() for _ in prompts], [0] * len(prompts), list[Any]()
        for uid, prompt in enumerate(prompts):
            assert not self.planner.add(uid, prompt, params)
        while not self.planner.is_idle:
            if (planned := self.planner.plan()) is not None:
                if self._spoils:
                    self.spoil()
                handles.append(self.engine.submit(planned.plan))
            while len(handles) > (planned is not None and not self._spoils):
                for output in self.planner.retire(handles.pop(0).result()):
                    assert output.error is None
                    outputs[output.req.uid] += output.token_ids
                    cached[output.req.uid] = output.req.num_cached
            check_integrity(self.planner)
        return outputs, cached

    @torch.inference_mode()
    def spoil(self) -> None:
        windows = self.planner.pages.windows
        self.most = max(self.most, sum(count > 0 for count in windows.num_users))
        unused = windows.unused if self.planner.config.cache_type == "naive" else ()  # which nobody will find
        free = torch.tensor([*windows.allocator.free_list, *unused], dtype=torch.int64)
        slots = (free[:, None] * self._size + torch.arange(self._size)).flatten().to(self._device)
        for layer in self._layers:
            for kept in self.engine.steps.kv.layer(layer):
                kept[slots] = torch.nan
        if self._device == "cuda":
            torch.cuda.synchronize()  # the engine has a stream of its own


@pytest.mark.parametrize("kernels", ["torch", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_long_contexts(family: str, kernels: str) -> None:
    """With pages for the windows of less than all requests at once: some are sent back, and go on. Both kinds of caches
    with each family, and with each way to compute: they take turns."""
    cache_type = ("radix", "naive")[([*FAMILIES].index(family) + (kernels == "torch")) % 2]
    config, planning = configs(family, 24, **CPU_KERNELS if kernels == "kernels" else {})
    num_snapshots = planning.num_snapshots if cache_type == "radix" else 0
    planning = replace(planning, cache_type=cache_type, num_snapshots=num_snapshots)
    server = Server(config, planning, spoils=True)
    try:
        outputs, _ = server.generate(PROMPTS)
        check(family, PROMPTS, outputs)
        assert server.most <= 24 < len(LONG) // 4, "the pages would have been enough for all"
    finally:
        server.engine.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_window_pages", [16, 400])
def test_cached_prefixes(family: str, num_window_pages: int) -> None:
    """Of what the cache has, it is gone on where the window before is there; and all of a prompt can be read again."""
    server = Server(*configs(family, num_window_pages, **CPU_KERNELS))
    try:
        (first, *_), _ = server.generate([LONG])
        branch, output, found = LONG[:101] + random_prompt(9, seed=2), first, list[int]()
        for turn in range(4):
            more = random_prompt(20, seed=1), random_prompt(5, seed=3)
            prompt = [LONG + output + more[0], LONG, branch, branch + output + more[1]][turn]
            (output,), (cached,) = server.generate([prompt])
            check(family, [prompt], [output])
            found.append(cached)
        # Pages of 4; where there are states, snapshots: 8 tokens before a prompt's end, where prompts part, 64 further.
        ends, middles = ((204, 164), [140, 0]) if family == "lfm3" else ((212, 172), [148, 100])
        assert found[0] == ends[0], "the last window is gone"
        assert found[3] == ends[1], "what was read again is not cached"
        assert found[1:3] == (middles if num_window_pages == 400 else [0, 0])
    finally:
        server.engine.close()


def run_rank(rank: int, setups: list[tuple[EngineConfig, SchedulerConfig]], results: Any) -> None:
    for i, (config, planning) in enumerate(setups):
        server = Server(config, planning, rank)
        results.put((i, server.generate(PROMPTS, FEW)[0]))
        server.engine.close()


def test_two_ranks(tmp_path: Path) -> None:
    families = ["gemma3_text", "gpt_oss", "gemma4_text"]
    context = mp.get_context("spawn")
    results, fields = context.Queue(), {"tp_size": 2, **CPU_KERNELS, "num_threads": 1}
    setups = [configs(family, 24, init_method=f"file://{tmp_path}/{family}", **fields) for family in families]
    ranks = [context.Process(target=run_rank, args=(rank, setups, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        for _ in range(2 * len(families)):
            i, outputs = results.get(timeout=120)
            check(families[i], PROMPTS, outputs, FEW)
    finally:
        for rank in ranks:
            rank.join(20)
            rank.kill()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [0, 4])
@pytest.mark.parametrize("backends", ["triton", "cuda"])
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "mistral"])
def test_on_a_gpu(family: str, backends: str, graphs: int) -> None:
    """By Triton's kernels in float32 the tokens of transformers; by ours in bfloat16 those of the same kernels and the
    same steps (so there are pages for all) where all pages are kept."""
    is_wide = backends == "triton"
    dtype = "float32" if is_wide else "bfloat16"
    fields = {"device": "cuda", "dtype": dtype, "prefill_backend": "triton", "decode_backend": backends}
    fields |= {"moe_backend": "triton", "cuda_graph_max_bs": graphs}
    config, planning = configs(family, 24, **fields)
    if not is_wide:
        path = tiny_model(family, **{**FAMILIES[family], "head_dim": 64})
        config = replace(config, model_path=str(path), model=read_model_config(path))
        planning = replace(planning, cache_type="naive", num_window_pages=config.pages_for(0)[1])
    if not is_wide:
        server = Server(replace(config, window=0), replace(planning, window=0))
        expected = server.generate(PROMPTS)[0]
        server.engine.close()
    server = Server(config, planning, spoils=True)
    try:
        outputs = server.generate(PROMPTS)[0]
        if is_wide:
            check(family, PROMPTS, outputs)
        else:
            assert outputs == expected
    finally:
        server.engine.close()
