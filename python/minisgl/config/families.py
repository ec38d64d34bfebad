"""From `config.json` to a `ModelConfig`. What each supported architecture reads there is in `families.yaml`."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minisgl.config.chat import read_ends
from minisgl.config.locate import check_directory, listing, no_model, read_fields, read_json
from minisgl.config.model import AttentionSpec, DenseMLP, LayerNorms, LayerSpec, ModelConfig, MoE, PagedKV, RopeConfig
from minisgl.config.quantization import read_quantization
from minisgl.config.rope import TABLE, read_rope
from minisgl.config.states import DeltaNet, ShortConv, State
from minisgl.errors import ConfigError
from minisgl.gguf.model import is_gguf
from minisgl.utils.fields import Fields, merge
from minisgl.utils.math import div_ceil

MAX_LAYERS = 4096
_ACTIVATIONS: dict[str, str] = TABLE["activations"]
_STATES: dict[str, type[State]] = {"conv": ShortConv, "linear_attention": DeltaNet}
_REQUIRED = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of `families.yaml`, which says what the fields mean."""

    model_type: str
    defaults: Mapping[str, Any]
    fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    scales_embedding: bool = False
    rope_names: Mapping[str, str] = field(default_factory=dict)
    ropes_by_layer: bool = False
    kind: str = "sliding_attention"
    still: str = ""
    experts: Sequence[str] = ()
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    inner: str = ""


FAMILIES = {name: Family(**fields) for name, fields in TABLE["architectures"].items()}


