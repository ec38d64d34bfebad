"""Who guesses what a model will say (`--draft-model`): a small model of the same vocabulary, or a head."""

from dataclasses import replace
from pathlib import Path

from minisgl.config.args import ServerArgs
from minisgl.config.families import parse_model_config, read_model_config
from minisgl.config.locate import locate_model, read_fields, split_revision
from minisgl.config.model import ModelConfig
from minisgl.errors import ConfigError
from minisgl.utils.fields import MAX_INT, Fields

_TARGETS = "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
_AUX = "eagle_aux_hidden_state_layer_ids"


def longest_draft(kind: str, asked: int | None, is_free: bool, states: object = ()) -> int:
    """The most tokens of a request that a step may verify (31: one less than a tile). asked: None, no flag says it.
    is_free: drafts have no graphs and no buffers; then predictions are verified with "off", too. states: of layers."""
    told = {"mtp": 8 if is_free else 3, "model": 4, "eagle": 4, "dflash": 7}
    return 0 if kind == "off" and not is_free else asked or told.get(kind, 8 if states else 15 if is_free else 31)


def with_draft(args: ServerArgs, path: Path, model: ModelConfig, device: str | None) -> tuple[ServerArgs, ModelConfig]:
    """Both, with what `--draft-model` names. Raises: ConfigError with a reason why that cannot guess for the model."""
    if (given := args.draft_model) is None:
        return args, model
    try:
        name, revision = split_revision(given, None)
        where = locate_model(name, args.model_source, revision)
        told = read_head(where, model) or replace(model, second=(str(where), read_model_config(where)))
    except ConfigError as error:
        raise ConfigError(f"--draft-model: {error}".replace(": --model ", " ")) from None
    assert told.second is not None
    (_, draft), is_head = told.second, bool(told.mtp)
    words, others = (read_fields(each / "tokenizer.json").child("model").data.get("vocab") for each in (path, where))
    is_same = is_head or (draft.vocab_size == model.vocab_size and (None in (words, others) or words == others))
    is_alike = not is_head or draft.num_qo_heads == model.num_qo_heads  # as its attention is the model's
    fits = device != "cuda" or (is_alike and len({*(told if is_head else draft).caches()}) == 1)
    windows = {draft.window, *(each.attention.window or 0 for each in told.mtp)} - {0, model.window}
    what = "a head with the model's attention heads" if is_head else "a model whose layers have caches alike"
    problems = {
        f"on GPUs so far only {what}; choose another, or --device cpu": not fits,
        f"not with --speculate {args.speculate}": args.speculate not in (None, "off"),
        f"its vocabulary ({draft.vocab_size} tokens) is not that of {path} ({model.vocab_size})": not is_same,
        "it has recurrent states": bool(draft.states),
        "it has other sliding windows": bool(windows),
    }
    if problem := next((text for text, applies in problems.items() if applies), ""):
        raise ConfigError(f"--draft-model {given}: {problem}")
    kind, most = ("dflash", draft.block[0] - 1) if draft.block else ("eagle" if is_head else "model", MAX_INT)
    num = min(most, longest_draft(kind, args.speculate_tokens, is_free=False))
    return replace(args, speculate=kind, speculate_tokens=num), told


def read_head(path: Path, model: ModelConfig) -> ModelConfig | None:
    """A model whose last caches are those of its head, which is at `path`; None: it is no head. Raises: ConfigError."""
    f, num, vocab_size = read_fields(path / "config.json"), model.num_layers, model.vocab_size
    names, nested = f.list_of(str, "architectures"), f.child("transformer_layer_config").data  # of vLLM's tools
    if not (is_block := "DFlashDraftModel" in names) and not any("eagle3" in name.lower() for name in names):
        return None
    f, told = Fields({**f.data, **nested}, f.source), f.child("dflash_config")
    sizes = {"hidden_size": model.hidden_size, "vocab_size": vocab_size}
    for key, wanted in (sizes | ({"num_target_layers": num} if is_block else {"num_hidden_layers": 1})).items():
        if f.integer(key, wanted) != wanted:
            raise f.wrong(key, f"{wanted} in a head for this model")
    if model.architecture not in _TARGETS:
        raise ConfigError(f"{f.source}: a {names[0]} for {model.architecture} (supported: {', '.join(_TARGETS)})")
    family = "Qwen3ForCausalLM" if is_block or f.text("model_type", "") == "qwen3" else "LlamaForCausalLM"
    known = {"architectures": [family], "vocab_size": f.integer("draft_vocab_size", vocab_size, most=vocab_size)}
    head = parse_model_config(Fields({**f.data, **known, "tie_word_embeddings": True}, f.source))
    aux = f.child("eagle_config").list_of(int, _AUX) or told.list_of(int, "target_layer_ids")
    aux = f.list_of(int, _AUX) or [i + 1 for i in aux] or [2, num // 2, num - 3]
    aux = aux if is_block else sorted({*aux})
    if len({*aux}) < 2 or not 0 < min(aux) <= max(aux) <= num - is_block:  # behind the last one DFlash has the norm
        raise ConfigError(f"{f.source}: a head that reads behind layers {aux} of {num}")
    if (mask := told.integer("mask_token_id", None, 0, vocab_size - 1)) is None and is_block:
        raise told.wrong("mask_token_id", "a token of the model")
    before, layers = None if is_block else f.boolean("norm_before_residual", bool(nested)), []
    for layer in head.layers:  # of EAGLE's, what goes into attention has other norms
        norms = replace(layer.norms, before_attention=layer.norms.before_attention * is_block)
        layers.append(replace(layer, attention=replace(layer.attention, rope_index=len(model.ropes)), norms=norms))
    block = None if mask is None else (told.integer("block_size", f.integer("block_size", 16, 2), 2), mask)
    head = replace(head, layers=(), aux_layers=tuple(aux), norms_residual=before, block=block)
    return replace(model, second=(str(path), head), mtp=tuple(layers), ropes=(*model.ropes, *head.ropes[:1]))
