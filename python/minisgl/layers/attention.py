"""The blocks of a decoder layer: attention, the feed-forward network or a mixture of experts, and in some families what
a layer gets of each token beside the residual stream, from a table that has some features for each layer."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from minisgl.attention.base import StepContext
from minisgl.config.model import DenseMLP, ModelConfig, MoE, PagedKV
from minisgl.formats.base import DENSE, Shard, WeightSlot, experts_of
from minisgl.kernel.activations import ACTIVATIONS
from minisgl.kernel.ops import Around, Experts, KVSlots
from minisgl.layers.base import Layer, LayerEnv, Tensor, whole
from minisgl.layers.linear import KV_HEADS, ColumnLinear, Linear, RowLinear, VocabTable, slots_of
from minisgl.layers.rope import head_order


class Attention(Layer):
    """The attention block of decoder layer `layer`: projections, norm, rotation, cache, attention, output."""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        spec, hidden, norms = config.layers[layer].attention, config.hidden_size, config.layers[layer].norms
        assert isinstance(spec.cache, PagedKV)
        dim, width = spec.cache.k_dim, hidden * (2 - (config.norms_residual is None))
        self._ops, self._layer, self._spec, self._eps, self._head_dim = env.ops, layer, spec, config.rms_norm_eps, dim
        mine, self._comm = env.share(config.num_qo_heads, "attention heads"), env.comm
        num_kv, size = spec.cache.heads if spec.source is None else 0, dim * (2 if spec.gated == "features" else 1)
        self._num_q, self._num_kv = len(mine), len(env.share(num_kv, KV_HEADS, True)) if num_kv else 0
        self._rope, self._is_wide = config.ropes[spec.rope_index], norms.of_heads == "all"
        order = head_order(self._rope, dim)
        assert order is None or not self._is_wide, "weights of its norms would have to be reordered, too"
        orders = dict[str, Tensor]()
        if order is not None or size > dim:  # gates, whose rows follow those of each query head, come first here
            features = torch.arange(dim) if order is None else order
            queries, *gates = torch.arange(self._num_q * size).view(self._num_q, -1, dim).unbind(1)
            orders["q_proj"] = torch.cat([part.flatten() for part in (*gates, queries[:, features])])
            orders["k_proj"] = torch.arange(self._num_kv * dim).view(-1, dim)[:, features].flatten()
        heads = dict.fromkeys(["gate_proj"] if spec.gated == "heads" else [], (config.num_qo_heads, 1))
        heads["q_proj"], orders["gate_proj"] = (config.num_qo_heads, size), torch.arange(self._num_q * dim) // dim
        heads |= {} if self._num_kv == 0 else dict.fromkeys(("k_proj", "v_proj"), (spec.cache.heads, dim))
        self.qkv_proj = ColumnLinear(env, width, heads, "attention heads", config.qkv_bias, orders=orders)
        self.o_proj = RowLinear(env, config.num_qo_heads * dim, hidden, config.o_bias, "attention features")
        self.qkv_proj.apart = self.o_proj.apart = isinstance(config.layers[layer].mlp, MoE)
        self._sinks = torch.empty(self._num_q, device=env.device) if spec.sinks else None
        self._qk_norm = env.vector(self._num_q + self._num_kv, dim) if norms.of_heads else None
        rows = mine.start, mine.stop
        self.slots = [] if self._sinks is None else [WeightSlot("sinks", (config.num_qo_heads,), self._sinks, rows)]
        targets = () if self._qk_norm is None else self._qk_norm.split_with_sizes((self._num_q, self._num_kv))
        for kind, target in zip("qk" if self._num_kv else "q", targets, strict=False):
            slot = whole(f"{kind}_norm.weight", target, config.norm_offset)
            if self._is_wide:
                shard = self.qkv_proj.shards[f"{kind}_proj."]
                slot = WeightSlot(slot.name, shard.shape[:1], target.view(-1), shard.rows)
            self.slots.append(replace(slot, order=order))
        numbers = self._qk_norm, self._is_wide, spec.window or 0, spec.rope_index, spec.softcap or 0.0, self._sinks
        if not (self._rope.query_beta or spec.value_norms or spec.source is not None):
            self.cpu_block = "attention", (*numbers, bool(spec.gated))

    def forward(
        self, x: Tensor, norm: Tensor | None, after: Tensor | None, step: StepContext, given: Tensor | None = None
    ) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input; after: of its output;
        given: what is projected, in place of the stream (twice as wide in EAGLE's heads) → the new stream."""
        late = self.o_proj.bias if after is None and given is None and len(x) >= self._ops.late_from else None
        if late is not None and norm is not None and self._comm.rank == 0:
            given, norm = self._ops.rms_norm(x, norm, self._eps, late), None
        q, gate = self.store(x if given is None else given, norm, step)
        cache = step.kv.layer(self._layer if self._spec.source is None else self._spec.source)
        out = step.backend.forward(q, cache, self._spec, step.metadata[self._spec.window is not None], self._sinks)
        out = (out if gate is None else out * gate.sigmoid()).reshape(len(x), -1)
        if late is not None and given is not None:
            return self._comm.all_reduce(self.o_proj.matrix.apply(out, Around(residual=x, apart=self.o_proj.apart)))
        return self.o_proj.forward(out, x, after, self._eps)

    def store(self, x: Tensor, norm: Tensor | None, step: StepContext) -> tuple[Tensor, Tensor | None]:
        """Put keys and values of what `norm` makes of x, [num_tokens, width], into the cache → queries, and gates."""
        qkv, gate = self.qkv_proj.project(x, norm, self._eps).view(len(x), -1, self._head_dim), None
        if self._spec.gated:
            gate, qkv = qkv[:, : self._num_q], qkv[:, self._num_q :]
        if self._spec.value_norms:
            values = qkv[:, self._num_q + self._num_kv :]
            values.copy_(self._ops.rms_norm(values, values.new_ones(self._head_dim), self._eps))
        if self._is_wide:
            self._norm_of_all(qkv)
        rope, qk_norm = step.ropes[self._spec.rope_index], None if self._is_wide else self._qk_norm
        if self._spec.source is None:
            slots = KVSlots(*step.kv.layer(self._layer), step.slots[self._spec.window is not None])
            q = self._ops.norm_rope_store(qkv, qk_norm, self._eps, rope, slots)
        else:
            q = rope.rotate(qkv if qk_norm is None else self._ops.rms_norm(qkv, qk_norm, self._eps))
        if self._rope.query_beta:
            turns = (step.positions / self._rope.max_position).floor()
            q = q * (1 + self._rope.query_beta * turns.log1p()).to(q.dtype)[:, None, None]
        return q, gate

    def _norm_of_all(self, qkv: Tensor) -> None:
        """Root-mean-square norm, in place, of all queries' features at once, and of all keys', those of other ranks
        included. qkv: [num_tokens, heads, head_dim]."""
        assert self._qk_norm is not None
        counts = self._num_q, self._num_kv
        parts = qkv[:, : counts[0]], qkv[:, counts[0] : sum(counts)]
        sums = self._comm.all_reduce(torch.stack([part.float().square().sum((1, 2)) for part in parts], -1))
        for i, (part, weight) in enumerate(zip(parts, self._qk_norm.split_with_sizes(counts), strict=True)):
            scale = torch.rsqrt(sums[:, i, None, None] / (counts[i] * self._head_dim * self._comm.size) + self._eps)
            part.copy_((part.float() * scale).to(part.dtype) * weight)


