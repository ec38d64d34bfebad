"""What `config.json` says of a model's head for multi-token prediction."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from minisgl.config.model import DenseMLP, LayerSpec, PagedKV
from minisgl.utils.fields import Fields


def longest_draft(kind: str, asked: int | None, is_free: bool) -> int:
    """The most tokens of a request that a step may verify. kind: of drafter; asked: None, no flag says it. is_free:
    drafts need no graphs and no buffers for which others pay; then predictions are verified with "off", too."""
    usual = {"mtp": 8 if is_free else 3, "model": 4, "eagle": 4}.get(kind, 8)
    return 0 if kind == "off" and not is_free else asked or usual


def stores_head(names: Collection[str]) -> bool:
    """Whether a checkpoint with such tensors has those of a head, as they are and not packed."""
    own = {name for name in names if name.startswith("mtp.")}
    needed = {f"mtp.{name}.weight" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return needed <= own and all(name.endswith(".weight") for name in own)


def read_mtp(f: Fields, layers: Sequence[LayerSpec]) -> LayerSpec | None:
    """The layer of the head, if there is one: as the last of the model that has keys and values."""
    if f.integer("mtp_num_hidden_layers", 0, 0) != 1:
        return None
    spec = [layer for layer in layers if isinstance(layer.attention.cache, PagedKV)][-1]
    size = f.integer("mtp_intermediate_size", spec.mlp.intermediate_size)
    return replace(spec, mlp=replace(spec.mlp, intermediate_size=size)) if isinstance(spec.mlp, DenseMLP) else spec
