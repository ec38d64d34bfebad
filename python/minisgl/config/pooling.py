"""Whether a model gives vectors or scores, as its files say: those of sentence-transformers, or its class's name."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml
from safetensors import SafetensorError, safe_open

from minisgl.config.locate import read_fields
from minisgl.errors import ConfigError
from minisgl.utils.fields import MAX_INT, Fields

TASKS = ("generate", "embed", "embed-mean", "score")
TEXTS = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())


@dataclass(frozen=True, slots=True)
class Pooling:
    """What becomes of the hidden states of a prompt. kind: "last", "mean" or "score", as in `SamplingParams.pooling`.

    generates: there is a head for text, too. prompts: what comes before a text, or the instruction of a score, by name;
    prompt: the one without a name. has_roles: texts are messages of a chat with roles for query and document; kwargs:
    what else its template is told. is_normalized: vectors have length 1. label_ids: tokens the difference of whose
    logits is the score, or one whose logit is; (): there is a classifier. longest: tokens of a text that count; 0: all.
    """

    kind: str
    generates: bool
    prompt: str
    prompts: Mapping[str, str] = field(default_factory=dict)
    has_roles: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_normalized: bool = False
    label_ids: tuple[int, ...] = ()
    longest: int = 0


def read_pooling(task: str | None, path: Path, is_tied: bool, template: str) -> Pooling | None:
    """task: one of TASKS; None: as the files say. is_tied: the embedding is the head. template: of chats.

    Raises: ConfigError naming the file, and what of it is not supported.
    """
    config, told = read_fields(path / "config.json"), read_fields(path / "config_sentence_transformers.json")
    name, modules = (config.list_of(str, "architectures") or [""])[0], _modules(path / "modules.json")
    is_classifier, is_bare = name.endswith("ForSequenceClassification"), name.endswith("Model")
    stored = TEXTS["stored"].get(str(config.data.get("pooling_type")), "generate")
    likely = "score" if is_classifier or "LogitScore" in modules else "embed" if is_bare or modules else stored
    if (task := task or likely) == "generate":
        return None
    inputs = read_fields(path / "sentence_bert_config.json")
    kwargs = inputs.child("processing_kwargs")
    for f, key in ((inputs, "do_lower_case"), (told, "truncate_dim"), (kwargs, "text"), (kwargs, "common")):
        if f.data.get(key) and f.data[key] not in TEXTS["harmless"]:
            raise ConfigError(f"{f.source}: {key} {f.data[key]!r} is not supported")
    given = kwargs.child("chat_template").data or ({} if modules else TEXTS["kwargs"])
    texts, generates = told.child("prompts"), not is_classifier and ((is_tied and not is_bare) or _has_head(path))
    prompts = {key: texts.text(key, "") for key in texts.data}
    default = prompts.get(told.text("default_prompt_name", ""), "")
    if task == "score":
        if not template:
            raise ConfigError("--task score: the model has no chat template for queries and documents: --chat-template")
        if is_classifier and len(config.child("id2label").data) != 1:
            raise ConfigError(f"{config.source}: a classifier needs one label, whose sigmoid is the score (id2label)")
        labels, has_roles = () if is_classifier else _labels(path, modules), "'document'" in template.replace('"', "'")
        default = default if has_roles else default or TEXTS["instruction"]
        return Pooling(task, generates, default, prompts, has_roles, given, label_ids=labels)
    kind = "mean" if "embed-mean" in (task, stored) else "last"
    if task == "embed" and "Pooling" in modules:
        kind = _kind(read_fields(path / modules["Pooling"] / "config.json"))
    is_chat, is_normalized = "message" in inputs.child("modality_config").data, "Normalize" in modules or not modules
    most = read_fields(path / "tokenizer_config.json").number("model_max_length", 0) if modules else 0
    reach = config.integer("max_position_embeddings", MAX_INT)
    longest = inputs.integer("max_seq_length", int(most) if most < reach else 0)
    return Pooling(kind, generates, default, prompts, is_chat, given, is_normalized, longest=longest)


def _modules(file: Path) -> dict[str, str]:
    """Folders of sentence-transformers' modules, by the names of their classes; those of other classes by all of it."""
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else []
        pairs = [(str(module["type"]), str(module["path"])) for module in listed]
        modules = {(kind.rpartition(".")[2] if kind.startswith(TEXTS["theirs"]) else kind): at for kind, at in pairs}
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {str(file)!r}: {error!r}") from None
    if others := ", ".join(name for name in modules if name not in TEXTS["modules"]):
        raise ConfigError(f"{file}: modules not supported: {others} (supported: {', '.join(TEXTS['modules'])})")
    return modules


def _kind(f: Fields) -> str:
    """Of one mode, or a list of one, or the older flags of which one is set."""
    given = f.data.get("pooling_mode") or [key for key, value in f.data.items() if value is True and "_mode_" in key]
    modes = given if isinstance(given, list) else [given]
    kind = str(TEXTS["kinds"].get(str(modes[0]), "") if len(modes) == 1 else "")
    if not kind or (kind == "mean" and not f.boolean("include_prompt", True)):
        raise ConfigError(f"{f.source}: pooling {modes} not supported (supported: lasttoken; mean, prompts included)")
    return kind


def _labels(path: Path, modules: Mapping[str, str]) -> tuple[int, ...]:
    """The tokens for yes and no: those that sentence-transformers' module names, or of these names."""
    names, f = ("true_token_id", "false_token_id"), read_fields(path / modules.get("LogitScore", "") / "config.json")
    if "LogitScore" not in modules:
        names, f = ("yes", "no"), read_fields(path / "tokenizer.json").child("model").child("vocab")
    ids = [f.integer(name, None, 0) for name in names]
    if ids[0] is None:
        raise ConfigError(f"{f.source}: it has no {names[0]}, a token whose logit --task score needs")
    return tuple(label for label in ids if label is not None)


def _has_head(path: Path) -> bool:
    """Whether files of safetensors have the model's own; others have one, and what is broken (loading tells why)."""
    with suppress(OSError, SafetensorError):
        files: list[Any] = [safe_open(str(file), framework="np") for file in path.glob("*.safetensors")]
        names = [name.split(".") for file in files for name in file.keys()]  # noqa: SIM118
        heads = (parts[:-2] for parts in names if parts[-2:] == ["lm_head", "weight"])
        return not files or any(all("mod" in part for part in outer) for outer in heads)  # `model.`, but not `mtp.`
    return True
