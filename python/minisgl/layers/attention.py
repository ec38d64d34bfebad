"""The two halves of a decoder layer: attention, and the feed-forward network or a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from minisgl.attention.base import StepContext
from minisgl.config.model import DenseMLP, ModelConfig, MoE, PagedKV
from minisgl.formats.base import DENSE, Shard, WeightSlot, experts_of
from minisgl.kernel.ops import Experts, KVSlots
from minisgl.layers.base import CpuSpec, Layer, LayerEnv, Tensor, whole
from minisgl.layers.linear import GateUpLinear, Linear, QKVLinear, RowLinear, reordered
from minisgl.layers.rope import head_order


class Attention(Layer):
    """The attention block of decoder layer `layer`: projections, norm, rotation, cache, attention, output."""

    name = "self_attn"

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden, norms = config.layers[layer].attention, config.hidden_size, config.layers[layer].norms
        assert isinstance(spec.cache, PagedKV)
        self._ops, self._layer, self._spec, self._eps = env.ops, layer, spec, config.rms_norm_eps
        self._head_dim, self._comm, self._offset = config.head_dim, env.comm, config.norm_offset
        order = head_order(config.ropes[spec.rope_index], config.head_dim)
        heads, self._rope = (config.num_qo_heads, spec.cache.heads, config.head_dim), config.ropes[spec.rope_index]
        self.qkv_proj = QKVLinear(env, hidden, *heads, config.qkv_bias, order, spec.gated)
        q_size = config.num_qo_heads * config.head_dim
        self.o_proj = RowLinear(env, q_size, hidden, config.o_bias, "attention features")
        self._num_q, self._num_kv = self.qkv_proj.num_qo_heads, self.qkv_proj.num_kv_heads
        self.sinks = torch.empty(self._num_q, device=env.device) if spec.sinks else None
        self._is_wide, self._order = norms.of_heads == "all", order
        assert order is None or not self._is_wide, "weights of its norms would have to be reordered, too"
        self.qk_norm = env.vector(self._num_q + self._num_kv, config.head_dim) if norms.of_heads else None

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None, step: StepContext) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input; after: of its output →
        the new stream."""
        qkv, gate = self.qkv_proj.forward(x, norm, self._eps).view(x.shape[0], -1, self._head_dim), None
        if self._spec.gated:
            gate, qkv = qkv[:, : self._num_q], qkv[:, self._num_q :].contiguous()
        cache = step.kv.layer(self._layer)
        rope, slots = step.ropes[self._spec.rope_index], KVSlots(*cache, step.slots)
        if self._is_wide:
            self._norm_of_all(qkv)
        q = self._ops.norm_rope_store(qkv, None if self._is_wide else self.qk_norm, self._eps, rope, slots)
        if self._rope.query_beta:
            turns = (step.positions / self._rope.max_position).floor()
            q = q * (1 + self._rope.query_beta * turns.log1p()).to(q.dtype)[:, None, None]
        out = step.backend.forward(q, cache, self._spec, step.metadata, self.sinks)
        if gate is not None:
            out = out * gate.sigmoid()
        return self.o_proj.forward(out.reshape(x.shape[0], -1), x, after, self._eps)

    def _norm_of_all(self, qkv: Tensor) -> None:
        """Root-mean-square norm, in place, of all queries' features at once, and of all keys', those of other ranks
        included. qkv: [num_tokens, heads, head_dim]."""
        assert self.qk_norm is not None
        counts = self._num_q, self._num_kv
        parts = qkv[:, : counts[0]], qkv[:, counts[0] : sum(counts)]
        sums = self._comm.all_reduce(torch.stack([part.float().square().sum((1, 2)) for part in parts], -1))
        for i, (part, weight) in enumerate(zip(parts, self.qk_norm.split_with_sizes(counts), strict=True)):
            size = counts[i] * self._head_dim * self._comm.size
            scale = torch.rsqrt(sums[:, i, None, None] / size + self._eps)
            part.copy_((part.float() * scale).to(part.dtype) * weight)

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.qkv_proj.weights(prefix)
        yield from self.o_proj.weights(f"{prefix}o_proj.")
        if self.sinks is not None:
            shard = self.qkv_proj.shard("q_proj.")
            num_heads, first, end = (rows // self._head_dim for rows in (shard.shape[0], *shard.rows))
            yield WeightSlot(f"{prefix}sinks", (num_heads,), self.sinks, (first, end))
        if self.qk_norm is None:
            return
        for kind, target in (("q", self.qk_norm[: self._num_q]), ("k", self.qk_norm[self._num_q :])):
            name = f"{prefix}{kind}_norm.weight"
            if self._is_wide:
                shard = self.qkv_proj.shard(f"{kind}_proj.")
                yield WeightSlot(name, shard.shape[:1], target.view(-1), shard.rows)
            else:
                slot = whole(name, target, self._offset)
                yield slot if self._order is None else reordered(slot, self._order)

    def cpu_spec(self) -> CpuSpec | None:
        qkv, o, spec = self.qkv_proj.cpu_spec(), self.o_proj.cpu_spec(), self._spec
        if qkv is None or o is None or self._rope.query_beta:
            return None
        scores = spec.window or 0, spec.rope_index, spec.softcap or 0.0, self.sinks
        return CpuSpec(qkv.matrices + o.matrices, "attention", (self.qk_norm, self._is_wide, *scores, spec.gated))


class GatedMLP(Layer):
    """down(activation(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, env: LayerEnv, hidden_size: int, spec: DenseMLP, eps: float) -> None:
        self._eps, self._comm, self._spec, inner = eps, env.comm, spec, spec.intermediate_size
        self.gate_up_proj = GateUpLinear(env, hidden_size, inner, spec.bias, spec.activation)
        self.down_proj = RowLinear(env, inner, hidden_size, spec.bias, "intermediate features")

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None = None) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input; after: of its output →
        the new stream."""
        return self.down_proj.forward(self.gate_up_proj.forward(x, norm, self._eps), x, after, self._eps)

    def part(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden], without residual → this rank's part of the sum."""
        return self.down_proj.matrix.apply(self.gate_up_proj.forward(hidden, None, self._eps))

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate_up_proj.weights(prefix)
        yield from self.down_proj.weights(f"{prefix}down_proj.")

    def cpu_spec(self) -> CpuSpec | None:
        gate_up, down = self.gate_up_proj.cpu_spec(), self.down_proj.cpu_spec()
        if gate_up is None or down is None or self._spec.activation not in ("silu", "gelu_tanh"):
            return None
        return CpuSpec(gate_up.matrices + down.matrices, "mlp", (self._spec.activation,))


class SparseMLP(Layer):
    """Mixture of experts: each token goes through its `num_experts_per_tok` most probable experts.

    Every rank holds a share of every expert's features, so that ranks stay balanced whatever the router does.
    """

    def __init__(self, env: LayerEnv, hidden_size: int, spec: MoE, eps: float) -> None:
        self._ops, self._comm, self._format, self._eps = env.ops, env.comm, env.format, eps
        self._spec, self._hidden = spec, hidden_size
        self._share = env.share(spec.intermediate_size, "features of an expert")
        router = spec.num_experts, hidden_size  # on every rank, and exact: small errors would choose other experts
        self.gate = Linear(replace(env, format=DENSE), router, {"": Shard(router, (0, spec.num_experts))}, spec.bias)
        shapes = (spec.num_experts, 2 * self._share, hidden_size), (spec.num_experts, hidden_size, self._share)
        self._gate_up, self._down = (env.format.create(shape, env.dtype, env.device) for shape in shapes)
        self._experts: Experts | None = None
        sizes = (2 * self._share, hidden_size) if spec.bias else ()
        self.biases = [env.vector(spec.num_experts, size) for size in sizes]  # of gate and up, and of down
        self.shared_expert: GatedMLP | None = None
        self.shared_expert_gate: Linear | None = None
        if spec.shared_size:
            self.shared_expert = GatedMLP(env, hidden_size, DenseMLP(spec.shared_size, False, spec.activation), eps)
            shard = Shard((1, hidden_size), (0, 1))
            self.shared_expert_gate = Linear(replace(env, format=DENSE), (1, hidden_size), {"": shard})

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None = None) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input → the new stream."""
        assert self._experts is not None
        assert norm is not None
        assert after is None, "no family has such a norm"
        hidden = self._ops.rms_norm(x, norm, self._eps)
        part = self._experts(hidden, self.gate.matrix.apply(hidden, self.gate.bias))
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            part += self.shared_expert.part(hidden) * self.shared_expert_gate.matrix.apply(hidden).sigmoid_()
        return self._comm.all_reduce(x.add_(part) if self._comm.rank == 0 else part)

    def pack(self) -> None:
        super().pack()
        if self.biases and self._comm.rank:
            self.biases[1].zero_()  # rank 0 adds it
        stacks, biases = (self._gate_up, self._down), (self.biases[0], self.biases[1]) if self.biases else None
        self._experts = self._format.experts(self._ops, *stacks, self._spec, biases)
        self._gate_up = self._down = {}

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate.weights(f"{prefix}gate.")
        slots, shape = self._format.slots, (self._spec.intermediate_size, self._hidden)
        mine = (self._comm.rank * self._share, (self._comm.rank + 1) * self._share)
        shards = {"gate_proj.": Shard(shape, mine), "up_proj.": Shard(shape, mine, at=self._share)}
        if self.biases:
            both, twice, rows = 2 * shape[0], (2 * mine[0], 2 * mine[1]), (0, self._spec.num_experts)
            shards = {"gate_up_proj.": Shard((both, self._hidden), twice)}
            name, sizes = f"{prefix}experts.gate_up_proj_bias", (rows[1], both)
            yield WeightSlot(name, sizes, self.biases[0], rows, twice, lambda x: apart(x.t()).t())
            yield WeightSlot(f"{prefix}experts.down_proj_bias", (rows[1], self._hidden), self.biases[1], rows)
        stacks = (list(experts_of(stack, self._spec.num_experts)) for stack in (self._gate_up, self._down))
        for i, (gate_up, down) in enumerate(zip(*stacks, strict=True)):
            expert = f"{prefix}experts.{i}."
            found = [slot for name, shard in shards.items() for slot in slots(f"{expert}{name}", gate_up, shard)]
            found += slots(f"{expert}down_proj.", down, Shard(shape[::-1], (0, self._hidden), mine))
            yield from map(turned, found) if self.biases else found
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            yield from self.shared_expert.weights(f"{prefix}shared_expert.")
            yield from self.shared_expert_gate.weights(f"{prefix}shared_expert_gate.")


def apart(x: Tensor) -> Tensor:
    """Rows of gate and up, which take turns, one below the other."""
    return torch.cat((x[::2], x[1::2]))


def turned(slot: WeightSlot) -> WeightSlot:
    """A slot of an expert's weight, of a checkpoint where rows of gate and up take turns, and that has it as [in, out]
    unless it is packed."""
    arrange, change = apart if ".gate_up_proj" in slot.name else Tensor.contiguous, slot.transform
    if not slot.name.endswith(".weight"):
        return replace(slot, transform=lambda x: arrange(x if change is None else change(x)))
    rows, shape = slot.cols or (0, slot.shape[1]), slot.shape[::-1]
    return replace(slot, shape=shape, rows=rows, cols=slot.rows, transform=lambda x: arrange(x.t()))
