"""A model's head for multi-token prediction, as Qwen3-Next's and Qwen3.5's checkpoints have one (`mtp.*`)."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from minisgl.attention.base import StepContext
from minisgl.formats.base import DENSE, Rounded, Shard
from minisgl.kernel.ops import Matrix, TorchMatrix
from minisgl.layers.base import CpuSpec, LayerEnv, Part, Tensor, joined, whole
from minisgl.layers.linear import Linear
from minisgl.models.decoder import DecoderLayer, DecoderModel


class MTPHead:
    """One decoder layer that says which token follows the next one (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Fed with its own result instead of the model's, it goes on. Its keys and values are those of the layer after the
    model's last one; embedding and LM head are the model's. What it is never changes what is sampled.
    """

    reads = "hidden"  # of what the model makes

    def __init__(self, env: LayerEnv, model: DecoderModel) -> None:
        env, self._model, self._ops = replace(env, format=DENSE), model, env.ops
        self._comm = env.comm
        config, self._eps, hidden = model.config, model.config.rms_norm_eps, model.config.hidden_size
        assert config.mtp is not None
        self.fc = Linear(env, (hidden, 2 * hidden), {"": Shard((hidden, 2 * hidden), (0, hidden))})
        self.layer = DecoderLayer(env, replace(config, layers=config.cached_layers), config.num_layers)
        self._lm_head: Matrix | None = None  # in place of the model's
        self._norms = {name: env.vector(hidden) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}

    def forward(self, following: Tensor, hidden: Tensor, step: StepContext) -> Tensor:
        """following: [num_tokens] int64, of each token the one after it; hidden: [num_tokens, hidden], what the model
        has made of it, behind its last norm, or this head of the token before → for `choose`."""
        norms, ops, eps = self._norms, self._ops, self._eps
        embedded = ops.rms_norm(self._model.embed_tokens.forward(following), norms["pre_fc_norm_embedding"], eps)
        both = torch.cat((embedded, ops.rms_norm(hidden, norms["pre_fc_norm_hidden"], eps)), -1)
        return self.layer.forward(self.fc.matrix.apply(both), step)

    def choose(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → the most probable tokens after the following ones, [n] int32."""
        logits = self._model.lm_head.logits(x, self._norms["norm"], self._eps, self._lm_head)
        return self._comm.broadcast(logits.argmax(-1).int())

    def hidden(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → what it goes on from, in the place of the model's."""
        return self._ops.rms_norm(x, self._norms["norm"], self._eps)

    def cpu_spec(self) -> CpuSpec | None:
        """Of the layer's blocks; matrices: embedding, LM head and `fc`; norms: of the embedding, of the hidden state,
        and the last one. None: the CPU engine cannot compute it. Called after the weights are packed."""
        layer, model = self.layer.cpu_spec(), self._model
        block = joined((model.embed_tokens, model.lm_head, self.fc), "", ())
        if layer is None or block is None:
            return None
        return replace(layer, matrices=block.matrices, norms=tuple(self._norms.values()))

    def parts(self) -> Iterator[Part]:
        """All that is to be filled."""
        yield Part([*self.fc.weights("mtp.fc.")], self.fc.pack)
        yield Part([*self.layer.weights("mtp.layers.0.")], self.layer.pack)
        offset = self._model.config.norm_offset
        yield Part([whole(f"mtp.{name}.weight", norm, offset) for name, norm in self._norms.items()], self._narrow)

    def _narrow(self) -> None:
        """On a GPU what drafts cost most is to read an LM head of 16 bits for each of their tokens: here it gets 8."""
        matrix = self._model.lm_head.matrix
        if isinstance(matrix, TorchMatrix) and matrix.weight.is_cuda and matrix.weight.dtype != torch.float32:
            rounded = Rounded(matrix.weight.device, matrix.weight.device)
            self._lm_head = rounded.matrix(self._ops, {"weight": matrix.weight})
