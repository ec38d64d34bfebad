"""EAGLE-3 heads: their drafts are those of the published formula with transformers' layers, and the output is the same
with and without them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from minisgl.config.args import parse_args
from minisgl.config.draft import read_head, with_draft
from minisgl.config.families import read_model_config
from minisgl.config.resolve import ModelFiles, prepare, resolve
from minisgl.config.runtime import ServerConfig
from minisgl.core import Grammar, SamplingParams
from minisgl.errors import ConfigError
from minisgl.llm import LLM
from tests.integration.test_captured import Engine, Graphs, graphs
from tests.integration.test_mtp import NUM_DRAFTS, SETUPS, generate
from tests.models import VOCAB_SIZE, random_prompt, tiny_model
from tests.tokenizers_fixture import make_words
from tests.unit.test_resolve import GPUS

__all__ = ["graphs"]  # a fixture

NUM_LAYERS = 8
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
SHAPE = {"hidden_size": 64, "intermediate_size": 80, **HEADS}
DRAFTED = torch.arange(3, VOCAB_SIZE, 2)  # tokens of the model that a head's vocabulary has


class Layer(nn.Module):
    """The only one of a head: projections read the next token's embedding beside the hidden state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LlamaAttention(config, 0)
        for name, heads in {"q": config.num_attention_heads, **dict.fromkeys("kv", config.num_key_value_heads)}.items():
            setattr(self.self_attn, f"{name}_proj", nn.Linear(2 * hidden, heads * config.head_dim, bias=False))
        self.mlp = LlamaMLP(config)
        self.hidden_norm, self.input_layernorm = LlamaRMSNorm(hidden, eps), LlamaRMSNorm(hidden, eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps)


class Head(nn.Module):
    """As the authors publish it (https://github.com/SafeAILab/EAGLE, `cnets.py`), in float32."""

    def __init__(self, aux: Sequence[int], ids: torch.Tensor = DRAFTED, before: bool = False, **more: Any) -> None:
        super().__init__()
        self.config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 1, "vocab_size": VOCAB_SIZE, **more})
        self.config._attn_implementation = "eager"
        hidden, self.aux, self.ids, self.before = self.config.hidden_size, aux, ids, before
        self.fc = nn.Linear(len(aux) * hidden, hidden, bias=False)
        self.midlayer = Layer(self.config)
        self.norm = LlamaRMSNorm(hidden, self.config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, len(ids), bias=False)
        self.rotary = LlamaRotaryEmbedding(self.config)

    def states(self, model: Any, ids: list[int]) -> torch.Tensor:
        """What is made of each token of `ids`: [tokens, hidden]."""
        with torch.no_grad():
            found = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return self.fc(torch.cat([found[i][0] for i in self.aux], -1))

    def forward(self, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        layer, length = self.midlayer, len(states)
        normed = layer.hidden_norm(states)
        both = torch.cat((layer.input_layernorm(embedded), normed), -1)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        angles = self.rotary(both, torch.arange(length)[None])
        x = (normed if self.before else states) + layer.self_attn(both, angles, mask)[0][0]
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(x))

    def drafts(self, model: Any, ids: list[int], num: int, embed: nn.Embedding | None = None) -> list[int]:
        """What may follow `ids`, token by token. embed: in place of the model's."""
        embed, states = embed or model.get_input_embeddings(), self.states(model, ids[:-1])
        following, found = ids[1:], list[int]()
        for _ in range(num):
            x = self(states, embed(torch.tensor(following)))[-1]
            found.append(int(self.ids[self.logits(x).argmax()]))
            states, following = torch.cat((states, x[None])), [*following, found[-1]]
        return found

    def save(
        self, path: Path, is_torch: bool = False, is_nested: bool = False, drop: Sequence[str] = (),
        more: dict[str, torch.Tensor] | None = None, **changes: Any,
    ) -> Path:  # fmt: skip
        """As such heads are published, which do not name a rotation, or as vLLM's tools save them (nested). drop: what
        begins with these; changes: of the configuration."""
        path.mkdir()
        inner = self.config.to_dict() | ({"rope_theta": 10000.0} if is_nested else {})
        inner.pop("rope_parameters", None)
        outer = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(self.ids)}
        outer |= {"norm_before_residual": self.before}
        if is_nested:
            outer |= {"architectures": ["Eagle3Speculator"], "transformer_layer_config": inner}
        (path / "config.json").write_text(json.dumps({**({} if is_nested else inner), **outer, **changes}))
        tensors = {k: v.detach().clone() for k, v in self.state_dict().items() if not k.startswith(tuple(drop))}
        if is_nested:
            tensors = {k.replace("midlayer.", "layers.0."): v for k, v in tensors.items()}
        if len(self.ids) < (size := self.config.vocab_size):
            tensors["d2t"] = self.ids - torch.arange(len(self.ids))
            tensors["t2d"] = torch.zeros(size, dtype=torch.bool).index_fill_(0, self.ids, True)
        if is_torch:
            torch.save(tensors, path / "pytorch_model.bin")
        else:
            save_file({**tensors, **(more or {})}, path / "model.safetensors")
        return path


