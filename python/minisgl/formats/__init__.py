"""Formats of weights: how checkpoints store linear layers, and how they are held in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from minisgl.config.runtime import EngineConfig
from minisgl.formats.base import DENSE, Int8, WeightFormat
from minisgl.formats.gguf import Gguf


def create_format(config: EngineConfig) -> WeightFormat:
    """What reads the weights of a model."""
    if config.model_path.endswith(".gguf") and not config.dummy_weight:
        return Gguf(Path(config.model_path), getattr(torch, config.dtype), torch.device(config.device))
    return Int8() if config.quantization == "int8" else DENSE
