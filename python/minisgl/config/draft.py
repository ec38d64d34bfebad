"""A second, small model of the same vocabulary, which guesses what the first one will say (`--draft-model`)."""

from dataclasses import replace
from pathlib import Path

from minisgl.config.args import ServerArgs
from minisgl.config.eagle import read_eagle
from minisgl.config.families import read_model_config
from minisgl.config.locate import locate_model, read_fields, split_revision
from minisgl.config.model import ModelConfig
from minisgl.errors import ConfigError


def with_draft(args: ServerArgs, path: Path, model: ModelConfig, device: str | None) -> tuple[ServerArgs, ModelConfig]:
    """Both, with what `--draft-model` names. Raises: ConfigError with one reason why that cannot guess for the model,
    which is at `path`."""
    if (given := args.draft_model) is None:
        return args, model
    try:
        name, revision = split_revision(given, None)
        where = locate_model(name, args.model_source, revision)
        head = read_eagle(where, model)
        draft = head or read_model_config(where)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model ", "--draft-model ")) from None
    words, others = (read_fields(each / "tokenizer.json").child("model").data.get("vocab") for each in (path, where))
    is_same = head or draft.vocab_size == model.vocab_size and (None in (words, others) or words == others)
    problems = {
        "not on GPUs so far; choose --speculate ngram or mtp, or --device cpu": device == "cuda",
        f"not with --speculate {args.speculate}": args.speculate != "off",
        f"its vocabulary ({draft.vocab_size} tokens) is not that of {path} ({model.vocab_size})": not is_same,
        "it has recurrent states": bool(draft.states),
        "it has other sliding windows": draft.window not in (0, model.window),
    }
    if problem := next((text for text, applies in problems.items() if applies), ""):
        raise ConfigError(f"--draft-model {given}: {problem}")
    return replace(args, speculate="eagle" if head else "model"), replace(model, second=(str(where), draft))
