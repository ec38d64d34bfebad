"""What `config.json` says of rotary embeddings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from minisgl.config.model import RopeConfig
from minisgl.errors import ConfigError
from minisgl.utils.fields import MAX_INT, MAX_NUMBER, Fields

logger = logging.getLogger(__name__)
ROPE_TYPES: dict[str, tuple[list[str], list[str]]] = msgspec.yaml.decode(
    Path(__file__).with_name("families.yaml").read_bytes()
)["rope_types"]


@dataclass(frozen=True, slots=True)
class Rotary:
    """What is rotated: heads of a size, which are scaled, too.

    share: of a head's features, where the file does not say it; None: all, and a file that says less is refused.
    is_interleaved: the two features of a pair stand side by side. other_names: of types.
    """

    head_dim: int
    scale: float = 1.0
    share: float | None = None
    is_interleaved: bool = False
    other_names: Mapping[str, str] = field(default_factory=dict)


def read_rope(f: Fields, kind: Rotary, max_position: int, default_theta: float) -> tuple[RopeConfig, int]:
    """RoPE in transformers-5 form (`rope_parameters`) or the older (`rope_theta`, `rope_scaling`, which wins as a whole
    where both are given), and the longest sequence."""
    parameters = f.child("rope_parameters")
    rope = f.child("rope_scaling") if f.data.get("rope_scaling") else parameters
    if any(isinstance(value, dict) for value in rope.data.values()):
        raise ConfigError(f"{f.source}: rope_parameters that differ by layer type are not supported")
    theta = rope.number("rope_theta", f.number("rope_theta", None, above=1), above=1)
    if theta is None and (lost := parameters.data.get("rope_theta")) is not None:
        logger.warning("%s: rope_scaling replaces rope_parameters, rope_theta %s included", f.source, lost)
    return _table(f, rope, kind, max_position, float(theta or default_theta))


def read_ropes_by_layer(
    f: Fields, kind: Rotary, max_position: int, defaults: Mapping[str, Any]
) -> tuple[RopeConfig, RopeConfig, int]:
    """Of layers that see all and of those whose window slides, and the longest sequence: objects of `rope_parameters`,
    or the older `rope_theta` and `rope_scaling` of the former, and `rope_local_base_freq` of the latter."""
    parameters = f.child("rope_parameters")
    full, sliding = parameters.child("full_attention"), parameters.child("sliding_attention")
    if f.data.get("rope_scaling"):
        full = f.child("rope_scaling")
    theta = f.number("rope_theta", defaults["rope_theta"], above=1)
    local = f.number("rope_local_base_freq", defaults.get("rope_local_base_freq", defaults["rope_theta"]), above=1)
    table, longest = _table(f, full, kind, max_position, full.number("rope_theta", theta, above=1))
    near, _ = _table(f, sliding, kind, max_position, sliding.number("rope_theta", local, above=1))
    return table, near, longest


def _table(f: Fields, rope: Fields, kind: Rotary, max_position: int, theta: float) -> tuple[RopeConfig, int]:
    name = rope.text("rope_type", rope.text("type", "default"))
    name = kind.other_names.get(name, name)
    if name not in ROPE_TYPES:
        raise ConfigError(f"{f.source}: rope type {name!r} not supported (supported: {', '.join(ROPE_TYPES)})")
    default = 1.0 if kind.share is None else kind.share
    share = rope.number("partial_rotary_factor", f.number("partial_rotary_factor", default, above=0), above=0)
    rotary_dim = int(kind.head_dim * share)
    if (kind.share is None and share != 1) or share > 1 or rotary_dim < 2 or rotary_dim % 2:
        supported = "1" if kind.share is None else f"up to 1, for an even part of {kind.head_dim} features"
        raise ConfigError(f"{f.source}: partial_rotary_factor {share:g} not supported (supported: {supported})")
    needed, optional = ROPE_TYPES[name]
    given = [key for key in (*needed, *optional) if rope.data.get(key) not in (None, 0)]
    numbers: dict[str, float] = {key: rope.number(key, 0.0, above=0) for key in given}
    if absent := [key for key in needed if key not in given]:
        raise ConfigError(f"{f.source}: rope type {name!r} needs {', '.join(absent)}")
    original = f.integer("original_max_position_embeddings", rope.integer("original_max_position_embeddings", None))
    if original is None or name == "dynamic":  # which starts at max_position_embeddings, whatever else a file says
        original = max_position
    if name == "yarn":
        numbers.setdefault("factor", max_position / original)
        numbers["truncate"] = rope.boolean("truncate", True)
    factors, long_factors = tuple(rope.list_of(float, "factors")), tuple[float, ...]()
    if name == "longrope":
        factors, long_factors = (_factors(rope, f"{of}_factor", rotary_dim // 2) for of in ("short", "long"))
        factor = numbers.get("factor", max_position / original)
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
        numbers.setdefault("attention_factor", scale)
    dims, beta = (
        (rotary_dim % kind.head_dim, kind.is_interleaved),
        rope.number("llama_4_scaling_beta", 0.0, above=-1e-9),
    )
    config = RopeConfig(theta, name, original, numbers, factors, long_factors, *dims, kind.scale, beta)
    return config, _longest(config, max_position)


def _factors(rope: Fields, key: str, num: int) -> tuple[float, ...]:
    values: Any = rope.data.get(key)
    are_numbers = isinstance(values, list) and all(type(x) in (int, float) and 0 < x < MAX_NUMBER for x in values)
    if not are_numbers or len(values) != num:
        raise rope.wrong(key, f"a list of {num} numbers above 0")
    return tuple(map(float, values))


def _longest(rope: RopeConfig, max_position: int) -> int:
    """The longest sequence, in tokens: for llama3 `max_position_embeddings`. For yarn at least the original length
    times the factor: some files have that as `max_position_embeddings` too, others the original one, or one a little
    longer (Qwen3). For others, `max_position_embeddings` times the factor, unless the original length is another."""
    factor = rope.scaling.get("factor", 1.0)
    if rope.type == "yarn":
        return max(max_position, int(min(rope.max_position * factor, MAX_INT)))
    if rope.type in ("linear", "dynamic") and rope.max_position == max_position:
        return max(1, int(min(max_position * factor, MAX_INT)))
    return max_position
