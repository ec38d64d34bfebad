"""Multi-head attention with grouped KV heads, optional biases, QK norm and sliding window."""

from __future__ import annotations

from collections.abc import Iterator

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig
from minisgl.kernel.ops import KVSlots
from minisgl.layers.base import Layer, LayerEnv, Tensor, WeightSlot, whole
from minisgl.layers.linear import QKVLinear, RowLinear


class Attention(Layer):
    """The attention block of decoder layer `layer`: projections, norm, rotation, cache, attention, output."""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self._ops, self._layer, self._eps = env.ops, layer, config.rms_norm_eps
        self._head_dim, self._window = config.head_dim, config.sliding_window(layer)
        self.qkv_proj = QKVLinear(
            env, config.hidden_size, config.num_qo_heads, config.num_kv_heads, config.head_dim, config.qkv_bias
        )
        q_size = config.num_qo_heads * config.head_dim
        self.o_proj = RowLinear(env, q_size, config.hidden_size, config.o_bias, "attention features")
        self._num_q, self._num_kv = self.qkv_proj.num_qo_heads, self.qkv_proj.num_kv_heads
        self.qk_norm = env.vector(self._num_q + self._num_kv, config.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, norm: Tensor, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the layer's input → the new stream."""
        qkv = self._ops.norm_linear(x, norm, self._eps, self.qkv_proj.matrix, self.qkv_proj.bias)
        cache = KVSlots(step.kv.k[self._layer], step.kv.v[self._layer], step.slots)
        qkv = qkv.view(x.shape[0], -1, self._head_dim)
        q = self._ops.qk_norm_rope_store(qkv, self.qk_norm, self._eps, step.rope, cache)
        out = step.backend.forward(q, cache.k, cache.v, self._window, step.metadata)
        projected: Tensor = self.o_proj(out.reshape(x.shape[0], -1), x)
        return projected

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.qkv_proj.weights(prefix)
        yield from self.o_proj.weights(f"{prefix}o_proj.")
        if self.qk_norm is not None:
            yield whole(f"{prefix}q_norm.weight", self.qk_norm[: self._num_q])
            yield whole(f"{prefix}k_norm.weight", self.qk_norm[self._num_q :])
