"""Formats of weights: how checkpoints store linear layers, and how they are held in memory."""

from __future__ import annotations

from minisgl.config.runtime import EngineConfig
from minisgl.formats.base import DENSE, Int8, WeightFormat


def create_format(config: EngineConfig) -> WeightFormat:
    """What reads the weights of a model."""
    return Int8() if config.quantization == "int8" else DENSE
