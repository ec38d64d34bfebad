"""What `config.json` says of an EAGLE-3 head: a decoder layer that guesses for one model, from what that makes of tokens."""

from dataclasses import replace
from pathlib import Path

from minisgl.config.families import parse_model_config
from minisgl.config.locate import read_fields
from minisgl.config.model import ModelConfig
from minisgl.errors import ConfigError
from minisgl.utils.fields import Fields

_TARGETS = "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
_AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"


def read_eagle(path: Path, model: ModelConfig) -> ModelConfig | None:
    """The head at `path`, whose vocabulary is that of its drafts; None: what is there is no such head.

    Raises: ConfigError with one reason why it cannot guess for `model`.
    """
    f = read_fields(path / "config.json")
    names = f.list_of(str, "architectures")
    if not any("eagle3" in name.lower() for name in names):
        return None
    outer, f = f, Fields({**f.data, **f.child("transformer_layer_config").data}, f.source)  # one file format has that
    vocab_size, is_nested = f.integer("vocab_size", model.vocab_size), f.data != outer.data
    family = "Qwen3ForCausalLM" if f.text("model_type", "") == "qwen3" else "LlamaForCausalLM"
    known = {"architectures": [family], "vocab_size": f.integer("draft_vocab_size", vocab_size)}
    head = parse_model_config(Fields({**f.data, **known, "tie_word_embeddings": True}, f.source))
    told, num = f.child("eagle_config").list_of(int, _AUX_LAYERS), model.num_layers
    aux = tuple(sorted({*(f.list_of(int, _AUX_LAYERS) or [i + 1 for i in told] or (2, num // 2, num - 3))}))
    problems = {
        f"it is for {', '.join(_TARGETS)}, not for {model.architecture}": model.architecture not in _TARGETS,
        f"its hidden size is {head.hidden_size}, the model's {model.hidden_size}": head.hidden_size != model.hidden_size,
        f"it is for {vocab_size} tokens, the model has {model.vocab_size}": vocab_size != model.vocab_size,
        f"it guesses {head.vocab_size} tokens of {vocab_size}": head.vocab_size > vocab_size,
        f"it has {head.num_layers} layers, not 1": head.num_layers != 1,
        f"it reads behind layers {[*aux]} of {num}": len(aux) < 2 or aux[0] < 1 or aux[-1] > num,
    }
    if problem := next((text for text, applies in problems.items() if applies), ""):
        raise ConfigError(f"--draft-model {path}: {problem}")
    if not any(f.data.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling")):
        head = replace(head, ropes=model.ropes)
    norms = replace(head.layers[0].norms, before_attention="hidden_norm")
    before = f.boolean("norm_before_residual", is_nested)
    return replace(head, layers=(replace(head.layers[0], norms=norms),), aux_layers=aux, norms_residual=before)