def random_head(aux: Sequence[int] = (2, 4, 5), **options: Any) -> Head:
    torch.manual_seed(3)
    head = Head(aux, **options)
    for parameter in head.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return head.eval()


def target(family: str, **changes: Any) -> Path:
    """Whose attention has other heads than a head of `SHAPE`, unless `changes` say so."""
    return tiny_model(family, num_hidden_layers=NUM_LAYERS, **changes)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "as SpecForge trains them": ("llama", {}, {}),
    "for Qwen3, in a file of torch": ("qwen3", {}, {"is_torch": True}),
    "for experts": ("qwen3_moe", {}, {"architectures": ["Eagle3LlamaForCausalLM"]}),
    "layers named as SGLang does": (
        "llama", {"aux": (1, 3, 7)}, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 6]}},
    ),
    "layers named as vLLM does, normed first": (
        "qwen3", {"aux": (1, 3, 7), "before": True}, {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]},
    ),
    "as vLLM's tools save them": ("llama", {"before": True}, {"is_nested": True}),
    "all tokens": ("qwen3", {"ids": torch.arange(VOCAB_SIZE)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", CASES)
def test_drafts_are_the_heads_and_change_nothing(case: str, setup: str, tmp_path: Path) -> None:
    family, options, changes = CASES[case]
    path, head = target(family), random_head(**options)
    told, drafts = generate(path, "eagle", draft_model=head.save(tmp_path / "head", **changes), **SETUPS[setup])
    assert told == generate(path, "off", **SETUPS[setup])[0]
    assert len(drafts) > 5 and max(len(draft) for _, draft in drafts) == NUM_DRAFTS
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        for tokens, draft in drafts:
            assert draft == head.drafts(model, tokens, len(draft)), f"after {len(tokens)} tokens"


@pytest.mark.parametrize("setup", SETUPS)
def test_embedding_and_lm_head_are_the_heads_own_or_the_models(setup: str, tmp_path: Path) -> None:
    path, head = target("llama"), random_head(ids=torch.arange(VOCAB_SIZE))
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    head.lm_head.weight.data = model.lm_head.weight.data
    _, drafts = generate(path, "eagle", draft_model=head.save(tmp_path / "lacking", drop=["lm_head"]), **SETUPS[setup])
    own = {"embed_tokens.weight": torch.randn(VOCAB_SIZE, 64)}
    whole = head.save(tmp_path / "whole", more=own)
    _, others = generate(path, "eagle", draft_model=whole, **SETUPS[setup])
    assert len(drafts) > 5 and len(others) > 5
    with torch.no_grad():
        for tokens, draft in drafts:
            assert draft == head.drafts(model, tokens, len(draft)), f"after {len(tokens)} tokens"
        embed = nn.Embedding.from_pretrained(own["embed_tokens.weight"])
        for tokens, draft in others:
            assert draft == head.drafts(model, tokens, len(draft), embed), f"after {len(tokens)} tokens"


def refused(head: Path, family: str = "llama", *flags: str) -> str:
    with pytest.raises(ConfigError) as error:
        prepare(parse_args(["--model", str(target(family)), "--device", "cpu", "--draft-model", str(head), *flags], {}))
    assert str(error.value).startswith("--draft-model")
    return str(error.value).removeprefix("--draft-model: ")


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    def saved(name: str, **changes: Any) -> Path:
        return random_head().save(tmp_path / name, **changes)

    where = f"{tmp_path}/%s/config.json: "
    assert (
        refused(saved("wide", hidden_size=128))
        == where % "wide" + "hidden_size must be 64 in a head for this model, not 128"
    )
    assert refused(saved("words", vocab_size=300)).endswith("vocab_size must be 256 in a head for this model, not 300")
    assert refused(saved("deep", num_hidden_layers=2)).endswith("must be 1 in a head for this model, not 2")
    assert refused(saved("many", draft_vocab_size=300)).endswith("must be a whole number, 1 to 256, not 300")
    assert refused(saved("far", eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 8]})) == (
        where % "far" + "a head that reads behind layers [2, 9] of 8"
    )
    good = saved("good")
    assert refused(good, "gemma3_text") == where % "good" + (
        "a LlamaForCausalLMEagle3 for Gemma3ForCausalLM "
        "(supported: LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM)"
    )
    assert refused(good, "llama", "--speculate", "ngram") == f"--draft-model {good}: not with --speculate ngram"
    prepare(parse_args(["--model", str(target("llama")), "--device", "cpu", "--draft-model", str(good)], {}))
    with pytest.raises(ConfigError, match="architecture not supported: LlamaForCausalLMEagle3"):
        prepare(parse_args(["--model", str(good), "--device", "cpu"], {}))


