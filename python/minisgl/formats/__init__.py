"""Formats of weights: how checkpoints store linear layers, and how they are held in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from minisgl.config.runtime import EngineConfig
from minisgl.formats.base import DENSE, Header, Int8, Rounded, WeightFormat
from minisgl.formats.float8 import Float8Format, Mxfp4
from minisgl.formats.gguf import Gguf
from minisgl.formats.grouped import Awq, Compressed, CompressedInt8, Gptq
from minisgl.formats.int4 import Int4

# By the layouts of `config/quantization.yaml`.
_STORED: dict[str, Callable[..., WeightFormat]] = {"awq": Awq, "gptq": Gptq, "packed": Compressed}
_STORED |= {"int8": CompressedInt8, "float8": Float8Format, "mxfp4": Mxfp4}


def create_format(config: EngineConfig, device: torch.device, header: Mapping[str, Header]) -> WeightFormat:
    """What reads the weights of a model, onto a device. header: of the checkpoint's tensors; empty: random weights."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    if config.model_path.endswith(".gguf") and not config.dummy_weight:
        return Gguf(Path(config.model_path), dtype, device)
    if (stored := config.model.quantization) is not None:
        return _STORED[stored.layout](stored, header, config.model_path, dtype, device)
    loaded = device if config.dummy_weight else torch.device("cpu")  # where random weights are made
    rounded = {"int4": Int4(dtype, device), "int8": Int8(), "fp8": Rounded(loaded, device)}
    return rounded.get(config.quantization or "", DENSE)
