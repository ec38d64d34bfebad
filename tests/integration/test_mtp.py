"""Heads for multi-token prediction: their drafts are what the formula gives with transformers' layers, and the output
is the same with and without them."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from minisgl.config.args import parse_args
from minisgl.config.draft import read_head
from minisgl.config.families import read_model_config
from minisgl.config.resolve import prepare
from minisgl.config.runtime import EngineConfig, SchedulerConfig
from minisgl.core import ReqOutput, SamplingParams, StepResult
from minisgl.engine.draft import add_drafter
from minisgl.engine.engine import create_engine
from minisgl.errors import ConfigError
from minisgl.kernel.ops import TorchMatrix
from minisgl.kernel.packed import Grouped
from minisgl.layers.base import CpuSpec
from minisgl.llm import LLM
from minisgl.models import heads
from minisgl.scheduler.plan import Planned
from minisgl.scheduler.planner import Planner
from tests.driver import CPU_KERNELS, engine_config
from tests.models import random_prompt, tiny_model

NUM_DRAFTS = 3
PARAMS = [
    SamplingParams(max_tokens=30, temperature=0.0, seed=0, ignore_eos=True),
    SamplingParams(max_tokens=25, temperature=0.8, seed=5, ignore_eos=True, frequency_penalty=0.5),
    SamplingParams(max_tokens=7, temperature=0.0, seed=1, ignore_eos=True, logprobs=1),
]
SAMPLED = SamplingParams(max_tokens=60, temperature=0.3, seed=4)
SETUPS: dict[str, dict[str, Any]] = {"layer by layer": {}, "whole steps": CPU_KERNELS}


class Head(nn.Module):
    """DeepSeek-V3's, with the names of Qwen3-Next's checkpoints."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = Qwen3RMSNorm(hidden, eps), Qwen3RMSNorm(hidden, eps)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, 0)])
        self.norm = Qwen3RMSNorm(hidden, eps)

    def drafts(self, model: Any, ids: list[int], num: int) -> list[int]:
        """What may follow `ids`, token by token; the last of them is not in the model's cache yet."""
        embed, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        states = list(model.model(torch.tensor([ids[:-1]])).last_hidden_state[0])
        following, found = ids[1:], []
        for _ in range(num):
            embedded = self.pre_fc_norm_embedding(embed(torch.tensor(following)))
            x = self.fc(torch.cat((embedded, self.pre_fc_norm_hidden(torch.stack(states))), -1))[None]
            length = x.shape[1]
            mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
            angles = model.model.rotary_emb(x, torch.arange(length)[None])
            out = self.norm(self.layers[0](x, attention_mask=mask, position_embeddings=angles))
            found.append(int(lm_head(out[0, -1]).argmax()))
            states, following = [*states, out[0, -1]], [*following, found[-1]]
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Head]:
    """A checkpoint with a head, and both for transformers."""
    source, path = tiny_model("qwen3"), tmp_path_factory.mktemp("mtp") / "model"
    shutil.copytree(source, path)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    torch.manual_seed(3)
    head = Head(model.config)
    for parameter in head.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    weights = load_file(path / "model.safetensors") | {f"mtp.{k}": v for k, v in head.state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))
    return path, model.eval(), head.eval()


Drafts = list[tuple[list[int], list[int]]]