def on_gpus(draft_model: Path, *flags: str) -> ServerConfig:
    """For a model with attention heads as in `SHAPE`."""
    path = target("llama", **HEADS)
    args = parse_args(["--model", str(path), "--draft-model", str(draft_model), *flags], {})
    args, model = with_draft(args, path, read_model_config(path), "cuda")
    return resolve(args, ModelFiles(path, model, {}), GPUS)


def test_on_gpus_it_is_taken_where_its_layer_is_like_the_models(tmp_path: Path) -> None:
    good = random_head().save(tmp_path / "good")
    config = on_gpus(good)
    assert (config.engine.device, config.engine.draft_len, config.scheduler.speculate) == ("cuda", 4, "eagle")
    assert config.engine.decode_backend == "triton" and config.engine.cuda_graph_max_bs > 0
    with pytest.raises(
        ConfigError, match=r"^heads and models that guess: not with the attention of sdpa; choose another"
    ):
        on_gpus(good, "--attn", "sdpa")
    few = {"num_attention_heads": 4}, {"num_key_value_heads": 2}, {"head_dim": 32}
    for other in (random_head(**heads).save(tmp_path / f"{i}") for i, heads in enumerate(few)):
        with pytest.raises(ConfigError) as error:
            on_gpus(other)
        assert str(error.value) == (
            f"--draft-model {other}: on GPUs so far only a head with the model's attention heads; "
            "choose another, or --device cpu"
        )


def test_a_head_that_names_no_rotation_has_its_own(tmp_path: Path) -> None:
    """With the default of LlamaConfig, whatever the model has."""
    model = read_model_config(target("llama"))
    model = replace(model, ropes=(replace(model.ropes[0], theta=500_000.0),))
    told = read_head(random_head(head_dim=32).save(tmp_path / "head"), model)
    assert told is not None
    assert len(told.mtp) == 1
    assert [rope.theta for rope in told.ropes] == [500_000.0, 10_000.0]
    assert told.mtp[0].attention.rope_index == 1


