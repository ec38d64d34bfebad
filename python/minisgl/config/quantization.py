"""How a checkpoint says that its weights are quantized. What of it is supported is in `quantization.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from minisgl.config.locate import read_fields
from minisgl.errors import ConfigError
from minisgl.utils.fields import Fields

_TABLE = msgspec.yaml.decode(Path(__file__).with_name("quantization.yaml").read_bytes())


@dataclass(frozen=True, slots=True)
class Scheme:
    """bits of a weight; group: columns with one scale (0: all of a row); targets: names of modules, as patterns."""

    bits: int
    group: int
    targets: tuple[str, ...]  # "Linear": all


@dataclass(frozen=True, slots=True)
class Quantization:
    """layout: of `quantization.yaml`; ignored: names of modules that are stored in full, as patterns."""

    layout: str
    schemes: tuple[Scheme, ...]
    ignored: tuple[str, ...]
    zero_offset: int  # of what is stored for a zero


def read_quantization(f: Fields, path: Path) -> Quantization | None:
    """What the fields of `config.json` say, or ModelOpt's own file in the directory; None: nothing is quantized.

    Raises: ConfigError naming what is not supported, and what to take instead."""
    key = "compression_config" if f.data.get("compression_config") else "quantization_config"
    q = f.child(key) if f.data.get(key) else read_fields(path / "hf_quant_config.json").child("quantization")
    if not q.data:
        return None
    method = q.text("quant_method", "modelopt")
    kind = {"compressed-tensors": "format", "modelopt": "quant_algo"}.get(method, "quant_method")
    groups = [q.child("config_groups").child(name) for name in q.child("config_groups").data] or [q]
    dynamic = list(q.child("dynamic").data)  # of GPTQ: modules that are stored in full, or in another way
    names = {group.text(kind, q.text(kind, "unknown")) for group in groups}
    names |= {f"dynamic {pattern}" for pattern in dynamic if not pattern.startswith("-:")}
    name = " and ".join(sorted(names))
    if name not in _TABLE["formats"]:
        hint = _TABLE["instead"].get(name, _TABLE["instead"][None])
        raise ConfigError(f"{q.source}: quantization {method} ({name}) is not supported; {hint}")
    rules = _TABLE["formats"][name]
    schemes = tuple(_scheme(group, rules, f"{q.source}: quantization {name}") for group in groups)
    ignored = [p for key in _TABLE["ignored"] for p in q.list_of(str, key)] + [f"re:{p[2:]}" for p in dynamic]
    zero_offset = int(name == "gptq" and q.text("checkpoint_format", "gptq") == "gptq")
    return Quantization(rules["layout"], schemes, tuple(ignored), zero_offset)


def _scheme(group: Fields, rules: Mapping[str, Any], what: str) -> Scheme:
    weights = group.child("weights") if "weights" in group.data else group
    for key, allowed in rules["requires"].items():
        if (value := weights.data.get(key)) is not None and value not in allowed:
            raise ConfigError(f"{what}: {key} {value} is not supported ({allowed}); {_TABLE['instead'][None]}")
    default = weights.integer("num_bits", rules.get("bits", 8))
    bits, size = weights.integer("bits", default), weights.integer("group_size", 0, -1)
    return Scheme(bits, max(0, size), tuple(group.list_of(str, "targets")) or ("Linear",))
