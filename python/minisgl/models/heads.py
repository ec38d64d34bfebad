"""Heads that say which tokens follow: for multi-token prediction, in the model's checkpoint, EAGLE-3's or DFlash's."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from minisgl.attention.base import StepContext
from minisgl.formats.base import DENSE, Header
from minisgl.kernel.cpu import PanelMatrix
from minisgl.kernel.ops import Matrix, TorchMatrix
from minisgl.kernel.packed import Grouped
from minisgl.layers.attention import Attention
from minisgl.layers.base import CpuSpec, LayerEnv, Part, Tensor, whole
from minisgl.layers.linear import Linear, VocabTable
from minisgl.models.checkpoint import EMBEDDING, HEAD, OF_HEAD
from minisgl.models.decoder import DecoderLayer, DecoderModel
from minisgl.utils.math import div_ceil

# Names of `fc`, of layers, of norms, and of the last norm.
_DFLASH = f"{OF_HEAD}fc.", f"{OF_HEAD}model.layers.", f"{OF_HEAD}hidden_norm", f"{OF_HEAD}model.norm"
_EAGLE = *_DFLASH[:2], *(f"{_DFLASH[1]}0.{name}" for name in ("input_layernorm", "hidden_norm")), _DFLASH[3]
_MTP = "mtp.fc.", "mtp.layers.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"


class Head:
    """One decoder layer that says which token follows the next one. Fed with its own result instead of the model's, it
    goes on. It has keys and values like a layer after the model's last one; embedding and LM head may be the model's.
    For multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2), `fc` makes its stream of the model's result
    for a token and the token after it. EAGLE's (EAGLE-3, arXiv 2503.01840, section 3) makes it of what some of the
    model's layers say; the token after it stands beside that in attention alone. It may know some of the model's tokens
    only (`d2t`). DFlash's (arXiv 2602.06036) is some layers, whose keys and values are made of what the model's say. A
    pass over the last token and masks for those to come, which all see one another, says a whole draft (`block`)."""

    def __init__(self, env: LayerEnv, model: DecoderModel, stored: Mapping[str, Header]) -> None:
        """stored: the tensors of the checkpoint."""
        own, second, num_tokens = model.config, model.config.second, model.config.vocab_size
        config = replace(second[1] if second else own, layers=own.cached_layers, ropes=own.ropes)
        self._model, self._ops, self._comm, self._config = model, env.ops, env.comm, config
        self._eps, size, env = config.rms_norm_eps, config.hidden_size, replace(env, format=DENSE)
        self.block, self.skips_last, self._aux = config.block, not config.block, config.aux_layers
        self._names = _DFLASH if self.block else _EAGLE if self._aux else _MTP
        self.fc = Linear(env, (size, (len(self._aux) or 2) * size))
        self.layers = [DecoderLayer(env, config, i) for i in range(own.num_layers, len(own.cached_layers))]
        self._attention = [block for layer in self.layers if isinstance(block := layer.self_attn, Attention)]
        self._norms = tuple(env.vector(size) for _ in self._names[2:])
        model.behind = dict.fromkeys(self._aux, self._norms[0])
        sizes, self._is_narrow = {EMBEDDING: num_tokens, HEAD: config.vocab_size}, config.vocab_size < num_tokens
        names = [name for name in sizes if OF_HEAD + name in stored or sizes[name] < num_tokens]
        self._tables = {name: VocabTable(env, sizes[name], size) for name in names}
        self.embed_tokens = self._tables.get(EMBEDDING, model.embed_tokens)
        self.lm_head = self._tables.get(HEAD, model.lm_head)
        self._moves = torch.zeros(config.vocab_size * self._is_narrow, dtype=torch.int64, device=env.device)
        self._narrowed: Matrix | None = None  # in place of the LM head's
        self._most, self._kernels = num_tokens - 1, env.ops.draft if size % 8 == 0 else None  # of 16-byte vectors

    def forward(self, following: Tensor, x: Tensor, step: StepContext, of_model: bool = False) -> Tensor:
        """following: [num_tokens] int64, of each token the one after it; x: [num_tokens, hidden], of the result before,
        which is changed, or `of_model`: all of the model's stream behind its last layer → for `choose`."""
        if not self._aux:
            x = self._ops.rms_norm(x, self._model.norm if of_model else self._norms[2], self._eps)
        elif of_model:
            x = self.fc.matrix.apply(torch.cat(list(self._model.behind.values()), -1))
        if self.block:
            return self._blocks(following, x, step, of_model, self.block[1])
        embedded = self._ops.rms_norm(self.embed_tokens.forward(following), self._norms[0], self._eps)
        normed, layer = self._ops.rms_norm(x, self._norms[1], self._eps), self.layers[0]
        both = torch.cat((embedded, normed), -1)
        if not self._aux:
            return layer.forward(self.fc.matrix.apply(both), step)
        x = self._attention[0].forward(normed if self._config.norms_residual else x, None, None, step, both)
        return layer.mlp.forward(x, layer.norms[2])

    def _blocks(self, first: Tensor, x: Tensor, step: StepContext, of_model: bool, mask: int) -> Tensor:
        """`forward` of DFlash's. first: [n] int64, of n blocks, the step's tokens → of masks, [n * masks, hidden]."""
        if of_model:
            x = self._ops.rms_norm(x, self._norms[0], self._eps)
            for attention in self._attention:
                attention.store(x, None, step)
            return x
        blocks = first[:, None].repeat(1, len(step.positions) // len(first))
        blocks[:, 1:] = mask
        x = self.embed_tokens.forward(blocks.flatten())
        for layer in self.layers:
            x = layer.forward(x, step)
        return x.view(*blocks.shape, -1)[:, 1:].flatten(0, 1)

    def choose(self, x: Tensor) -> Tensor:
        """x: rows of `forward`'s result → the most probable tokens after the following ones, [n] int64."""
        logits = self.lm_head.logits(x, *(norm := (self._norms[-1], self._eps)), self._narrowed)
        if self._kernels is not None and self._comm.size == 1:
            exact = matrix.weight if self._narrowed and isinstance(matrix := self.lm_head.matrix, TorchMatrix) else None
            known, ids = (*norm, self._moves, self._most), torch.empty(len(x), dtype=torch.int64, device=x.device)
            self._kernels.best(logits, exact, x, *known, ids)
            return ids
        num = 1 if self._narrowed is None else min(64, logits.shape[1])  # parts, of which 4 bits name a token each
        best = logits[:, : logits.shape[1] // num * num].reshape(len(x), -1, num).argmax(1)
        some = self._comm.broadcast(best * num + torch.arange(num, device=x.device))
        if num > 1:
            rows = self.lm_head.forward(some.flatten()).view(*some.shape, -1)
            some = some.gather(1, (rows @ self._ops.rms_norm(x, *norm)[..., None]).argmax(1))
        return ((some + self._moves[some]).clamp_(0, self._most) if self._is_narrow else some)[:, 0]

    def cpu_spec(self) -> CpuSpec | None:
        """Of the layer's blocks; numbers: handles of `fc` and the LM head; norms: of the embedding, the hidden state,
        and the last one. None: the CPU engine cannot compute it. Called after the weights are packed."""
        layer, head, aux = self.layers[0].cpu_spec(), self._narrowed or self.lm_head.matrix, self._aux
        handles = self.fc.matrix.cpu_handle, head.cpu_handle
        return None if layer is None or None in handles or aux else replace(layer, numbers=handles, norms=self._norms)

    def parts(self) -> Iterator[Part]:
        """All that is to be filled."""
        for name, table in self._tables.items():
            yield Part([*table.weights(OF_HEAD + name.removesuffix("weight"))], table.pack)
        (fc, layers, *names), offset = self._names, self._config.norm_offset
        vectors = [whole(f"{n}.weight", x, offset) for n, x in zip(names, self._norms, strict=True)]
        vectors += [whole(f"{OF_HEAD}d2t", self._moves)] * self._is_narrow
        yield Part([*self.fc.weights(fc), *vectors], self._pack)
        yield from (Part([*layer.weights(f"{layers}{i}.")], layer.pack) for i, layer in enumerate(self.layers))

    def _pack(self) -> None:
        """What drafts cost most is to read an LM head of 16 bits for each of their tokens: it gets 8, on a GPU 4."""
        self.fc.pack()
        matrix = self.lm_head.matrix
        if isinstance(matrix, PanelMatrix) and matrix.data[0].itemsize == 2:
            ids = torch.arange(div_ceil(self._config.vocab_size, self._comm.size))
            rows = torch.empty(len(ids), self._config.hidden_size, dtype=torch.bfloat16)
            for some in torch.split(ids, 1 << 14):
                rows[some] = matrix.rows(some).bfloat16()
            self._narrowed = self._ops.int8_matrix(rows)
        elif isinstance(matrix, TorchMatrix) and matrix.weight.is_cuda and not matrix.weight.shape[1] % 64:
            parts = [Grouped.of(rows) for rows in torch.split(matrix.weight, 1 << 14)]
            packed = self._ops.packed_matrix(parts, matrix.weight.dtype)
            self._narrowed = None if isinstance(packed, TorchMatrix) else packed  # it would be as large