@pytest.mark.parametrize("name", ["fc.", "midlayer.hidden_norm", "midlayer.self_attn.k_proj", "norm.", "lm_head"])
def test_what_is_missing_is_named_before_weights_are_loaded(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    head = random_head().save(tmp_path / "head", drop=[name])
    monkeypatch.setattr("minisgl.models.checkpoint._put", Mock(side_effect=AssertionError("a weight is loaded")))
    ours = name.replace("midlayer.", "model.layers.0.").replace("norm.", "model.norm.", name == "norm.")
    with pytest.raises(
        ConfigError, match=rf"'{head} and .* do not fit its configuration; missing: head\.{re.escape(ours)}"
    ):
        generate(target("llama"), "eagle", draft_model=head)


WORDS = 320  # tokens of a model that has a tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A model with a tokenizer, of which a GPU takes heads of `SHAPE`; and prompts."""
    path = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(target("llama", vocab_size=WORDS, **HEADS), path)
    return make_words(path, WORDS), [random_prompt(20 + i, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def trained(served: tuple[Path, list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that has seen what the model says."""
    model, texts = AutoModelForCausalLM.from_pretrained(served[0], attn_implementation="eager").eval(), []
    for prompt in served[1]:
        ids = torch.tensor([prompt])
        (text,) = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
        texts.append(text[len(prompt) :].tolist())
    head = random_head(ids=torch.arange(WORDS), vocab_size=WORDS)
    train(head, model, served[1], texts)
    return head.save(tmp_path_factory.mktemp("trained") / "head", vocab_size=WORDS)


def train(head: Head, model: Any, prompts: list[list[int]], texts: list[list[int]]) -> None:
    """The head sees a hundred times what the model says after each prompt."""
    optimizer, inputs = torch.optim.Adam(head.parameters(), 3e-3), []
    for prompt, said in zip(prompts, texts, strict=True):
        text = torch.tensor(prompt + said)
        with torch.no_grad():
            states = model(text[None, :-2], output_hidden_states=True).hidden_states
            inputs.append((torch.cat([states[i][0] for i in head.aux], -1), text, len(prompt) - 2))
    for _ in range(100):
        for states, text, first in inputs:
            x = head(head.fc(states), model.get_input_embeddings()(text[1:-1]).detach())
            loss = nn.functional.cross_entropy(head.logits(x)[first:], text[first + 2 :])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def said(
    path: Path, prompts: list[list[int]], params: list[SamplingParams], **options: Any
) -> tuple[list[list[int]], float]:
    """Twice the same, the second time with all in the cache; and the share of drafted tokens that were right."""
    told, options = list[list[int]](), {"device": "cpu", "dtype": "float32", "max_seq_len": 128, **options}
    with pytest.MonkeyPatch.context() as patch:  # drafts of models so small would cost more than they bring
        patch.setattr("minisgl.config.resolve.step_costs", lambda _: (0.02, 0.0))
        llm = LLM(str(path), **options)
    with llm:
        for _ in range(2):
            told += [list(output.token_ids) for output in llm.generate(prompts, params, progress=False)]
        counts = llm.scheduler.planner.speculation
        return told, sum(counts.num_right.values()) / max(1, sum(counts.num_drafted.values()))


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "retraction": {"num_pages": 16, "page_size": 8},
    "small chunks, no cache": {"max_prefill_length": 7, "cache_type": "naive"},
    "tensor parallel": {"tensor_parallel_size": 2},
    "long drafts": {"speculate_tokens": 7, "page_size": 1},
}


def check_outputs(served: tuple[Path, list[list[int]]], head: Path, kind: str, options: str) -> None:
    """They are the same with drafts; those of a trained head are right now and then."""
    params = [
        SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, frequency_penalty=0.3),
        SamplingParams(max_tokens=40, temperature=0.7, seed=3),
        SamplingParams(max_tokens=40, temperature=0.0, grammar=Grammar("regex", "([a-z]{3} ){4}")),
    ]
    expected = said(*served, params)[0]
    told, share = said(*served, params, draft_model=str(head), **OPTIONS[options])
    assert told == expected
    assert share > 0.1 or kind == "random"


@pytest.mark.parametrize("kind", ["trained", "random"])
@pytest.mark.parametrize("options", OPTIONS)
def test_neither_schedules_nor_ranks_nor_rules_see_it(
    served: tuple[Path, list[list[int]]], trained: Path, kind: str, options: str, tmp_path: Path
) -> None:
    some = torch.arange(3, WORDS, 2)
    head = trained if kind == "trained" else random_head(ids=some, vocab_size=WORDS).save(tmp_path / "head")
    check_outputs(served, head, kind, options)


@pytest.mark.parametrize("max_batch", [0, 64])
def test_it_tells_the_same_without_the_host(max_batch: int, graphs: list[Graphs], tmp_path: Path) -> None:
    """In the graphs of a GPU's engine."""
    path, head = target("qwen3"), random_head().save(tmp_path / "head")
    outputs, drafts = generate(path, "eagle", create=Engine, draft_model=head, cuda_graph_max_bs=max_batch)
    expected = generate(path, "eagle", draft_model=head)
    assert outputs == expected[0] == generate(path, "off")[0]
    assert drafts == expected[1] and len(drafts) > 5
    assert bool(graphs[-1].replayed) == (max_batch > 0)
