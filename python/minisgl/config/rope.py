"""What `config.json` says of rotary embeddings."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from minisgl.config.model import RopeConfig
from minisgl.errors import ConfigError
from minisgl.utils.fields import MAX_INT, MAX_NUMBER, Fields

logger = logging.getLogger(__name__)
TABLE = msgspec.yaml.decode(Path(__file__).with_name("families.yaml").read_bytes())
ROPE_TYPES: dict[str, tuple[list[str], list[str]]] = TABLE["rope_types"]


def read_rope(
    f: Fields, head_dim: int, max_position: int, layer: str, names: Mapping[str, str], is_partial: bool
) -> tuple[RopeConfig, int]:
    """RoPE as in transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`), and the longest sequence.

    Where both are given, `rope_scaling` wins as a whole; in families with `rope_local_base_freq`, which was the base of
    layers that slide, it changes what it names. These layers it never scales.
    layer: of `layer_types`, each of which has its own object, or what there is, where it is not "". names: other ones
    of types. is_partial: a part of a head's features may be rotated; a file that says so is refused else.
    """
    parameters, slides = f.child("rope_parameters"), layer == "sliding_attention"
    has_local = bool(layer and f.number("rope_local_base_freq", 0))
    differ = has_local or any(isinstance(part, dict) for part in parameters.data.values())
    parameters = parameters.child(layer) if layer and differ else parameters
    rope = f.child("rope_scaling") if f.data.get("rope_scaling") and not slides else parameters
    if has_local and rope is not parameters:
        rope.data = {"rope_type": "default", **parameters.data, **rope.data}
    if any(isinstance(value, dict) for value in rope.data.values()):
        raise ConfigError(f"{f.source}: rope_parameters that differ by layer type are not supported")
    default = f.number("rope_local_base_freq" if slides else "rope_theta", 10000.0, above=1)
    theta, lost = rope.number("rope_theta", default, above=1), parameters.data.get("rope_theta")
    if lost and f.data.get("rope_parameters") and not (rope.data.get("rope_theta") or f.data.get("rope_theta")):
        logger.warning("%s: rope_scaling replaces rope_parameters, rope_theta %s included", f.source, lost)
    name = rope.text("rope_type", rope.text("type", "default"))
    if (name := names.get(name, name)) not in ROPE_TYPES:
        raise ConfigError(f"{f.source}: rope type {name!r} not supported (supported: {', '.join(ROPE_TYPES)})")
    # Dynamic scaling starts at max_position_embeddings, whatever a file says; a layer's own, at what it says itself.
    told, outer = "original_max_position_embeddings", rope if layer else f
    original = max_position if name == "dynamic" else outer.integer(told, rope.integer(told, max_position))
    rotary_dim = _rotary_dim(f, rope, head_dim, is_partial or name == "proportional")
    keys = ("short_factor", "long_factor") if name == "longrope" else ()
    short, long = [_factors(rope, key, rotary_dim // 2) for key in keys] or [tuple(rope.list_of(float, "factors")), ()]
    scaling, beta = _numbers(f, rope, name, max_position, original), rope.number("llama_4_scaling_beta", 0.0, -1e-9)
    rotated = 0 if name == "proportional" else rotary_dim % head_dim
    config = RopeConfig(float(theta), name, original, scaling, short, long, rotated, query_beta=beta)
    return config, max_position if layer and name == "linear" else _longest(config, max_position)  # Gemma 3: scaled


def _rotary_dim(f: Fields, rope: Fields, head_dim: int, may_be_less: bool) -> int:
    share = rope.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0, above=0), above=0)
    rotary_dim = int(head_dim * share)
    if (share != 1 and not may_be_less) or share > 1 or rotary_dim < 2 or rotary_dim % 2:
        supported = f"up to 1, for an even part of {head_dim} features" if may_be_less else "1"
        raise ConfigError(f"{f.source}: partial_rotary_factor {share:g} not supported (supported: {supported})")
    return rotary_dim


def _numbers(f: Fields, rope: Fields, name: str, max_position: int, original: int) -> dict[str, float]:
    """Those of a type."""
    needed, optional = ROPE_TYPES[name]
    given = [key for key in (*needed, *optional) if rope.data.get(key) not in (None, 0)]
    numbers: dict[str, float] = {key: rope.number(key, 0.0, above=0) for key in given}
    if absent := [key for key in needed if key not in given]:
        raise ConfigError(f"{f.source}: rope type {name!r} needs {', '.join(absent)}")
    factor = numbers.get("factor", max_position / original)
    if name == "yarn":
        numbers |= {"factor": factor, "truncate": rope.boolean("truncate", True)}
        # Section 3.4: attention temperature; the two weights as DeepSeek's checkpoints use them.
        has_both = "mscale" in numbers and "mscale_all_dim" in numbers
        above, below = (numbers[key] for key in ("mscale", "mscale_all_dim")) if has_both else (1.0, 0.0)
        log = math.log(factor) if factor > 1 else 0.0
        numbers.setdefault("attention_factor", (0.1 * above * log + 1.0) / (0.1 * below * log + 1.0))
    if name == "longrope":
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
        numbers.setdefault("attention_factor", scale)
    return numbers


def _factors(rope: Fields, key: str, num: int) -> tuple[float, ...]:
    values: Any = rope.data.get(key)
    are_numbers = isinstance(values, list) and all(type(x) in (int, float) and 0 < x < MAX_NUMBER for x in values)
    if not are_numbers or len(values) != num:
        raise rope.wrong(key, f"a list of {num} numbers above 0")
    return tuple(map(float, values))


def _longest(rope: RopeConfig, max_position: int) -> int:
    """The longest sequence, in tokens: `max_position_embeddings`, with linear and dynamic times the factor unless the
    original length is another. With yarn at least the original length times the factor: files have either, or more."""
    factor = rope.scaling.get("factor", 1.0)
    if rope.type == "yarn":
        return max(max_position, int(min(rope.max_position * factor, MAX_INT)))
    if rope.type in ("linear", "dynamic") and rope.max_position == max_position:
        return max(1, int(min(max_position * factor, MAX_INT)))
    return max_position