class GatedMLP(Layer):
    """down(activation(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, env: LayerEnv, hidden_size: int, spec: DenseMLP, eps: float) -> None:
        self._eps, inner = eps, (spec.intermediate_size, 1)
        parts, what = {"gate_proj": inner, "up_proj": inner}, "features of gate_proj"
        self.gate_up_proj = ColumnLinear(env, hidden_size, parts, what, spec.bias, spec.activation)
        self.down_proj = RowLinear(env, inner[0], hidden_size, spec.bias, "intermediate features")
        self.cpu_block = "mlp", (spec.activation,)

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None = None) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input; after: of its output →
        the new stream."""
        return self.down_proj.forward(self.gate_up_proj.project(x, norm, self._eps), x, after, self._eps)

    def part(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden], without residual → this rank's part of the sum."""
        return self.down_proj.matrix.apply(self.gate_up_proj.project(hidden))


class SparseMLP(Layer):
    """Mixture of experts: each token goes through its `num_experts_per_tok` most probable experts.

    Every rank holds a share of every expert's features, so that ranks stay balanced whatever the router does.
    """

    _experts: Experts  # once they are packed

    def __init__(self, env: LayerEnv, hidden_size: int, spec: MoE, eps: float) -> None:
        self._ops, self._comm, self._format, self._eps, self._hidden = env.ops, env.comm, env.format, eps, hidden_size
        self._spec, self._mine = spec, env.share(spec.intermediate_size, "features of an expert")
        share = len(self._mine)
        exact = replace(env, format=DENSE)  # what small errors would change much; on every rank
        self.gate = Linear(exact, (spec.num_experts, hidden_size), bias=spec.bias)
        shapes = (spec.num_experts, 2 * share, hidden_size), (spec.num_experts, hidden_size, share)
        self._gate_up, self._down = (env.format.create(shape, env.dtype, env.device) for shape in shapes)
        self._biases = (env.vector(*shapes[0][:2]), env.vector(*shapes[1][:2])) if spec.bias else None
        shared = DenseMLP(spec.shared_size, False, spec.activation)
        self.shared_expert = GatedMLP(env, hidden_size, shared, eps) if spec.shared_size else None
        self.shared_expert_gate = Linear(exact, (1, hidden_size)) if spec.shared_size else None

    def forward(self, x: Tensor, norm: Tensor | None, after: Tensor | None = None) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; norm: [hidden], of the block's input → the new stream."""
        assert norm is not None
        assert after is None, "no family has such a norm"
        hidden, logits = self.gate.matrix.norm_and_apply(x, norm, Around(self.gate.bias, eps=self._eps), self._spec)
        stream = added = x if self._comm.rank == 0 else None
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            added = self.shared_expert.part(hidden) * self.shared_expert_gate.matrix.apply(hidden).sigmoid_()
        part = self._experts(hidden, logits, added)
        return self._comm.all_reduce(part if added is stream or stream is None else stream.add_(part))

    def pack(self) -> None:
        super().pack()
        if self._biases and self._comm.rank:
            self._biases[1].zero_()  # rank 0 adds it
        self._experts = self._format.experts(self._ops, self._gate_up, self._down, self._spec, self._biases)
        self._gate_up = self._down = {}

    def weights(self, prefix: str) -> Iterator[WeightSlot]:
        yield from super().weights(prefix)
        inner, hidden, rows = self._spec.intermediate_size, self._hidden, (self._mine.start, self._mine.stop)
        half, down = len(self._mine), {"down_proj.": Shard((hidden, inner), (0, hidden), rows)}
        gate_up = {"gate_proj.": Shard((inner, hidden), rows), "up_proj.": Shard((inner, hidden), rows, at=half)}
        if self._spec.turns:
            order = torch.arange(2 * half).view(-1, 2).t().flatten()
            gate_up = {"gate_up_proj.": Shard((2 * inner, hidden), (2 * rows[0], 2 * rows[1]), order=order)}
        biases = self._biases or (None, None)
        for stack, bias, shards in zip((self._gate_up, self._down), biases, (gate_up, down), strict=True):
            experts = list(experts_of(stack, self._spec.num_experts))  # before a format adds to the stack
            for i, tensors in enumerate(experts):
                at, own = f"{prefix}experts.{i}.", None if bias is None else bias[i]
                for name, shard in shards.items():
                    slots = slots_of(self._format, at + name, tensors, shard, own)
                    yield from map(transposed, slots) if self._spec.turns else slots


