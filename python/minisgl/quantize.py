"""`minisgl quantize IN OUT`: a copy of a model with weights of 4 or 8 bits, in the format of compressed-tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minisgl.config.args import ArgumentParser
from minisgl.config.families import read_model_config
from minisgl.config.locate import locate_model, read_json
from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.formats.base import Tensors
from minisgl.formats.grouped import pack
from minisgl.formats.int4 import WIDE, Int4, quantize
from minisgl.kernel.ops import LayerOps, Matrix, TorchOps
from minisgl.kernel.packed import Grouped
from minisgl.layers.base import LayerEnv
from minisgl.models.checkpoint import Checkpoint, load_weights
from minisgl.models.decoder import DecoderModel
from minisgl.utils.log import told

_CONFIGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


class _Collector(Int4):
    """Keeps what is to be written of the layers that are loaded, and leaves the layers empty."""

    def __init__(self, bits: int, dtype: torch.dtype, importance: Tensors) -> None:
        super().__init__(dtype, torch.device("cpu"))
        self._bits, self._importance = bits, importance
        self.made: Tensors = {}

    def matrix(self, ops: LayerOps, tensors: Tensors, activation: str | None = None) -> Matrix:  # noqa: ARG002
        for name, weight in tensors.items():
            prefix = name.removesuffix("weight")
            importance = self._importance.get(name)
            if importance is not None and importance.shape != weight.shape[1:]:
                raise ConfigError(f"--importance: {name} is {list(importance.shape)}, not [{weight.shape[1]}]")
            made = quantize(prefix, weight, 8 if prefix in WIDE else self._bits, importance)
            self.made |= _compressed(prefix, made) if isinstance(made, Grouped) else {name: made}
        return ops.matrix(torch.empty(0, 0))


def _compressed(prefix: str, made: Grouped) -> Tensors:
    tensors = {"weight_packed": made.codes.view(torch.int32), "weight_scale": made.scales}
    tensors["weight_shape"] = torch.tensor(made.shape)
    if made.zeros is not None:  # words of rows
        zeros = torch.nn.functional.pad(made.zeros, (0, 0, 0, -len(made.zeros) % (32 // made.bits)))
        words = pack(zeros.t(), made.bits).flatten().view(torch.int32).view(zeros.shape[1], -1)
        tensors["weight_zero_point"] = words.t().contiguous()
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _quantized(source: Path, bits: int, importance: Tensors) -> tuple[Tensors, bool]:
    """The tensors to write, and whether the head is the embedding. Raises: ConfigError where there is no such model."""
    model = read_model_config(source)
    if model.packed_bytes:
        raise ConfigError(f"{source}: its weights are quantized already")
    checkpoint, dtype = Checkpoint(source), getattr(torch, model.dtype)
    model, collector = checkpoint.untied(model), _Collector(bits, dtype, importance)
    with torch.inference_mode():
        decoder = DecoderModel(LayerEnv(Communicator(), TorchOps(), dtype, torch.device("cpu"), collector), model)
        parts = list(decoder.parts())
        slots = (slot for part in parts for slot in part.slots)
        rest = [slot for slot in slots if len(slot.shape) == 1 or slot.name.endswith("mlp.gate.weight")]
        load_weights((parts.pop(0) for _ in range(len(parts))), checkpoint)
        others = {slot.name: slot.target.reshape(-1, *slot.shape)[0].clone() for slot in rest}
    return {**collector.made, **others}, model.tie_word_embeddings


def _read_importance(path: Path) -> Tensors:
    """Of errors in each column, by the names of weights. Raises: ConfigError naming the file and what is wrong."""
    try:
        importance = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--importance {path}: cannot be read: {error}") from None
    if wrong := [name for name, tensor in importance.items() if not bool((tensor > 0).all() & tensor.isfinite().all())]:
        raise ConfigError(f"--importance {path}: {wrong[0]} has other numbers than those above 0")
    return importance


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status. Raises: ConfigError when it cannot be done as asked."""
    parser = ArgumentParser(prog="minisgl quantize", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("source", metavar="IN", help="directory or hub id of a model that is stored in full")
    parser.add_argument("target", metavar="OUT", type=Path, help="directory to make")
    parser.add_argument("--quantization", choices=["int4", "int8"], default="int4", help="(default: int4)")
    parser.add_argument("--importance", metavar="FILE", type=Path, help="of errors, by column: see tools/calibrate.py")
    args = parser.parse_args(argv)
    target: Path = args.target
    source, bits = locate_model(args.source, "huggingface"), int(args.quantization[3:])
    if target.exists():
        raise ConfigError(f"{target} exists already")
    importance = _read_importance(args.importance) if args.importance else {}
    with told("quantizing"):
        tensors, is_tied = _quantized(source, bits, importance)
    changes = {"tie_word_embeddings": is_tied, "quantization_config": _CONFIGS[args.quantization]}
    try:
        target.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and not file.match("*.safetensors*") and not file.match("*.bin*"):
                shutil.copy(file, target)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(read_json(source / "config.json") | changes, indent=2))
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from None
    print(f"{target}: {sum(file.stat().st_size for file in target.iterdir()) / 2**20:.0f} MiB")
    return 0