def generate(
    path: Path, speculate: str, breaks: bool = False, create: Callable[[EngineConfig], Any] = create_engine,
    draft_model: Path | None = None, ahead: int = 0, **kernels: Any,
) -> tuple[list[list[int]], Drafts]:  # fmt: skip
    """The output of each request; and of each step the drafts of the first one, with the tokens that they follow.
    breaks: the head fails, each time; ahead: so many steps are planned before the result of one is looked at."""
    model = read_model_config(path, mtp=speculate == "mtp")
    kernels = {"draft_len": NUM_DRAFTS if speculate in ("mtp", "model", "eagle", "dflash") else 0, **kernels}
    if draft_model is not None:
        second = read_head(draft_model, model)
        model = second or replace(model, second=(str(draft_model), read_model_config(draft_model)))
    config = engine_config(path, page_size=4, num_pages=256, model=model, **kernels)
    if model.states:
        config = replace(config, num_snapshots=12)
    engine = create(config)
    if breaks:
        engine.steps.propose = Mock(side_effect=RuntimeError("the head is broken"))
    planning = SchedulerConfig(
        4, 16, config.max_seq_len, 256, 4, 1, integrity_fatal=True, speculate=speculate, draft_len=NUM_DRAFTS
    )
    graphs = 64 * ahead  # steps follow where they may be captured
    states = {"has_states": bool(model.states), "num_snapshots": config.num_snapshots}
    planner = Planner(replace(planning, cuda_graph_max_bs=graphs, **states))
    told: list[list[int]] = [[] for _ in PARAMS]
    drafts: list[tuple[list[int], list[int]]] = []
    for uid, params in enumerate(PARAMS):
        planner.add(uid, random_prompt(21 + 9 * uid, seed=uid), params)
    req, submitted, num_following = planner.reqs[0], deque[tuple[Planned, Any]](), 0
    while not planner.is_idle:
        next_one = planner.plan()
        if next_one is not None:
            submitted.append((next_one, engine.submit(next_one.plan)))
            num_following += any(share.follows for share in next_one.plan.reqs)
        if len(submitted) <= ahead and next_one is not None:
            continue
        planned, handle = submitted.popleft()
        result = handle.result()
        for output in planner.retire(result):
            told[output.req.uid] += output.token_ids
        if req in planned.reqs and (draft := result.drafts.get(planned.reqs.index(req))):
            drafts.append((list(req.tokens), draft))
    engine.close()
    assert breaks or speculate == "off" or (num_following > 3) == (ahead > 0)
    return told, drafts


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("setup", SETUPS)
def test_drafts_are_the_heads_and_change_nothing(made: tuple[Path, Any, Head], setup: str, ahead: int) -> None:
    """Also where a step is planned before it is known how far the one before gets."""
    path, model, head = made
    told, drafts = generate(path, "mtp", ahead=ahead, **SETUPS[setup])
    assert told == generate(path, "off", **SETUPS[setup])[0]
    assert len(drafts) > 5
    with torch.no_grad():
        for tokens, draft in drafts:
            assert draft == head.drafts(model, tokens, len(draft)), f"after {len(tokens)} tokens"
    assert max(len(draft) for _, draft in drafts) == NUM_DRAFTS