def transposed(slot: WeightSlot) -> WeightSlot:
    """The slot, where it is of a weight that the checkpoint has as [in, out]."""
    if not slot.name.endswith(".weight"):
        return slot
    rows = slot.cols or (0, slot.shape[1])
    return replace(slot, shape=slot.shape[::-1], rows=rows, cols=slot.rows, transform=torch.t)


class LayerInputs(Layer):
    """Embeddings of all layers, with what is made of the first layer's input added (Gemma 4)."""

    def __init__(self, env: LayerEnv, config: ModelConfig) -> None:
        self._ops, self._eps, self._scale = env.ops, config.rms_norm_eps, config.hidden_size**-0.5
        self._size, shape = config.layer_inputs, (config.num_layers * config.layer_inputs, config.hidden_size)
        self.embed_tokens_per_layer = VocabTable(env, config.vocab_size, shape[0])
        self.per_layer_model_projection = Linear(env, shape)
        self.per_layer_projection_norm = env.vector(self._size)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids: [num_tokens]; x: [num_tokens, hidden], what they are embedded as → [num_tokens, layers, features]."""
        both = self.embed_tokens_per_layer.forward(ids), self.per_layer_model_projection.project(x)
        own, shared = (part.view(len(ids), -1, self._size) for part in both)
        shared = self._ops.rms_norm(shared * self._scale, self.per_layer_projection_norm, self._eps)
        return (shared + own * self._size**0.5) * 2**-0.5


class LayerInput(Layer):
    """The last block of decoder layer `layer`, which adds its own input to the stream, gated by the stream."""

    stored_as = ""

    def __init__(self, env: LayerEnv, config: ModelConfig, layer: int) -> None:
        self._eps, self._layer, size, what = config.rms_norm_eps, layer, config.layer_inputs, "features of an input"
        self._activate, self._mine = ACTIVATIONS[config.layers[layer].mlp.activation], env.share(size, what)
        self.gate = ColumnLinear(env, config.hidden_size, {"per_layer_input_gate": (size, 1)}, what)
        self.per_layer_projection = RowLinear(env, size, config.hidden_size, False, what)
        self.post_per_layer_input_norm = env.vector(config.hidden_size)

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        """x: [num_tokens, hidden], the residual stream; inputs: of `LayerInputs` → the new stream."""
        gated = self._activate(self.gate.project(x), inputs[:, self._layer, self._mine.start : self._mine.stop])
        return self.per_layer_projection.forward(gated, x, self.post_per_layer_input_norm, self._eps)