class FamilyFields(Fields):
    """`config.json` as a family reads it: without what others read, and with its defaults."""

    def __init__(self, data: Mapping[str, Any], source: str, path: str, family: Family) -> None:
        super().__init__(data, source, path)
        self.family = family

    def _read(self, name: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        keys, defaults = self.family.keys, self.family.defaults
        key = keys.get(name, "" if name in TABLE["read_by_some"] and name not in defaults else name)
        if not key:
            return defaults.get(name, default)
        value = super()._read(key, None, fits, expected)
        if value is None and not (key in self.data and key in TABLE["nullable"]):
            value = defaults.get(key)
        return default if value is None else value

    def fields_of(self, specification: type) -> dict[str, Any]:
        """What `families.yaml` says of a specification's fields: values of `config.json`, or the family's own."""
        name = specification.__name__
        read = {key: getattr(self, kind)(*rest) for key, (kind, *rest) in TABLE["fields"].get(name, {}).items()}
        return {**read, **self.family.fields.get(name, {})}


def read_model_config(path: str | Path, override: Mapping[str, Any] | None = None, mtp: bool = False) -> ModelConfig:
    """Read `config.json` of a local Hugging Face model directory, and the ends that its other files name.

    override: merged into `config.json` before it is read. mtp: whether the head for multi-token prediction is used.
    Raises: ConfigError naming the missing file, the value of the wrong kind, or what is not supported.
    """
    path = Path(path)
    check_directory(path)
    fields = Fields(merge(read_json(path / "config.json"), override or {}), str(path / "config.json"))
    model = parse_model_config(fields)
    if (quantization := read_quantization(fields, path)) is not None:
        tables = (2 - model.tie_word_embeddings) * model.vocab_size * model.hidden_size
        each = max(s.bits / 8 + 4 / (s.group or model.hidden_size) for s in quantization.schemes)
        size = int(2 * tables + each * (model.weight_bytes("int8") - tables))  # of a shape, which has no weights
        stored = sum(file.stat().st_size for file in path.glob("model*.safetensors"))
        model = replace(model, quantization=quantization, packed_bytes=stored or size)
    return replace(model, eos_token_ids=read_ends(path, fields, model.vocab_size), mtp=model.mtp if mtp else ())


def weight_files(path: Path) -> list[Path]:
    """The files with the model's weights, in transformers' order of preference: safetensors in one file, or as the
    index has them; then the same for files of torch. Raises: ConfigError saying what is missing."""
    if is_gguf(path):
        return [path]
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (path / whole).is_file():
            return [path / whole]
        weights = read_fields(path / f"{whole}.index.json").child("weight_map")
        names = sorted({weights.text(tensor, "") for tensor in weights.data})
        if missing := [name for name in names if not (path / name).is_file()]:
            raise ConfigError(f"{str(path)!r} is incomplete: {listing(missing)} missing")
        if names:
            return [path / name for name in names]
    raise no_model(path, "model.safetensors")


def parse_model_config(f: Fields) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`, but for `eos_token_ids`.

    Raises: ConfigError naming what is missing, of the wrong kind, or unsupported, and what is supported.
    """
    f = _text_model(f, FAMILIES[architecture := _architecture(f)])
    family = f.family
    if missing := [key for key in _REQUIRED if f.data.get(key) is None and key not in family.defaults]:
        raise ConfigError(f"{f.source}: {', '.join(missing)} missing")
    told = {**family.defaults, **{key: value for key, value in f.data.items() if value is not None}}
    for key, values in {**TABLE["only"], **family.only}.items():
        if told.get(key) is not None and told[key] not in values:
            raise f.wrong(key, " or ".join(map(json.dumps, values)))
    read = f.fields_of(ModelConfig)
    layers, ropes, max_position = _layers(f)
    # The stream is held smaller by this factor of what layers add, since all that reads it is a norm.
    residual = f.number("residual_multiplier", 1.0, above=0)
    root = read["hidden_size"] ** 0.5 if family.scales_embedding else 1.0
    embedding = f.number("embedding_multiplier", root, above=0)
    if read["layer_inputs"] and f.integer(key := "vocab_size_per_layer_input", 0) != read["vocab_size"]:
        raise f.wrong(key, f"vocab_size, {read['vocab_size']}")
    return ModelConfig(
        architecture=architecture,
        head_dim=_heads(f).k_dim,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, above=0) / residual**2,
        ropes=ropes,
        max_position=max_position,
        tie_word_embeddings=f.boolean("tie_embedding", f.boolean("tie_word_embeddings", False)),
        dtype=(f.text("dtype", None) or f.text("torch_dtype", None) or "float32").removeprefix("torch."),
        layers=layers,
        mtp=_mtp(f, layers),
        embedding_scale=embedding / residual,
        logit_scale=1 / f.number("logits_scaling", 1.0, above=0),
        **read,
    )


def _text_model(f: Fields, family: Family) -> FamilyFields:
    """What a family reads; of a model that sees or hears, of its text model, and of both, as that model's family."""
    if not family.inner:
        return FamilyFields(f.data, f.source, "", family)
    text, shared = f.child(family.inner), ("tie_word_embeddings", "dtype", "torch_dtype", "packed_bytes")
    given, kind = {key: f.data[key] for key in shared if f.data.get(key) is not None}, text.text("model_type", "")
    own = next((one for one in FAMILIES.values() if one.model_type == kind and not one.inner), family)
    return FamilyFields({**text.data, **given}, f.source, f"{family.inner}.", own)


def _layers(f: FamilyFields) -> tuple[tuple[LayerSpec, ...], tuple[RopeConfig, ...], int]:
    """With the tables that rotate them, and the longest sequence."""
    kinds = _kinds(f)
    window = f.integer("sliding_window", None) if f.boolean("use_sliding_window", True) else None
    ropes, rope_of_layer, longest = _ropes(f, kinds)
    near = AttentionSpec(_heads(f), window, **f.fields_of(AttentionSpec))
    full = replace(near, cache=_heads(f, kinds), window=None, values_are_keys=f.boolean("attention_k_eq_v", False))
    of_kind = {"sliding_attention": near, "full_attention": full}
    if state := _STATES.get(f.family.kind):
        of_kind[f.family.kind] = AttentionSpec(net := state(**f.fields_of(state)))
        if isinstance(net, DeltaNet) and net.num_v_heads % net.num_k_heads:
            raise f.wrong("linear_num_value_heads", f"a multiple of the heads of keys, {net.num_k_heads}")
    num_own = len(kinds) - f.integer("num_kv_shared_layers", 0, 0, len(kinds) - 1)
    owners = {kind: i for i, kind in enumerate(kinds[:num_own])}
    if not set(kinds) <= set(owners):
        raise f.wrong("num_kv_shared_layers", "fewer, with a layer of each kind before them")
    sources = [owners[kind] if i >= num_own else None for i, kind in enumerate(kinds)]
    chosen = zip(kinds, rope_of_layer, sources, strict=True)
    attentions = [replace(of_kind[kind], rope_index=rope, source=source) for kind, rope, source in chosen]
    norms = [LayerNorms(**f.fields_of(LayerNorms))] * len(kinds)
    return tuple(map(LayerSpec, attentions, _mlps(f, sources), norms)), ropes, longest


def _mtp(f: Fields, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layer of the head for multi-token prediction, if there is one: like the model's last with keys and values."""
    if f.integer("mtp_num_hidden_layers", 0, 0) != 1:
        return ()
    spec = [layer for layer in layers if isinstance(layer.attention.cache, PagedKV)][-1]
    size = f.integer("mtp_intermediate_size", spec.mlp.intermediate_size)
    return (replace(spec, mlp=replace(spec.mlp, intermediate_size=size)) if isinstance(spec.mlp, DenseMLP) else spec,)


def _heads(f: Fields, kinds: Sequence[str] = ()) -> PagedKV:
    """Heads of attention. kinds: of all layers, to get the heads of those that see all (Gemma 4: of other size)."""
    num_heads, told = f.integer("num_attention_heads", 0), f.child("per_layer_config")
    num_kv = f.integer("num_key_value_heads", num_heads)
    dim = f.integer("head_dim", f.integer("hidden_size", 0) // num_heads)
    full = [str(i) for i, kind in enumerate(kinds) if kind == "full_attention"]
    if full and told.data:
        told.data = {key.lstrip("0") or "0": value for key, value in told.data.items()}  # some are padded: "04"
        one = told.child(full[0])
        if one.data.keys() - {"head_dim", "num_key_value_heads"} or told.data != dict.fromkeys(full, one.data):
            raise f.wrong("per_layer_config", "one head_dim and num_key_value_heads, for layers of full attention")
        num_kv, dim = one.integer("num_key_value_heads", num_kv), one.integer("head_dim", dim)
    elif full:
        num_kv = f.integer("num_global_key_value_heads", num_kv) if f.boolean("attention_k_eq_v", False) else num_kv
        dim = f.integer("global_head_dim", dim)
    if num_heads % num_kv:
        raise ConfigError(f"{f.source}: {num_kv} key-value heads do not divide {num_heads} attention heads")
    if dim < 2 or dim % 2:
        raise ConfigError(f"{f.source}: head_dim is {dim}, but rotary embeddings need an even one")
    return PagedKV(num_kv, dim, dim)


def _kinds(f: FamilyFields) -> list[str]:
    """Of each layer, as `layer_types` names them: what the file says, or every n-th layer, or the first, see all."""
    family = f.family
    num_layers, is_told = f.integer("num_hidden_layers", 0, most=MAX_LAYERS), f.data.get("layer_types") is not None
    kinds = f.list_of(str, "layer_types")[: None if is_told else num_layers]  # a family's default may have more
    known = dict.fromkeys(("full_attention", "attention", family.kind, *["sliding_attention"] * family.ropes_by_layer))
    if told := ", ".join(sorted(set(kinds) - set(known))):
        raise ConfigError(f"{f.source}: layer_types {told} not supported (supported: {', '.join(known)})")
    if kinds and len(kinds) != num_layers:
        raise ConfigError(f"{f.source}: layer_types has {len(kinds)} entries, but num_hidden_layers is {num_layers}")
    if not kinds or "layer_types" not in family.defaults:
        num_full = num_layers if family.kind == "conv" else f.integer("max_window_layers", 0, 0, MAX_LAYERS)
        full = f.list_of(int, "full_attn_idxs") or range(num_full)
        if step := f.integer("interval", 0):
            full = [i for i in range(num_layers) if not (i + 1) % step or i >= f.integer("max_window_layers", i + 1, 0)]
        kinds = ["full_attention" if i in full else family.kind for i in range(num_layers)]
    kinds = ["full_attention" if kind == "attention" else kind for kind in kinds]  # which is an older name
    if "num_kv_shared_layers" in family.defaults:
        kinds[-1] = "full_attention"  # as transformers has it for Gemma 4
    if set(kinds) == {family.kind} != {"sliding_attention"}:
        raise ConfigError(f"{f.source}: a model all of whose layers are {family.kind} is not supported")
    return kinds


def _ropes(f: FamilyFields, kinds: list[str]) -> tuple[tuple[RopeConfig, ...], list[int], int]:
    """The tables, which of them each layer has, and the longest sequence."""
    longest, family = f.integer("max_position_embeddings", 0), f.family

    def table(dim: int, layer: str = "") -> tuple[RopeConfig, int]:
        score = f.number("query_pre_attn_scalar", float(dim), above=0) ** -0.5
        scale = (f.number("attention_multiplier", score, above=0) * dim**0.5) ** 0.5
        rope, reached = read_rope(f, dim, longest, layer, family.rope_names, "partial_rotary_factor" in family.defaults)
        return replace(rope, scale=scale, **f.fields_of(RopeConfig)), reached

    if family.ropes_by_layer:
        near, _ = table(_heads(f).k_dim, "sliding_attention")
        far, longest = table(_heads(f, kinds).k_dim, "full_attention")
        return (far, near), [int(kind == "sliding_attention") for kind in kinds], longest
    rope, longest = table(_heads(f).k_dim)
    every, window = f.integer("no_rope_layer_interval", 1), f.integer("sliding_window", 0) if family.still else 0
    moved = [not (window and kind == family.still) and (every == 1 or (i + 1) % every) for i, kind in enumerate(kinds)]
    rotated = f.list_of(int, "no_rope_layers") or moved
    if len(rotated) != len(kinds):
        raise f.wrong("no_rope_layers", f"as many as layers, {len(kinds)}")
    still = replace(rope, type="proportional", scaling={"partial_rotary_factor": 0.0})
    return (rope,) if all(rotated) else (rope, still), [int(not rotates) for rotates in rotated], longest


def _inner_size(f: Fields) -> int:
    """Features of an MLP; LFM2's files name what two thirds of are meant, rounded up to a multiple."""
    size = f.integer("block_ff_dim", f.integer("shared_intermediate_size", f.integer("intermediate_size", 0)))
    if not f.boolean("block_auto_adjust_ff_dim", False):
        return size
    size, multiple = int(f.number("block_ffn_dim_multiplier", 1.0, above=0) * int(2 * size / 3)), "block_multiple_of"
    return max(1, div_ceil(size, f.integer(multiple, 256))) * f.integer(multiple, 256)


def _mlps(f: FamilyFields, sources: Sequence[int | None]) -> list[DenseMLP | MoE]:
    """Of each layer: experts in every `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    if (name := f.text(key := f.family.keys.get("hidden_act", "hidden_act"), "silu")) not in _ACTIVATIONS:
        raise ConfigError(f"{f.source}: {key} {name!r} not supported (supported: {', '.join(_ACTIVATIONS)})")
    size, num_experts, activation = _inner_size(f), 0, _ACTIVATIONS[name]
    dense = DenseMLP(size, f.boolean("mlp_bias", False), activation)
    for key in f.family.experts:
        num_experts = f.integer(key, num_experts, 0)
    top_k, inner = f.integer("num_experts_per_tok", 0, min(num_experts, 1)), f.integer("moe_intermediate_size", size)
    moe = MoE(num_experts, top_k, inner, **{"activation": activation, **f.fields_of(MoE)})
    only, step = f.list_of(int, "mlp_only_layers"), f.integer("decoder_sparse_step", 1)
    sparse = [i not in only and num_experts > 0 and (i + 1) % step == 0 for i in range(len(sources))]
    if any(sparse) and top_k > num_experts:
        raise f.wrong("num_experts_per_tok", f"at most the number of experts, {num_experts}")
    wide = replace(dense, intermediate_size=2 * size) if f.boolean("use_double_wide_mlp", False) else dense
    return [moe if has else dense if source is None else wide for has, source in zip(sparse, sources, strict=True)]


def _architecture(f: Fields) -> str:
    """The first of `architectures` that is supported; without that key, the one of `model_type`, as in transformers."""
    names = f.list_of(str, "architectures")
    if not names:
        names = [name for name, family in FAMILIES.items() if family.model_type == f.text("model_type", None)]
    # A file may name the model without its head (`LlamaModel`); whether it has one, the weights tell.
    end = "ForConditionalGeneration" if f.data.get("text_config") else "ForCausalLM"
    for name in (re.sub("(Text)?(Model|ForSequenceClassification)$", end, name) for name in names):
        if name in FAMILIES:
            return name
    known = ", ".join(name.removesuffix("ForCausalLM") for name, family in FAMILIES.items() if not family.inner)
    names = names or [f.text("model_type", "none given")]
    hints = [f"missing: {it}; " for begin, it in TABLE["missing"].items() if names[0].lower().startswith(begin.lower())]
    hints = hints or [f"nearest: {name}; " for name in get_close_matches(names[0], FAMILIES, 1)]
    known = "".join(hints) + f"supported: {known}, each ForCausalLM"
    raise ConfigError(f"{f.source}: architecture not supported: {', '.join(names)[:80]} ({known})")
