"""How much errors in each column of a model's weights count: the squares of what they are multiplied with while the
model reads a text. `minisgl quantize --importance` takes the file.

    python -m tools.calibrate MODEL TEXT importance.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import save_file

from minisgl.attention.base import AttentionStep, StepContext
from minisgl.attention.create import Backend
from minisgl.attention.sdpa import SdpaBackend
from minisgl.config.families import read_model_config
from minisgl.config.locate import load_tokenizer, locate_model
from minisgl.core import StateCopy
from minisgl.distributed.comm import Communicator
from minisgl.formats.base import ByName, Tensors
from minisgl.kernel.cpu import CpuOps
from minisgl.kernel.ops import LayerOps, Matrix
from minisgl.kernel.state import StateSequences
from minisgl.kvcache.pool import KVPool
from minisgl.kvcache.states import StatePool
from minisgl.layers.base import LayerEnv
from minisgl.layers.rope import RotaryEmbedding
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderModel

Tensor = torch.Tensor

CPU = torch.device("cpu")
WINDOW = 512  # tokens that are read at once


class Watched(Matrix):
    """A matrix, and the sum of the squares of what it was multiplied with, [in]."""

    def __init__(self, inner: Matrix, ops: LayerOps, activation: str | None) -> None:
        super().__init__(ops, activation)
        self._inner, self.squares = inner, torch.zeros(())

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.squares = self.squares + x.float().square().sum(0)
        return self._inner.apply(x, bias)

    def rows(self, ids: Tensor, first: int = 0) -> Tensor:
        return self._inner.rows(ids, first)


class Watching(ByName):
    """Layers as they are stored. watched: their matrices, by the names of the weights in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, CPU)
        self.watched: dict[str, Watched] = {}

    def part(self, prefix: str, tensors: Tensors) -> Tensor:  # noqa: ARG002
        return tensors["weight"]

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:
        matrix = Watched(super().matrix(ops, tensors), ops, activation)
        self.watched |= dict.fromkeys(tensors, matrix)
        return matrix


def importance(path: Path, text: str, max_tokens: int) -> Tensors:
    """By the names of weights, [in] float32, of mean 1; what no token has gone through counts evenly.

    Raises: ConfigError where there is no such model.
    """
    checkpoint, model, zero = Checkpoint(path), read_model_config(path), np.zeros(1, np.int64)
    model, watching = checkpoint.untied(model), Watching(getattr(torch, model.dtype))
    with torch.inference_mode():
        env = LayerEnv(Communicator(), CpuOps(torch.get_num_threads()), watching.dtype, CPU, watching)
        decoder = DecoderModel(env, model)
        load_weights(decoder.parts(), checkpoint)
        states, backend = StatePool(model, 1, 1, torch.float32, CPU), cast(Backend, SdpaBackend(CPU))
        kv = KVPool(model, WINDOW, 1, torch.float32, CPU, states)
        pages = np.arange(WINDOW, dtype=np.int32)[None]
        ids = torch.tensor(load_tokenizer(str(path)).encode(text)[:max_tokens], dtype=torch.int64)
        for begin in range(0, len(ids), WINDOW):
            part = ids[begin : begin + WINDOW]
            size, positions = np.array([len(part)]), torch.arange(len(part))
            step = AttentionStep(zero, zero, size, np.append(zero, size), pages, 1, 0)
            ropes = [RotaryEmbedding(rope, model.head_dim, CPU)(positions) for rope in model.ropes]
            states.copy([StateCopy(-1, 0)])
            seqs = StateSequences(torch.tensor([0]), torch.tensor([0, len(part)]))
            metadata = backend.prepare(step, captured=False)
            decoder.hidden(part, StepContext(positions, ropes, kv, backend, metadata, seqs))
        sums = {name: matrix.squares for name, matrix in watching.watched.items() if matrix.squares.dim()}
        return {name: (total / total.mean().clamp(min=1e-30)).clamp(min=1e-4) for name, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", help="directory or hub id of a model that is stored in full")
    parser.add_argument("text", type=Path, help="what the model will be used for, some thousand words of it")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--max-tokens", type=int, default=8192, help="that are read (default: 8192)")
    args = parser.parse_args()
    made = importance(locate_model(args.model, "huggingface"), args.text.read_text(encoding="utf-8"), args.max_tokens)
    save_file(made, args.out)
    print(f"{args.out}: {len(made)} weights")


if __name__ == "__main__":
    main()
