"""A head that guesses for a model, as EAGLE-3 trains them."""

from collections.abc import Container, Iterator

import torch

from minisgl.attention.base import StepContext
from minisgl.config.model import ModelConfig
from minisgl.errors import ConfigError
from minisgl.formats.base import Shard, WeightSlot
from minisgl.layers.attention import Attention
from minisgl.layers.base import LayerEnv, Part, Tensor, whole
from minisgl.layers.linear import Linear, VocabTable
from minisgl.models.decoder import DecoderModel


class EagleHead(DecoderModel):
    """One decoder layer, which is given what a model has made of each token behind some of its layers, and the token
    after it (EAGLE-3, arXiv 2503.01840, section 3). Fed with its own result instead, it goes on.

    Its vocabulary is a part of the model's. Embedding and LM head that the file lacks are the model's.
    """

    def __init__(self, env: LayerEnv, config: ModelConfig, first: DecoderModel, stored: Container[str]) -> None:
        """first: for which it guesses; stored: names of tensors that the file has."""
        super().__init__(env, config)
        hidden, size = config.hidden_size, first.config.vocab_size
        self._shared = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name not in stored]
        own = VocabTable(env, size, hidden)
        self.embed_tokens = first.embed_tokens if self._shared[:1] == ["model.embed_tokens.weight"] else own
        is_whole = "lm_head.weight" in self._shared and config.vocab_size == size
        self.lm_head = first.lm_head if is_whole else VocabTable(env, config.vocab_size, hidden)
        self.layers[0].self_attn = self._attention = Attention(env, config, 0, width=2)
        shape = hidden, len(config.aux_layers) * hidden
        self.fc = Linear(env, shape, {"": Shard(shape, (0, hidden))})
        self._embedding_norm, self._num_tokens = env.vector(hidden), size
        self._ids = torch.zeros(config.vocab_size, dtype=torch.int64, device=env.device)  # how far they are moved

    def forward(self, following: Tensor, given: Tensor, step: StepContext) -> Tensor:
        """following: [num_tokens] int64, of each token the one after it; given: [num_tokens, layers * hidden], what the
        model has made of it, or [num_tokens, hidden], this head of the token before, which it changes → the latter."""
        ops, eps, layer = self._ops, self._eps, self.layers[0]
        if given.shape[1] != self.config.hidden_size:
            given = self.fc.matrix.apply(given)
        assert layer.norms[0] is not None
        normed = ops.rms_norm(given, layer.norms[0], eps)
        both = torch.cat((ops.rms_norm(self.embed_tokens.forward(following), self._embedding_norm, eps), normed), -1)
        residual = normed if self.config.norms_residual else given
        x = self._attention.o_proj.forward(self._attention.mixed(both, None, step), residual)
        return layer.mlp.forward(x, layer.norms[2])

    def token_ids(self, ids: Tensor) -> Tensor:
        """ids: of its vocabulary → of the model's."""
        return ids + self._ids[ids.long()].int()

    def parts(self) -> Iterator[Part]:
        slots = [*self.fc.weights("fc."), whole("model.layers.0.input_layernorm.weight", self._embedding_norm)]
        if (size := self.config.vocab_size) != self._num_tokens:
            slots.append(WeightSlot("d2t", (size,), self._ids, (0, size)))
        yield Part(slots, self._finish)
        yield from (part for part in super().parts() if part.slots[0].name not in self._shared)

    def _finish(self) -> None:
        self.fc.pack()
        ids = self.token_ids(torch.arange(len(self._ids), device=self._ids.device))
        if not 0 <= int(ids.min()) <= int(ids.max()) < self._num_tokens:
            raise ConfigError(f"d2t: tokens up to {int(ids.max())}, the model has {self._num_tokens}")