def test_few_bits_choose_some_tokens_and_all_bits_one_of_these(
    made: tuple[Path, Any, Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, head = made
    pack = heads.Head._pack

    def narrow(self: heads.Head) -> None:
        """As on a GPU."""
        pack(self)
        assert isinstance(self.lm_head.matrix, TorchMatrix)
        self._narrowed = self._ops.packed_matrix([Grouped.of(self.lm_head.matrix.weight)], torch.float32)

    monkeypatch.setattr(heads.Head, "_pack", narrow)
    told, drafts = generate(path, "mtp")
    assert told == generate(path, "off")[0]
    right = [head.drafts(model, tokens, len(draft)) == draft for tokens, draft in drafts]
    assert len(right) > 5
    assert sum(right) > 0.9 * len(right)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_head_that_fails_costs_drafts_only(
    made: tuple[Path, Any, Head], caplog: pytest.LogCaptureFixture, ahead: int
) -> None:
    told, drafts = generate(made[0], "mtp", breaks=True, ahead=ahead)
    assert told == generate(made[0], "off")[0] and not drafts
    assert [record.message for record in caplog.records] == ["there are no more drafts: their drafter has failed"]


def test_a_head_that_is_not_there(made: tuple[Path, Any, Head], tmp_path: Path) -> None:
    shutil.copytree(made[0], path := tmp_path / "model")
    shutil.copy(tiny_model("qwen3") / "model.safetensors", path)
    with pytest.raises(ConfigError, match=r"missing: mtp\.fc\.weight"):
        generate(path, "mtp")
    args = ["--model", str(tiny_model("qwen3")), "--device", "cpu", "--speculate", "mtp"]
    with pytest.raises(ConfigError, match=r"--speculate mtp: .* has no head for it; choose ngram, or off"):
        prepare(parse_args(args, {}))


def test_by_default_a_head_is_used_where_the_files_have_it(made: tuple[Path, Any, Head], tmp_path: Path) -> None:
    def chosen(*flags: str) -> tuple[str, bool]:
        config = prepare(parse_args(["--model", str(path), "--device", "cpu", *flags], {}))
        return config.scheduler.speculate, bool(config.engine.model.mtp)

    shutil.copytree(made[0], path := tmp_path / "model")
    stored = load_file(path / "model.safetensors")
    assert chosen() == chosen("--speculate", "mtp") == ("mtp", True)
    assert chosen("--speculate", "off") == ("off", False)
    assert chosen("--draft-model", str(tiny_model("qwen3"))) == ("model", False)
    for other in ("mtp.fc.weight_scale", "mtp.embed_tokens.weight"):
        save_file({**stored, other: torch.ones(1)}, path / "model.safetensors")
        assert chosen() == ("off", False)
    of_head = {name: stored[name] for name in stored if name.startswith("mtp.")}
    save_file(of_head, path / "mtp.safetensors")  # which nobody reads
    save_file({name: stored[name] for name in stored if name not in of_head}, path / "model.safetensors")
    assert chosen() == ("off", False)
    save_file({name: stored[name] for name in stored if name != "mtp.fc.weight"}, path / "model.safetensors")
    assert chosen() == ("off", False)
    (path / "model.safetensors").write_bytes(b"version https://git-lfs")
    assert chosen() == ("off", False), "what is wrong with the file is for those to say who load it"
    (path / "model.safetensors").unlink()
    assert chosen("--dummy-weight") == ("mtp", True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_built_in_model_says_two_tokens_and_more_in_a_step(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """By default."""
    steps, retire = list[int](), Planner.retire

    def counting(planner: Planner, result: StepResult) -> list[ReqOutput]:
        steps.append(result.step_id)
        return retire(planner, result)

    monkeypatch.setattr(Planner, "retire", counting)
    told: dict[str, list[int]] = {}
    num_steps: dict[str, int] = {}
    for speculate, flags in {"off": {"speculate": "off"}, "mtp": {}}.items():
        steps.clear()
        with LLM(device="cpu", dtype=dtype, **flags) as llm:
            (output,) = llm.chat(
                [[{"role": "user", "content": "What is continuous batching?"}]], SAMPLED, progress=False
            )
            told[speculate], num_steps[speculate] = list(output.token_ids), len(steps)
    assert told["mtp"] == told["off"]
    assert num_steps["off"] >= len(told["off"]) > 2 * num_steps["mtp"]


def test_a_decode_step_in_which_nobody_wants_a_draft_does_without_the_head() -> None:
    """But what a step computes of a prompt is always read: others share it."""
    steps, ops = Mock(shard=Mock(head=Mock(spec=heads.Head))), Mock()
    steps.shard.config.model.second, steps.shard.head.cpu_spec.return_value = None, CpuSpec(numbers=(1, 2))
    add_drafter(steps, Mock(), ops, 1)
    batch = Mock(**{"index.rows": [0, 1]})
    for is_decode, most, is_read in ((True, 0, False), (True, 2, True), (False, 0, True), (False, 2, True)):
        batch.attention.is_decode = is_decode
        told = steps.propose(batch, Mock(), Mock(), most)
        assert (told is not None) == ops.module.draft.called == is_read
        ops.module.draft.reset_mock()


@pytest.mark.parametrize("setup", SETUPS)
def test_models_with_states(setup: str) -> None:
    """Whose states are those before a draft again, and see what was right of it once more."""
    path = tiny_model("qwen3_5_text", mtp_num_hidden_layers=1)
    kernels = {**SETUPS[setup], "dummy_weight": True}
    told, drafts = generate(path, "mtp", **kernels)
    assert told == generate(path, "off", **kernels)[0] and len(drafts) > 5
