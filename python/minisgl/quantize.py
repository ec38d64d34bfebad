"""`minisgl quantize IN OUT`: a copy of a model with weights of 4 or 8 bits, in the format of compressed-tensors."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from minisgl.config.args import ArgumentParser
from minisgl.config.families import read_model_config
from minisgl.config.locate import load_tokenizer, locate_model, read_json
from minisgl.distributed.comm import Communicator
from minisgl.errors import ConfigError
from minisgl.formats.base import Shard, Tensor, Tensors, WeightFormat, WeightSlot
from minisgl.formats.grouped import pack
from minisgl.formats.int4 import WIDE, quantize
from minisgl.kernel.ops import TorchOps
from minisgl.kernel.packed import Grouped
from minisgl.layers.base import LayerEnv
from minisgl.models.checkpoint import Checkpoint, of_expert, our_name, places
from minisgl.models.decoder import DecoderModel
from minisgl.utils.log import told

_CONFIGS = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())
_META = torch.device("meta")
_WINDOW, _MAX_TOKENS = 512, 8192  # of a text, that are read at once, and in all


class _Linear(WeightFormat):
    """Linear layers as they are stored. names: of their weights."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def slots(self, prefix: str, tensors: Tensors, shard: Shard) -> Iterator[WeightSlot]:
        self.names.add(f"{prefix}weight")
        return super().slots(prefix, tensors, shard)


class _Watch(TorchFunctionMode):
    """While it is entered: by where a weight lies, the sum of the squares of what it is multiplied with, [in]."""

    def __init__(self) -> None:
        super().__init__()
        self.squares: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            at, x = args[1].data_ptr(), args[0].float().flatten(0, -2)
            self.squares[at] = self.squares.get(at, 0) + x.square().sum(0)
        return func(*args, **(kwargs or {}))


def _importance(source: Path, text: str) -> Tensors:
    """How much errors in each column of a weight count: the squares of what it is multiplied with while the model, as
    transformers has it, reads a text. By the names of weights, [in] float32, of mean 1; of what no token has gone
    through there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = load_tokenizer(str(source)).encode(text)[:_MAX_TOKENS]
    config, watch, found = AutoConfig.from_pretrained(source), _Watch(), Tensors()
    config._experts_implementation = "eager"  # each by a product of its own
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype="auto").eval()
    with watch:
        for first in range(0, len(ids), _WINDOW):
            model.base_model(torch.tensor([ids[first : first + _WINDOW]]), use_cache=False)
    for name, parameter in model.named_parameters():
        for i, weight in enumerate(parameter if parameter.dim() == 3 else [parameter]):
            if (squares := watch.squares.get(weight.data_ptr())) is not None:
                importance = (squares / squares.mean().clamp(min=1e-30)).clamp(min=1e-4)
                found[of_expert(our_name(name), i)] = importance
    return found


def _compressed(prefix: str, made: Grouped) -> Tensors:
    tensors = {"weight_packed": made.codes.view(torch.int32), "weight_scale": made.scales}
    tensors["weight_shape"] = torch.tensor(made.shape)
    if made.zeros is not None:  # words of rows
        zeros = torch.nn.functional.pad(made.zeros, (0, 0, 0, -len(made.zeros) % (32 // made.bits)))
        words = pack(zeros.t(), made.bits).flatten().view(torch.int32).view(zeros.shape[1], -1)
        tensors["weight_zero_point"] = words.t().contiguous()
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _quantized(source: Path, bits: int, text: str) -> tuple[Tensors, bool]:
    """The tensors to write, as the checkpoint has them but for those of linear layers, and whether the head is the
    embedding. Raises: ConfigError where there is no such model."""
    model = read_model_config(source)
    if model.packed_bytes:
        raise ConfigError(f"{source}: its weights are quantized already")
    checkpoint, linear, made = Checkpoint(source, model), _Linear(), Tensors()
    model = checkpoint.untied(model)
    decoder = DecoderModel(LayerEnv(Communicator(), TorchOps(), torch.float32, _META, linear), model)
    slots = [slot for part in decoder.parts() for slot in part.slots]
    sources, shapes = checkpoint.sources(slots), {slot.name: slot.shape for slot in slots}
    importance = _importance(source, text) if text else {}
    is_turned = any(name.endswith(".gate_up_proj.bias") for name in shapes)  # in full, [in, out]
    for slot, stored in zip(slots, sources, strict=True):
        weight, prefix = stored.read(0, slot.shape[0]).clone(), slot.name.removesuffix("weight")
        if slot.name in linear.names:
            found = (importance.get(name) for name, *_ in places(slot.name, shapes))
            counts = next((columns for columns in found if columns is not None), None)
            rows = weight.t() if is_turned and ".experts." in slot.name else weight
            narrow = quantize(prefix, rows, 8 if prefix in WIDE else bits, counts)
            made |= _compressed(prefix, narrow) if isinstance(narrow, Grouped) else {slot.name: weight}
        else:
            made[slot.name] = weight
    return made, model.tie_word_embeddings


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status. Raises: ConfigError when it cannot be done as asked."""
    parser = ArgumentParser(prog="minisgl quantize", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("source", metavar="IN", help="directory or hub id of a model that is stored in full")
    parser.add_argument("target", metavar="OUT", type=Path, help="directory to make")
    parser.add_argument("--quantization", choices=["int4", "int8"], default="int4", help="(default: int4)")
    about = "a text of what the model is for, some thousand words: what it multiplies most becomes most exact"
    parser.add_argument("--calibrate", metavar="TEXTFILE", type=Path, help=about)
    args = parser.parse_args(argv)
    target: Path = args.target
    source, bits = locate_model(args.source, "huggingface"), int(args.quantization[3:])
    if target.exists() or target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} exists already" if target.exists() else f"{target} is within {source}")
    try:
        text = args.calibrate.read_text(encoding="utf-8").strip() if args.calibrate else ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"--calibrate {args.calibrate}: cannot be read: {error}") from None
    if args.calibrate and not text:
        raise ConfigError(f"--calibrate {args.calibrate}: there is no text in it")
    with told("quantizing"), torch.inference_mode():
        tensors, is_tied = _quantized(source, bits, text)
    changes = {"tie_word_embeddings": is_tied, "quantization_config": _CONFIGS[args.quantization]}
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_CONFIGS["not_copied"]))
        target.chmod(0o755)  # whatever the source's is
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(read_json(source / "config.json") | changes, indent=2))
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from None
    print(f"{target}: {sum(file.stat().st_size for file in target.iterdir()) / 2**20:.0f} MiB")
    return 0
