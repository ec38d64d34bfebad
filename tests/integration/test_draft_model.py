"""A second model that guesses: what it says, that it changes nothing, and which ones are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minisgl.config.args import parse_args
from minisgl.config.device import step_costs
from minisgl.config.draft import with_draft
from minisgl.config.families import read_model_config
from minisgl.config.locate import DEMO_MODEL
from minisgl.config.resolve import ModelFiles, prepare, resolve
from minisgl.config.runtime import ServerConfig
from minisgl.core import ReqOutput, SamplingParams, StepResult
from minisgl.errors import ConfigError
from minisgl.llm import LLM
from minisgl.scheduler.planner import Planner
from tests.integration.test_captured import Engine, Graphs, graphs
from tests.integration.test_mtp import NUM_DRAFTS, SETUPS, Drafts, generate
from tests.models import tiny_model
from tests.unit.test_resolve import GPUS

__all__ = ["graphs"]  # a fixture
SAMPLED = SamplingParams(max_tokens=60, temperature=0.3, seed=4)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_5_text"])
def test_a_model_that_guesses_for_itself_is_right(family: str, setup: str) -> None:
    """Also for a model with states, for which another one guesses: it must have none."""
    path = tiny_model(family)
    second = tiny_model("llama") if family == "qwen3_5_text" else path
    expected = generate(path, "off", **SETUPS[setup])[0]
    told, drafts = generate(path, "model", draft_model=second, **SETUPS[setup])
    assert told == expected
    assert len(drafts) > 5 and max(len(draft) for _, draft in drafts) == NUM_DRAFTS
    if second == path:
        for tokens, draft in drafts:
            known = len(tokens) - 21
            rest = expected[0][known : known + len(draft)]
            assert draft[: len(rest)] == rest, f"after {known} tokens"


@pytest.mark.parametrize("setup", SETUPS)
def test_what_it_guesses_is_what_transformers_has_it_say(setup: str) -> None:
    path, second = tiny_model("qwen3"), tiny_model("llama")
    told, drafts = generate(path, "model", draft_model=second, **SETUPS[setup])
    assert told == generate(path, "off", **SETUPS[setup])[0]
    assert_said_by(second, drafts)


def assert_said_by(path: Path, drafts: Drafts) -> None:
    """Each draft is what transformers has the model say."""
    assert len(drafts) > 5
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for tokens, draft in drafts:
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([tokens]), max_new_tokens=len(draft), do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert whole[0, len(tokens) :].tolist() == draft, f"after {len(tokens)} tokens"


@pytest.mark.parametrize("max_batch", [0, 64])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_it_guesses_the_same_without_the_host(family: str, max_batch: int, graphs: list[Graphs]) -> None:
    """In the graphs of a GPU's engine, with attention of its own."""
    path, second = tiny_model(family), tiny_model("llama")
    outputs, drafts = generate(path, "model", create=Engine, draft_model=second, cuda_graph_max_bs=max_batch)
    expected = generate(path, "model", draft_model=second)
    assert outputs == expected[0] == generate(path, "off")[0]
    assert drafts == expected[1] and len(drafts) > 5
    assert bool(graphs[-1].replayed) == (max_batch > 0)


def refused(*flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(parse_args(["--model", str(tiny_model("qwen3")), *flags], {}))
    return str(error.value)


def test_what_cannot_guess_is_refused_by_name(tmp_path: Path) -> None:
    cpu = "--device", "cpu"
    assert refused(*cpu, "--draft-model", "/nowhere").startswith("--draft-model /nowhere: ")
    other = tiny_model("qwen3", vocab_size=512)
    assert refused(*cpu, "--draft-model", str(other)).startswith(
        f"--draft-model {other}: its vocabulary (512 tokens) is not"
    )
    hybrid = tiny_model("qwen3_5_text")
    assert refused(*cpu, "--draft-model", str(hybrid)) == f"--draft-model {hybrid}: it has recurrent states"
    second = tiny_model("llama")
    both = refused(*cpu, "--draft-model", str(second), "--speculate", "ngram")
    assert both == f"--draft-model {second}: not with --speculate ngram"


def test_on_gpus_it_is_taken_with_attention_of_its_own(tmp_path: Path) -> None:
    """With other heads than the model's, if its layers are alike, and the attention is there for it."""
    path, second = tiny_model("qwen3"), tiny_model("llama")

    def on_gpus(draft_model: Path, *flags: str) -> ServerConfig:
        args = parse_args(["--model", str(path), "--draft-model", str(draft_model), *flags], {})
        args, model = with_draft(args, path, read_model_config(path), "cuda")
        return resolve(args, ModelFiles(path, model, {}), GPUS)

    config = on_gpus(second)
    assert config.scheduler.speculate == "model" and config.engine.model.second is not None
    assert config.engine.model.head_dim != config.engine.model.second[1].head_dim
    alone = step_costs(replace(config.engine, model=replace(config.engine.model, second=None)))
    assert step_costs(config.engine)[1] > alone[1]  # what it reads costs a step that drafts
    assert step_costs(config.engine)[1] > 1 + config.engine.draft_len, "each of its passes is a step of a tiny model"
    with pytest.raises(ConfigError, match="not with the attention of sdpa"):
        on_gpus(second, "--attn", "sdpa")
    with pytest.raises(ConfigError, match="only a model whose layers have caches alike"):
        on_gpus(tiny_model("gemma4_text"))
    odd = tiny_model("qwen3", head_dim=24)
    with pytest.raises(ConfigError, match=r"triton does not compute head_dim 24 \(of --draft-model\)"):
        on_gpus(odd, "--attn", "cuda")


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, path := tmp_path / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    words: Any = tokenizer["model"]["vocab"]
    first, second = list(words)[300:302]
    words[first], words[second] = words[second], words[first]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"--draft-model .*: its vocabulary \(\d+ tokens\) is not that of "):
        prepare(parse_args(["--device", "cpu", "--draft-model", str(path)], {}))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_built_in_model_takes_fewer_steps(tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, retire = list[int](), Planner.retire

    def counting(planner: Planner, result: StepResult) -> list[ReqOutput]:
        steps.append(result.step_id)
        return retire(planner, result)

    monkeypatch.setattr(Planner, "retire", counting)
    told: list[list[int]] = []
    counts: list[int] = []
    shape: dict[str, Any] = {"device": "cpu", "dtype": "float32", "tensor_parallel_size": tp_size, "max_seq_len": 512}
    chat = [[{"role": "user", "content": "What is continuous batching?"}]]
    for options in ({"speculate": "off"}, {"draft_model": str(DEMO_MODEL)}):
        steps.clear()
        with LLM(**shape, **options) as llm:
            (output,) = llm.chat(chat, SAMPLED, progress=False)
            told.append(list(output.token_ids))
            counts.append(len(steps))
    assert told[0] == told[1]
    assert counts[0] >= len(told[0]) and counts[0] > 1.5 * counts[1]
