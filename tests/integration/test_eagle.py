"""EAGLE-3 heads: their drafts are those of the published formula with transformers' layers, and the output is the same
with and without them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from minisgl.config.args import parse_args
from minisgl.config.resolve import prepare
from minisgl.core import SamplingParams
from minisgl.errors import ConfigError
from minisgl.llm import LLM
from tests.integration.test_mtp import NUM_DRAFTS, PARAMS, SETUPS, generate
from tests.models import VOCAB_SIZE, random_prompt, tiny_model

NUM_LAYERS = 8
SHAPE = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
DRAFTED = torch.arange(3, VOCAB_SIZE, 2)  # tokens of the model that a head's vocabulary has


class Layer(nn.Module):
    """The only one of a head: projections read the next token's embedding beside the hidden state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LlamaAttention(config, 0)
        for name, heads in (("q_proj", config.num_attention_heads), *zip("kv", [config.num_key_value_heads] * 2)):
            setattr(self.self_attn, f"{name[0]}_proj", nn.Linear(2 * hidden, heads * config.head_dim, bias=False))
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

    def drafts(self, model: Any, ids: list[int], num: int) -> list[int]:
        """What may follow `ids`, token by token."""
        embed, states = model.get_input_embeddings(), self.states(model, ids[:-1])
        following, found = ids[1:], list[int]()
        for _ in range(num):
            x = self(states, embed(torch.tensor(following)))[-1]
            found.append(int(self.ids[self.logits(x).argmax()]))
            states, following = torch.cat((states, x[None])), [*following, found[-1]]
        return found

    def save(self, path: Path, is_torch: bool = False, drop: Sequence[str] = (), **changes: Any) -> Path:
        """As such heads are published. drop: what begins with these; changes: of the configuration."""
        path.mkdir()
        config = {
            **self.config.to_dict(),
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": len(self.ids),
        }
        config = {**config, "rope_theta": 10000.0, "norm_before_residual": self.before, **changes}
        config.pop("rope_parameters", None)
        (path / "config.json").write_text(json.dumps(config))
        tensors = {k: v.detach().clone() for k, v in self.state_dict().items() if not k.startswith(tuple(drop))}
        if len(self.ids) < VOCAB_SIZE:
            tensors["d2t"] = self.ids - torch.arange(len(self.ids))
            tensors["t2d"] = torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill_(0, self.ids, True)
        if is_torch:
            torch.save(tensors, path / "pytorch_model.bin")
        else:
            save_file(tensors, path / "model.safetensors")
        return path


def random_head(aux: Sequence[int] = (2, 4, 5), **options: Any) -> Head:
    torch.manual_seed(3)
    head = Head(aux, **options)
    for parameter in head.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return head.eval()


def target(family: str) -> Path:
    return tiny_model(family, num_hidden_layers=NUM_LAYERS)


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
