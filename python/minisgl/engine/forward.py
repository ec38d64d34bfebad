"""How a step's batch becomes logits on a CPU: layer by layer in torch's terms, or all at once in C++."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch

from minisgl.attention.base import AttentionBackend, StepContext
from minisgl.attention.cpu import CpuBackend
from minisgl.config.model import ModelConfig
from minisgl.engine.batch import Batch
from minisgl.kernel.cpu import CpuOps
from minisgl.kvcache.pool import KVPool
from minisgl.layers.mlp import GatedMLP
from minisgl.layers.rope import RotaryEmbedding
from minisgl.models.decoder import DecoderLayer, DecoderModel

Tensor = torch.Tensor


class Forward(Protocol):
    """One step at a time."""

    def __call__(self, batch: Batch) -> Tensor:
        """The logits of the tokens that sample: [n, vocab_size], valid until the next step."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Those of any tokens of the last step. tokens: [n] int64 → [n, vocab_size]."""


class LayerByLayer:
    """The readable path: the model's own modules, one after the other."""

    def __init__(self, model: DecoderModel, rope: RotaryEmbedding, kv: KVPool, backend: AttentionBackend) -> None:
        self._model, self._rope, self._kv, self._backend = model, rope, kv, backend
        self._hidden: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        metadata = self._backend.prepare(batch.attention)
        step = StepContext(batch.slots, self._rope(batch.positions), self._kv, self._backend, metadata)
        self._hidden = self._model.hidden(batch.input_ids, step)
        return self._model.logits(self._hidden, batch.logit_tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        return self._model.logits(self._hidden, tokens)


class WholeStep:
    """One call for all layers, which share their threads without returning to Python. Dense models on one rank."""

    def __init__(
        self, config: ModelConfig, model: DecoderModel, rope: RotaryEmbedding, kv: KVPool, ops: CpuOps, max_seq_len: int
    ) -> None:
        self._module, self._backend = ops.module, CpuBackend(ops)
        self._vocab_size, self._keep = config.vocab_size, (model, kv, ops)
        self._rotation = rope(torch.arange(max_seq_len + 1))
        self._logits = torch.empty(0, self._vocab_size)
        self._handle: int = self._module.create_model(
            ops.workers,
            config.num_qo_heads,
            config.rms_norm_eps,
            model.embed_tokens.matrix.handle,
            model.lm_head.matrix.handle,
            model.norm,
            kv.keys,
            kv.values,
        )
        weakref.finalize(self, self._module.destroy_model, self._handle)
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer)
            self._add(layer, config.sliding_window(index))

    @staticmethod
    def fits(model: DecoderModel) -> bool:
        """Whether all layers are dense."""
        return all(isinstance(layer, DecoderLayer) and isinstance(layer.mlp, GatedMLP) for layer in model.layers)

    def _add(self, layer: DecoderLayer, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(mlp, GatedMLP)
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        matrices = [value for linear in linears for value in (linear.matrix.handle, linear.bias)]
        norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.qk_norm)
        self._module.add_layer(self._handle, *matrices, *norms, window or 0)

    def __call__(self, batch: Batch) -> Tensor:
        num_logits = len(batch.input_ids) if batch.logit_tokens is None else len(batch.logit_tokens)
        if num_logits > len(self._logits):  # kept, since new memory costs a fault for each page
            self._logits = torch.empty(num_logits, self._vocab_size)
        logits = self._logits[:num_logits]
        metadata = self._backend.prepare(batch.attention)
        self._module.forward(
            self._handle,
            batch.input_ids,
            batch.positions,
            batch.slots,
            *metadata,
            self._rotation.cos,
            self._rotation.sin,
            batch.logit_tokens,
            logits,
        )
        return logits

    def logits(self, tokens: Tensor) -> Tensor:
        logits = torch.empty(len(tokens), self._vocab_size)
        self._module.more_logits(self._handle, tokens, logits)
        return logits
