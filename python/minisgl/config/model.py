"""A model's shape, read from `config.json` alone: explicit numbers, no framework objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base and scaling (`default`, `linear`, `dynamic`, `yarn`, `llama3`)."""

    theta: float
    type: str = "default"
    max_position: int = 0  # of the unscaled model (`original_max_position_embeddings` where given)
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts: how many, how many per token, and which layers have them."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    layers: tuple[bool, ...]  # per layer: sparse or dense


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only transformer."""

    architecture: str  # "LlamaForCausalLM", …
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int  # longest sequence that the model is made for, scaling included
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # per layer; None: full attention
    moe: MoEConfig | None = None
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
