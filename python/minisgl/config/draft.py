"""Who guesses what a model will say (`--draft-model`): a small model of the same vocabulary, or an EAGLE-3 head."""

from dataclasses import replace
from pathlib import Path

from minisgl.config.args import ServerArgs
from minisgl.config.families import parse_model_config, read_model_config
from minisgl.config.locate import locate_model, read_fields, split_revision
from minisgl.config.model import ModelConfig
from minisgl.errors import ConfigError
from minisgl.utils.fields import Fields

_TARGETS = "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
_AUX = "eagle_aux_hidden_state_layer_ids"


def with_draft(args: ServerArgs, path: Path, model: ModelConfig, device: str | None) -> tuple[ServerArgs, ModelConfig]:
    """Both, with what `--draft-model` names. Raises: ConfigError with one reason why that cannot guess for the model,
    which is at `path`."""
    if (given := args.draft_model) is None:
        return args, model
    try:
        name, revision = split_revision(given, None)
        where = locate_model(name, args.model_source, revision)
        told = read_eagle(where, model) or replace(model, second=(str(where), read_model_config(where)))
    except ConfigError as error:
        raise ConfigError(f"--draft-model: {error}".replace(": --model ", " ")) from None
    assert told.second is not None
    (_, draft), is_head = told.second, told.mtp is not None
    words, others = (read_fields(each / "tokenizer.json").child("model").data.get("vocab") for each in (path, where))
    is_same = is_head or (draft.vocab_size == model.vocab_size and (None in (words, others) or words == others))
    is_alike = not is_head or draft.num_qo_heads == model.num_qo_heads  # as its attention is the model's
    fits = device != "cuda" or (is_alike and len({*(told if is_head else draft).caches()}) == 1)
    what = "a head with the model's attention heads" if is_head else "a model whose layers have caches alike"
    problems = {
        f"on GPUs so far only {what}; choose another, or --device cpu": not fits,
        f"not with --speculate {args.speculate}": args.speculate not in (None, "off"),
        f"its vocabulary ({draft.vocab_size} tokens) is not that of {path} ({model.vocab_size})": not is_same,
        "it has recurrent states": bool(draft.states),
        "it has other sliding windows": draft.window not in (0, model.window),
    }
    if problem := next((text for text, applies in problems.items() if applies), ""):
        raise ConfigError(f"--draft-model {given}: {problem}")
    return replace(args, speculate="eagle" if is_head else "model"), told


def read_eagle(path: Path, model: ModelConfig) -> ModelConfig | None:
    """A model whose last cache is that of its head, which is at `path`; None: it is no head. Raises: ConfigError."""
    f, num, vocab_size = read_fields(path / "config.json"), model.num_layers, model.vocab_size
    if not any("eagle3" in name.lower() for name in f.list_of(str, "architectures")):
        return None
    nested = f.child("transformer_layer_config").data  # in the form of vLLM's tools
    f = Fields({**f.data, **nested}, f.source)
    sizes = {"hidden_size": model.hidden_size, "vocab_size": vocab_size, "num_hidden_layers": 1}
    for key, wanted in sizes.items():
        if f.integer(key, wanted) != wanted:
            raise f.wrong(key, f"{wanted} in a head for this model")
    if model.architecture not in _TARGETS:
        raise ConfigError(f"{f.source}: a head of EAGLE for {model.architecture} (supported: {', '.join(_TARGETS)})")
    family = "Qwen3ForCausalLM" if f.text("model_type", "") == "qwen3" else "LlamaForCausalLM"
    known = {"architectures": [family], "vocab_size": f.integer("draft_vocab_size", vocab_size, most=vocab_size)}
    head = parse_model_config(Fields({**f.data, **known, "tie_word_embeddings": True}, f.source))
    aux = f.list_of(int, _AUX) or [i + 1 for i in f.child("eagle_config").list_of(int, _AUX)] or [2, num // 2, num - 3]
    if len({*aux}) < 2 or not 0 < min(aux) <= max(aux) <= num:
        raise ConfigError(f"{f.source}: a head that reads behind layers {aux} of {num}")
    (layer,), before = head.layers, f.boolean("norm_before_residual", bool(nested))
    attention, norms = replace(layer.attention, rope_index=len(model.ropes)), replace(layer.norms, before_attention="")
    layer = replace(layer, attention=attention, norms=norms)
    head = replace(head, layers=(), aux_layers=tuple(sorted({*aux})), norms_residual=before)
    return replace(model, second=(str(path), head), mtp=layer, ropes=(*model.ropes, *head.ropes[:1]))
