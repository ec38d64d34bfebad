"""DFlash's heads: their drafts are those of the published formula in plain torch, and the output is the same with and
without them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from minisgl.attention.base import StepContext
from minisgl.config.args import parse_args
from minisgl.config.draft import read_head
from minisgl.config.families import read_model_config
from minisgl.config.resolve import prepare
from minisgl.config.runtime import SchedulerConfig
from minisgl.core import SamplingParams
from minisgl.engine.engine import create_engine
from minisgl.errors import ConfigError
from minisgl.models import heads
from minisgl.scheduler.planner import Planner
from tests.driver import engine_config
from tests.integration.test_captured import Engine, Graphs, graphs
from tests.integration.test_eagle import (
    HEADS,
    NUM_LAYERS,
    OPTIONS,
    WORDS,
    check_outputs,
    on_gpus,
    refused,
    served,
    target,
)
from tests.integration.test_mtp import NUM_DRAFTS, SETUPS, generate
from tests.models import VOCAB_SIZE, random_prompt

__all__ = ["graphs", "served"]  # fixtures
Tensor = torch.Tensor
Drafts = list[tuple[list[int], list[int]]]  # with the tokens that they follow

HIDDEN, INNER, EPS, THETA = 64, 80, 1e-6, 10_000.0
Q_HEADS, KV_HEADS = HEADS["num_attention_heads"], HEADS["num_key_value_heads"]


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x: [tokens, heads, features], of which i turns with i + features / 2."""
    angles = positions[:, None] / THETA ** (torch.arange(0, x.shape[2], 2) / x.shape[2])
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class BlockHead:
    """As section 4 of arXiv 2602.06036 describes it, without a cache: all of the context is computed each time."""

    def __init__(
        self, layer_ids: Sequence[int] = (1, 4, 6), num_layers: int = 2, vocab_size: int = VOCAB_SIZE, dim: int = 16
    ) -> None:
        self.layer_ids, self.num_layers, self.mask = list(layer_ids), num_layers, 5
        self.vocab_size, self.dim = vocab_size, dim
        shapes: dict[str, tuple[int, ...]] = {
            "fc": (HIDDEN, len(layer_ids) * HIDDEN), "hidden_norm": (HIDDEN,), "norm": (HIDDEN,)
        }  # fmt: skip
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (Q_HEADS * dim, HIDDEN), "self_attn.k_proj": (KV_HEADS * dim, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * dim, HIDDEN), "self_attn.o_proj": (HIDDEN, Q_HEADS * dim),
            "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,),
            "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
        }  # fmt: skip
        shapes |= {f"layers.{i}.{name}": shape for i in range(num_layers) for name, shape in of_layer.items()}
        generator = torch.Generator().manual_seed(3)
        self.weights = {
            name: torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1) for name, shape in shapes.items()
        }

    def hidden(self, context: Tensor, block: Tensor) -> Tensor:
        """context: [tokens, layer_ids * HIDDEN], of the model; block: [places, HIDDEN], embeddings → of each place."""
        w, positions = self.weights, torch.arange(len(context) + len(block))
        context, x = normed(context @ w["fc"].T, w["hidden_norm"]), block
        for i in range(self.num_layers):
            of = {name.removeprefix(f"layers.{i}."): weight for name, weight in w.items()}
            inputs = normed(x, of["input_layernorm"])
            both = torch.cat((context, inputs))
            q = normed((inputs @ of["self_attn.q_proj"].T).view(-1, Q_HEADS, self.dim), of["self_attn.q_norm"])
            k = normed((both @ of["self_attn.k_proj"].T).view(-1, KV_HEADS, self.dim), of["self_attn.k_norm"])
            v = (both @ of["self_attn.v_proj"].T).view(-1, KV_HEADS, self.dim)
            q, k = rotated(q, positions[len(context) :]), rotated(k, positions)
            k, v = (each.repeat_interleave(Q_HEADS // KV_HEADS, 1) for each in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / self.dim**0.5
            out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)  # no mask: a block sees all of itself
            x = x + out.flatten(1) @ of["self_attn.o_proj"].T
            inputs = normed(x, of["post_attention_layernorm"])
            gated = F.silu(inputs @ of["mlp.gate_proj"].T) * (inputs @ of["mlp.up_proj"].T)
            x = x + gated @ of["mlp.down_proj"].T
        return normed(x, w["norm"])

    def context(self, model: Any, ids: list[int]) -> Tensor:
        """What the model's layers say of each token: [tokens, layer_ids * HIDDEN]."""
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return torch.cat([states[i + 1][0] for i in self.layer_ids], -1)

    def logits(self, model: Any, context: Tensor, last: int, num: int) -> Tensor:
        """[num, vocab_size]: of tokens behind the last one, of which the context knows nothing yet."""
        block = model.get_input_embeddings()(torch.tensor([last, *[self.mask] * num])).detach()
        return model.get_output_embeddings()(self.hidden(context, block)[1:])

    def drafts(self, model: Any, ids: list[int], num: int) -> list[int]:
        with torch.no_grad():
            return self.logits(model, self.context(model, ids[:-1]), ids[-1], num).argmax(-1).tolist()

    def save(self, path: Path, drop: Sequence[str] = (), more: dict[str, Tensor] | None = None, **changes: Any) -> Path:
        """As they are published. drop: what begins with these; changes: of the configuration."""
        path.mkdir()
        config = {
            "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": HIDDEN, **HEADS,
            "head_dim": self.dim, "intermediate_size": INNER, "num_hidden_layers": self.num_layers,
            "vocab_size": self.vocab_size,
            "num_target_layers": NUM_LAYERS, "block_size": 16, "rms_norm_eps": EPS, "rope_theta": THETA,
            "max_position_embeddings": 512, "hidden_act": "silu", "attention_bias": False, "rope_scaling": None,
            "sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * self.num_layers,
            "tie_word_embeddings": False,
            "dflash_config": {"mask_token_id": self.mask, "target_layer_ids": self.layer_ids},
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        tensors = {f"{k}.weight": v.clone() for k, v in self.weights.items() if not k.startswith(tuple(drop))}
        save_file({**tensors, **(more or {})}, path / "model.safetensors")
        return path


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3, many layers": ("qwen3", {"num_layers": 3, "layer_ids": (0, 3)}),
    "qwen3_moe, one layer": ("qwen3_moe", {"num_layers": 1, "layer_ids": (5, 3)}),
}


def assert_told(path: Path, head: BlockHead, drafts: Drafts) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    assert len(drafts) > 5
    for tokens, draft in drafts:
        assert draft == head.drafts(model, tokens, len(draft)), f"after {len(tokens)} tokens"


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", CASES)
def test_drafts_are_the_heads_and_change_nothing(case: str, setup: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    path, head = target(family), BlockHead(**options)
    told, drafts = generate(path, "dflash", draft_model=head.save(tmp_path / "head"), **SETUPS[setup])
    assert told == generate(path, "off", **SETUPS[setup])[0]
    assert max(len(draft) for _, draft in drafts) == NUM_DRAFTS
    assert_told(path, head, drafts)


def run(path: Path, head: Path, abort_after: int = 1 << 30, **options: Any) -> tuple[dict[int, list[int]], Drafts]:
    """Outputs of requests by uid, and all drafts. Two run at once, one of which ends early; when they are done, another
    goes on behind the first one's prompt and some of its output, which the prefix cache has. abort_after: so many steps
    the first one is aborted."""
    told = read_head(head, read_model_config(path))
    assert told is not None
    config = engine_config(path, page_size=4, num_pages=128, model=told, draft_len=5, **options)
    engine = create_engine(config)
    how: dict[str, Any] = {"speculate": "dflash", "draft_len": 5, "step_costs": (0.02, 0.0), "integrity_fatal": True}
    planner = Planner(SchedulerConfig(4, 16, config.max_seq_len, 128, 4, 1, **how))
    params = SamplingParams(max_tokens=24, temperature=0.0, seed=0, ignore_eos=True)
    outputs, drafts, num_steps, prompt = dict[int, list[int]](), Drafts(), 0, random_prompt(22, seed=1)
    for batch in ((0, 1), (2,)):
        for uid in batch:
            ids = {0: prompt, 1: random_prompt(9, seed=2), 2: [*prompt, *outputs.get(0, [])[:13]]}[uid]
            outputs[uid] = []
            assert not planner.add(uid, ids, params)
        while not planner.is_idle:
            planned = planner.plan()
            assert planned is not None
            result = engine.submit(planned.plan).result()
            for output in planner.retire(result):
                outputs[output.req.uid] += output.token_ids
                assert output.req.num_cached == 32 or output.req.uid < 2 or abort_after < 1 << 30
            drafts += [(list(planned.reqs[i].tokens), draft) for i, draft in result.drafts.items()]
            num_steps += 1
            if num_steps == abort_after:
                planner.abort(0)
    engine.close()
    return outputs, drafts


@pytest.mark.parametrize("setup", SETUPS)
def test_what_masks_were_is_never_read_as_context(setup: str, tmp_path: Path) -> None:
    """Nearly all drafts of a random head are wrong, and of several lengths; their places become those of other tokens,
    also of requests that find them in the prefix cache."""
    path, head = target("qwen3"), BlockHead()
    where = head.save(tmp_path / "head")
    outputs, drafts = run(path, where, **SETUPS[setup])
    assert {len(draft) for _, draft in drafts} >= {1, 2, 5}
    assert sum(tokens[:22] == random_prompt(22, seed=1) and len(tokens) > 34 for tokens, _ in drafts) > 5
    assert_told(path, head, drafts)
    for abort_after in (1, 3, 6):
        others, drafts = run(path, where, abort_after, **SETUPS[setup])
        assert others[1] == outputs[1] and outputs[0][: len(others[0])] == others[0] != outputs[0]
        assert_told(path, head, drafts)


def test_what_nobody_asks_for_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has as many blocks as there are requests that want a draft: none for prompts that go on."""
    num_reqs, num_blocks, blocks = list[int](), list[tuple[int, int]](), heads.Head._blocks

    def counting(self: heads.Head, first: Tensor, x: Tensor, step: StepContext, of_model: bool, mask: int) -> Tensor:
        if of_model:
            num_reqs.append(len(step.seqs.slots))
        else:
            num_blocks.append((num_reqs[-1], len(first)))
        return blocks(self, first, x, step, of_model, mask)

    monkeypatch.setattr(heads.Head, "_blocks", counting)
    path, head = target("qwen3"), BlockHead()
    assert_told(path, head, generate(path, "dflash", draft_model=head.save(tmp_path / "head"))[1])
    assert {*num_blocks} >= {(2, 1), (2, 2), (3, 2)}


def test_a_head_that_fails_costs_drafts_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, head = target("llama"), BlockHead().save(tmp_path / "head")
    told, drafts = generate(path, "dflash", breaks=True, draft_model=head)
    assert told == generate(path, "off")[0] and not drafts
    assert [record.message for record in caplog.records] == ["there are no more drafts: their drafter has failed"]


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    def saved(name: str, head: BlockHead | None = None, **changes: Any) -> Path:
        return (head or BlockHead()).save(tmp_path / name, **changes)

    def config(**changes: Any) -> dict[str, Any]:
        return {"dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 4, 6], **changes}}

    where = f"{tmp_path}/%s/config.json: "
    assert (
        refused(saved("wide", hidden_size=128))
        == where % "wide" + "hidden_size must be 64 in a head for this model, not 128"
    )
    assert refused(saved("words", vocab_size=300)).endswith("vocab_size must be 256 in a head for this model, not 300")
    assert refused(saved("deep", num_target_layers=9)).endswith(
        "num_target_layers must be 8 in a head for this model, not 9"
    )
    assert refused(saved("far", **config(target_layer_ids=[1, 8]))) == (
        where % "far" + "a head that reads behind layers [2, 9] of 8"
    )
    assert refused(saved("last", **config(target_layer_ids=[1, 7]))).endswith("reads behind layers [2, 8] of 8")
    assert refused(saved("maskless", **config(mask_token_id=None))) == (
        where % "maskless" + "dflash_config.mask_token_id must be a token of the model, not None"
    )
    assert refused(saved("masked", **config(mask_token_id=256))).endswith("must be a whole number, 0 to 255, not 256")
    assert refused(saved("short", block_size=1)).endswith("block_size must be a whole number of at least 2, not 1")
    kinds = ["full_attention", "sliding_attention"]
    sliding = saved("sliding", layer_types=kinds, sliding_window=16, use_sliding_window=True)
    assert refused(sliding) == f"--draft-model {sliding}: it has other sliding windows"
    good = saved("good")
    assert refused(good, "gemma3_text") == where % "good" + (
        "a DFlashDraftModel for Gemma3ForCausalLM (supported: LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM)"
    )
    assert refused(good, "llama", "--speculate", "ngram") == f"--draft-model {good}: not with --speculate ngram"
    assert "architecture not supported: DFlash2DraftModel" in refused(saved("2", architectures=["DFlash2DraftModel"]))


@pytest.mark.parametrize("name", ["fc", "hidden_norm", "layers.1.self_attn.k_norm", "layers.0.mlp.up_proj", "norm"])
def test_what_is_missing_is_named_before_weights_are_loaded(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    head = BlockHead().save(tmp_path / "head", drop=[f"{name}"])
    monkeypatch.setattr("minisgl.models.checkpoint._put", Mock(side_effect=AssertionError("a weight is loaded")))
    ours = f"model.{name}" if name.startswith(("layers", "norm")) else name
    with pytest.raises(
        ConfigError, match=rf"'{head} and .* do not fit its configuration; missing: head\.{re.escape(ours)}"
    ):
        generate(target("llama"), "dflash", draft_model=head)


def test_tensors_of_another_kind_of_head_are_refused(tmp_path: Path) -> None:
    head = BlockHead().save(tmp_path / "head", more={"candidate_selector.weight": torch.zeros(4, 4)})
    with pytest.raises(ConfigError, match=r"unexpected: head\.candidate_selector\.weight"):
        generate(target("llama"), "dflash", draft_model=head)


def test_a_draft_is_no_longer_than_a_block(tmp_path: Path) -> None:
    good = BlockHead().save(tmp_path / "good")
    for flags, block_size, expected in (((), 16, 7), (("--speculate-tokens", "20"), 16, 15), ((), 4, 3)):
        head = BlockHead().save(tmp_path / f"{block_size}{len(flags)}", block_size=block_size)
        config = on_gpus(head, *flags)
        assert (config.engine.draft_len, config.scheduler.speculate) == (expected, "dflash")
    assert config.engine.decode_backend == "triton" and config.engine.cuda_graph_max_bs > 0
    with pytest.raises(ConfigError, match=r"^heads and models that guess: not with the attention of sdpa; "):
        on_gpus(good, "--attn", "sdpa")
    prepare(parse_args(["--model", str(target("llama")), "--device", "cpu", "--draft-model", str(good)], {}))


@pytest.fixture(scope="module")
def trained(served: tuple[Path, list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that has seen what the model says."""
    head = BlockHead(vocab_size=WORDS)
    train(head, AutoModelForCausalLM.from_pretrained(served[0], attn_implementation="eager").eval(), served[1])
    return head.save(tmp_path_factory.mktemp("trained") / "head")


def train(head: BlockHead, model: Any, prompts: list[list[int]], num_steps: int = 400) -> None:
    texts = list[tuple[list[int], Tensor]]()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        (text,) = model.generate(ids, max_new_tokens=41, do_sample=False, eos_token_id=None, pad_token_id=0).tolist()
        texts.append((text, head.context(model, text)))
    for weight in head.weights.values():
        weight.requires_grad_()
    optimizer, generator = torch.optim.Adam(head.weights.values(), 3e-3), torch.Generator().manual_seed(0)
    for step in range(num_steps):
        text, context = texts[step % len(texts)]
        last = int(torch.randint(len(prompts[0]), len(text) - 8, (1,), generator=generator))
        loss = F.cross_entropy(head.logits(model, context[:last], text[last], 7), torch.tensor(text[last + 1 :][:7]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for weight in head.weights.values():
        weight.requires_grad_(False)


@pytest.mark.parametrize("kind", ["trained", "random"])
@pytest.mark.parametrize("options", OPTIONS)
def test_neither_schedules_nor_ranks_nor_rules_see_it(
    served: tuple[Path, list[list[int]]], trained: Path, kind: str, options: str, tmp_path: Path
) -> None:
    head = trained if kind == "trained" else BlockHead(vocab_size=WORDS).save(tmp_path / "head")
    check_outputs(served, head, kind, options)


@pytest.mark.parametrize("max_batch", [0, 64])
def test_it_tells_the_same_without_the_host(max_batch: int, graphs: list[Graphs], tmp_path: Path) -> None:
    """In the graphs of a GPU's engine."""
    path, head = target("qwen3"), BlockHead()
    where = head.save(tmp_path / "head")
    outputs, drafts = generate(path, "dflash", create=Engine, draft_model=where, cuda_graph_max_bs=max_batch)
    assert outputs == generate(path, "off")[0]
    assert drafts == generate(path, "dflash", draft_model=where)[1]
    assert_told(path, head, drafts)
    assert bool(graphs[-1].replayed) == (max_batch > 0)
