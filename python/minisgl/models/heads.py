"""Heads that say which tokens follow: for multi-token prediction, in the model's checkpoint, or EAGLE-3's."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig
from minisgl.formats.base import DENSE, Header, Rounded, Shard
from minisgl.kernel.ops import Matrix, TorchMatrix
from minisgl.layers.attention import Attention
from minisgl.layers.base import CpuSpec, LayerEnv, Part, Tensor, joined, whole
from minisgl.layers.linear import Linear, VocabTable
from minisgl.models.checkpoint import EMBEDDING, HEAD, OF_HEAD
from minisgl.models.decoder import DecoderLayer, DecoderModel


class MTPHead:
    """One decoder layer that says which token follows the next one (DeepSeek-V3, arXiv 2412.19437, section 2.2), as
    Qwen3-Next's and Qwen3.5's checkpoints have one.

    Fed with its own result instead of the model's, it goes on. Its keys and values are those of the layer after the
    model's last one; embedding and LM head are the model's. What it is never changes what is sampled.
    reads: what it is given of the model, beside the token that follows.
    """

    reads = "hidden"
    _names = "mtp.fc.", "mtp.layers.0.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"

    def __init__(self, env: LayerEnv, model: DecoderModel, config: ModelConfig, width: int = 2) -> None:
        """config: of the head, with all layers that have caches; width: of what `fc` reads, in hidden states."""
        self._model, self._ops, self._comm, self._config = model, env.ops, env.comm, config
        shape, self._eps = (config.hidden_size, width * config.hidden_size), config.rms_norm_eps
        self.fc = Linear(env, shape, {"": Shard(shape, (0, shape[0]))})
        self.layer = DecoderLayer(env, config, model.config.num_layers)
        self.embed_tokens, self.lm_head = model.embed_tokens, model.lm_head
        self._narrowed: Matrix | None = None  # in place of the LM head's
        self._norms = tuple(env.vector(shape[0]) for _ in self._names[2:])

    def forward(self, following: Tensor, hidden: Tensor, step: StepContext) -> Tensor:
        """following: [num_tokens] int64, of each token the one after it; hidden: [num_tokens, hidden], what the model
        has made of it, behind its last norm, or this head of the token before → for `choose`."""
        return self.layer.forward(self.fc.matrix.apply(torch.cat(self._normed(following, hidden), -1)), step)

    def _normed(self, following: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self._ops.rms_norm(self.embed_tokens.forward(following), self._norms[0], self._eps)
        return embedded, self._ops.rms_norm(hidden, self._norms[1], self._eps)

    def choose(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → the most probable tokens after the following ones, [n] int32."""
        logits = self.lm_head.logits(x, self._norms[2], self._eps, self._narrowed)
        return self._comm.broadcast(logits.argmax(-1).int())

    def hidden(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → what it goes on from, in the place of the model's."""
        return self._ops.rms_norm(x, self._norms[2], self._eps)

    def cpu_spec(self) -> CpuSpec | None:
        """Of the layer's blocks; matrices: embedding, LM head and `fc`; norms: of the embedding, of the hidden state,
        and the last one. None: the CPU engine cannot compute it. Called after the weights are packed."""
        layer, block = self.layer.cpu_spec(), joined((self.embed_tokens, self.lm_head, self.fc), "", ())
        return None if layer is None or block is None else replace(layer, matrices=block.matrices, norms=self._norms)

    def parts(self) -> Iterator[Part]:
        """All that is to be filled."""
        fc, layer, *names = self._names
        norms = [whole(f"{n}.weight", x, self._config.norm_offset) for n, x in zip(names, self._norms, strict=True)]
        yield Part([*self.fc.weights(fc), *norms], self._pack)
        yield Part([*self.layer.weights(layer)], self.layer.pack)

    def _pack(self) -> None:
        """On a GPU what drafts cost most is to read an LM head of 16 bits for each of their tokens: here it gets 8."""
        self.fc.pack()
        matrix = self.lm_head.matrix
        if isinstance(matrix, TorchMatrix) and matrix.weight.is_cuda and matrix.weight.dtype != torch.float32:
            rounded = Rounded(matrix.weight.device, matrix.weight.device)
            self._narrowed = rounded.matrix(self._ops, {"weight": matrix.weight})


class EagleHead(MTPHead):
    """One that reads what some of the model's layers make of a token (EAGLE-3, arXiv 2503.01840, section 3); the token
    that follows stands beside that in attention alone. It may say some of the model's tokens only (`d2t`)."""

    reads = "aux"
    _layer = f"{OF_HEAD}model.layers.0."
    _names = f"{OF_HEAD}fc.", _layer, f"{_layer}input_layernorm", f"{_layer}hidden_norm", f"{OF_HEAD}model.norm"

    def __init__(self, env: LayerEnv, model: DecoderModel, config: ModelConfig, stored: Mapping[str, Header]) -> None:
        """stored: tensors. Embedding and LM head are the model's where there are no others."""
        super().__init__(env, model, config, len(config.aux_layers))
        self.layer.self_attn = self._attention = Attention(env, config, model.config.num_layers, width=2)
        size, d2t = (model.config.vocab_size, config.hidden_size), stored.get(f"{OF_HEAD}d2t")
        if OF_HEAD + EMBEDDING in stored:
            self.embed_tokens = VocabTable(env, *size)
        if OF_HEAD + HEAD in stored or d2t:
            self.lm_head = VocabTable(env, d2t.shape[0] if d2t else size[0], size[1])
        self._num_tokens = size[0]
        self._moves = torch.zeros(d2t.shape, dtype=torch.int64, device=env.device) if d2t else None

    def forward(self, following: Tensor, hidden: Tensor, step: StepContext) -> Tensor:
        """hidden: [num_tokens, layers * hidden], or [num_tokens, hidden] of this head, which is changed."""
        if hidden.shape[1] > self._config.hidden_size:
            hidden = self.fc.matrix.apply(hidden)
        embedded, normed = self._normed(following, hidden)
        mixed = self._attention.mixed(torch.cat((embedded, normed), -1), None, step)
        x = self._attention.o_proj.forward(mixed, normed if self._config.norms_residual else hidden)
        return self.layer.mlp.forward(x, self.layer.norms[2])

    def choose(self, x: Tensor) -> Tensor:
        ids = super().choose(x)
        return ids if self._moves is None else (ids + self._moves[ids.long()].int()).clamp(0, self._num_tokens - 1)

    def hidden(self, x: Tensor) -> Tensor:
        return x

    def cpu_spec(self) -> CpuSpec | None:
        return None

    def parts(self) -> Iterator[Part]:
        tables = (EMBEDDING, self.embed_tokens, self._model.embed_tokens), (HEAD, self.lm_head, self._model.lm_head)
        for name, table, other in tables:
            if table is not other:
                yield Part([*table.weights(OF_HEAD + name.removesuffix("weight"))], table.pack)
        slots = [] if self._moves is None else [whole(f"{OF_HEAD}d2t", self._moves)]
        for part in super().parts():
            yield Part([*part.slots, *slots], part.finish)
            slots = []


def create_head(env: LayerEnv, model: DecoderModel, stored: Mapping[str, Header]) -> MTPHead | None:
    """That tells drafts for a model. stored: tensors that there are."""
    config, second, env = model.config, model.config.second, replace(env, format=DENSE)
    if config.mtp is None:
        return None
    sizes = replace(second[1] if second else config, layers=config.cached_layers, ropes=config.ropes)
    return EagleHead(env, model, sizes, stored) if second else MTPHead(env, model, sizes)
