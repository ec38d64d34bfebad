"""Which module implements an architecture of `config.json`."""

from __future__ import annotations

from minisgl.config.families import FAMILIES
from minisgl.config.model import ModelConfig
from minisgl.errors import ConfigError
from minisgl.layers.base import LayerEnv
from minisgl.models.decoder import DecoderModel

# Families differ only in what `config/families.py` reads; one that needs other layers gets a module of its own.
MODELS: dict[str, type[DecoderModel]] = dict.fromkeys(FAMILIES, DecoderModel)


def build_model(env: LayerEnv, config: ModelConfig) -> DecoderModel:
    """The model with uninitialised weights. Raises: ConfigError for an architecture that is not there, or a
    tensor-parallel size that does not fit it."""
    if config.architecture not in MODELS:
        raise ConfigError(f"architecture {config.architecture} not supported (supported: {', '.join(MODELS)})")
    return MODELS[config.architecture](env, config)
