"""The two halves of a decoder layer: attention, and the feed-forward network or a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from minisgl.attention.base import StepContext
from minisgl.config.model import DenseMLP, ModelConfig, MoE, PagedKV
from minisgl.formats.base import DENSE, Shard, WeightSlot, experts_of
from minisgl.kernel.ops import Experts, KVSlots
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, Tensor, whole
from minisgl.layers.linear import GateUpLinear, Linear, QKVLinear, RowLinear


class Attention(Layer):
    """The attention block of decoder layer `layer`: projections, norm, rotation, cache, attention, output."""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden = config.layers[layer].attention, config.hidden_size
        assert isinstance(spec.cache, PagedKV)
        self._ops, self._layer, self._spec, self._eps = env.ops, layer, spec, config.rms_norm_eps
        self._head_dim = config.head_dim
        self.qkv_proj = QKVLinear(env, hidden, config.num_qo_heads, spec.cache.heads, config.head_dim, config.qkv_bias)
        q_size = config.num_qo_heads * config.head_dim
        self.o_proj = RowLinear(env, q_size, hidden, config.o_bias, "attention features")
        self._num_q, self._num_kv = self.qkv_proj.num_qo_heads, self.qkv_proj.num_kv_heads
        has_norm = "q_norm" in config.layers[layer].norms
        self.qk_norm = env.vector(self._num_q + self._num_kv, config.head_dim) if has_norm else None

    def forward(self, x: Tensor, norm: Tensor, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the layer's input → the new stream."""
        qkv = self.qkv_proj.forward(x, norm, self._eps).view(x.shape[0], -1, self._head_dim)
        cache = step.kv.layer(self._layer)
        rope, slots = step.ropes[self._spec.rope_index], KVSlots(*cache, step.slots)
        q = self._ops.norm_rope_store(qkv, self.qk_norm, self._eps, rope, slots)
        out = step.backend.forward(q, cache, self._spec, step.metadata)
        return self.o_proj.forward(out.reshape(x.shape[0], -1), x)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.qkv_proj.weights(prefix)
        yield from self.o_proj.weights(f"{prefix}o_proj.")
        if self.qk_norm is not None:
            yield whole(f"{prefix}q_norm.weight", self.qk_norm[: self._num_q])
            yield whole(f"{prefix}k_norm.weight", self.qk_norm[self._num_q :])

    def cpu_spec(self) -> CpuSpec | None:
        qkv, o, spec = self.qkv_proj.cpu_spec(), self.o_proj.cpu_spec(), self._spec
        is_plain = (spec.scale, spec.softcap, spec.sinks, spec.rope_index) == (None, None, False, 0)
        return qkv and o and CpuSpec(qkv.matrices + o.matrices, (self.qk_norm,), spec.window) if is_plain else None


class GatedMLP(Layer):
    """down(activation(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, env: LayerEnv, hidden_size: int, spec: DenseMLP, eps: float) -> None:
        self._eps, inner = eps, spec.intermediate_size
        self.gate_up_proj = GateUpLinear(env, hidden_size, inner, spec.bias, spec.activation)
        self.down_proj = RowLinear(env, inner, hidden_size, spec.bias, "intermediate features")

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input → the new stream."""
        return self.down_proj.forward(self.gate_up_proj.forward(x, norm, self._eps), x)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate_up_proj.weights(prefix)
        yield from self.down_proj.weights(f"{prefix}down_proj.")

    def cpu_spec(self) -> CpuSpec | None:
        gate_up, down = self.gate_up_proj.cpu_spec(), self.down_proj.cpu_spec()
        return gate_up and down and CpuSpec(gate_up.matrices + down.matrices)


class SparseMLP(Layer):
    """Mixture of experts: each token goes through its `num_experts_per_tok` most probable experts.

    Every rank holds a share of every expert's features, so that ranks stay balanced whatever the router does.
    """

    def __init__(self, env: LayerEnv, hidden_size: int, spec: MoE, eps: float) -> None:
        self._ops, self._comm, self._format, self._eps = env.ops, env.comm, env.format, eps
        self._spec, self._hidden = spec, hidden_size
        self._share = env.share(spec.intermediate_size, "features of an expert")
        router = spec.num_experts, hidden_size  # on every rank, and exact: small errors would choose other experts
        self.gate = Linear(replace(env, format=DENSE), router, {"": Shard(router, (0, spec.num_experts))})
        shapes = (spec.num_experts, 2 * self._share, hidden_size), (spec.num_experts, hidden_size, self._share)
        self._gate_up, self._down = (env.format.create(shape, env.dtype, env.device) for shape in shapes)
        self._experts: Experts | None = None

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input → the new stream."""
        assert self._experts is not None
        hidden = self._ops.rms_norm(x, norm, self._eps)
        part = self._experts(hidden, self.gate.matrix.apply(hidden))
        return self._comm.all_reduce(x.add_(part) if self._comm.rank == 0 else part)

    def pack(self) -> None:
        super().pack()
        self._experts = self._format.experts(self._ops, self._gate_up, self._down, self._spec)
        self._gate_up = self._down = {}

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate.weights(f"{prefix}gate.")
        slots, shape = self._format.slots, (self._spec.intermediate_size, self._hidden)
        mine = (self._comm.rank * self._share, (self._comm.rank + 1) * self._share)
        stacks = (list(experts_of(stack, self._spec.num_experts)) for stack in (self._gate_up, self._down))
        for i, (gate_up, down) in enumerate(zip(*stacks, strict=True)):
            expert = f"{prefix}experts.{i}."
            yield from slots(f"{expert}gate_proj.", gate_up, Shard(shape, mine))
            yield from slots(f"{expert}up_proj.", gate_up, Shard(shape, mine, at=self._share))
            yield from slots(f"{expert}down_proj.", down, Shard(shape[::-1], (0, self._hidden), mine))
