"""How a model speaks, read from its files: the format of its tool calls, whether it reasons, and which ids end it."""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from minisgl.config.locate import read_fields, read_json
from minisgl.errors import ConfigError
from minisgl.utils.fields import Fields

logger = logging.getLogger(__name__)
_FORMATS = msgspec.yaml.decode(Path(__file__).with_name("formats.yaml").read_bytes())
HARMONY = "harmony"  # of gpt-oss: the format of calls and of reasoning in one
TOOL_PARSERS = tuple(_FORMATS["tools"])
REASONING_PARSERS: dict[str, str] = _FORMATS["reasoning"]  # name: as in `core.Grammar`
_MARKERS = {name: text.split()[1:] for name, text in REASONING_PARSERS.items()} | _FORMATS["tools"]
# What models say to the parsers, and may come back in what they have said: no borders of messages.
SPOKEN = frozenset(marker for name, markers in _MARKERS.items() if name != HARMONY for marker in markers)


def read_template_file(file: str) -> str:
    """The chat template of a Jinja file, or of a JSON file's `chat_template`. Raises: ConfigError naming it."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = Fields(read_json(path), file).text("chat_template", "")
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"--chat-template {file}: {error}") from None
    if problem := template_problem(text) if text.strip() else "there is no template in it":
        raise ConfigError(f"--chat-template {file}: {problem}")
    return text


def template_problem(text: str) -> str | None:
    """What is wrong with the syntax of a chat template."""
    from jinja2 import Environment, TemplateSyntaxError

    try:  # without transformers' own tag, which marks what a model has said
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text))
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except (RecursionError, TypeError):
        return "it is too deeply nested, or no text"
    return None


def read_chat_template(path: Path) -> str:
    """All chat templates of a model directory, one after the other; "" when it has none.

    Raises: ConfigError when a file that may hold them is no JSON."""
    files = [path / "chat_template.jinja", *sorted(path.glob("additional_chat_templates/*.jinja"))]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    for name in ("tokenizer_config.json", "chat_template.json"):
        texts += _texts(read_fields(path / name).data.get("chat_template"))
    return "\n".join(texts)


def _texts(value: Any) -> list[str]:
    """A template stands alone, or there is a list of named ones."""
    if isinstance(value, list):
        return [text for item in value if isinstance(item, dict) for text in _texts(item.get("template"))]
    return [value] if isinstance(value, str) else []


def choose_parsers(tools: str | None, reasoning: str | None, template: str) -> tuple[str | None, str | None]:
    """The parsers of tool calls and of reasoning that were asked for ("none": none), or by default (None) those that
    the template needs. `harmony` is both."""

    def chosen(wanted: str | None, rules: list[dict[str, Any]]) -> str | None:
        told = (rule["format"] for rule in rules if all(text in template for text in rule["texts"]))
        return next(told, None) if wanted is None else wanted.removesuffix("none") or None

    both = chosen(tools, _FORMATS["tools_told_by"]), chosen(reasoning, _FORMATS["reasoning_told_by"])
    return (HARMONY, HARMONY) if HARMONY in both else both


def reasoning_after(prompt_end: str, usually: str) -> str:
    """Whether the output begins with reasoning, for a model that `usually` does so: tags at a prompt's end say."""
    prompt_end, (_, opening, closing) = prompt_end.rstrip(), usually.split()
    if prompt_end.endswith(closing):
        return ""
    return f"always {opening} {closing}" if prompt_end.endswith(opening) else usually


def visible_tokens(*parsers: str | None) -> tuple[str, ...]:
    """What the parsers must see of the output, even where a tokenizer holds it for special."""
    return tuple(dict.fromkeys(marker for parser in parsers if parser for marker in _MARKERS[parser]))


def read_ends(path: Path, config: Fields, vocab_size: int) -> tuple[int, ...]:
    """The ids, generation_config.json's first: a chat model often adds its end of turn there. What is no id of the
    model is left out, with a warning. config: of config.json. Raises: ConfigError naming a file that cannot be read."""
    ids: dict[int, None] = {}
    given = read_fields(path / "generation_config.json"), config
    known = [fields for fields in given if fields.data.get("eos_token_id") is not None]
    for fields in known or [config.child("text_config")]:
        value = fields.data.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is int and 0 <= token < vocab_size:
                ids[token] = None
            else:
                reason = f"no token id (a whole number from 0 to {vocab_size - 1})"
                logger.warning("%s: eos_token_id %.80r is %s and has no effect", fields.source, token, reason)
    own = _tokenizer_end(path)
    return tuple(ids if own is None or own >= vocab_size else ids | {own: None})


def _tokenizer_end(path: Path) -> int | None:
    """The id of the tokenizer's `eos_token`, which a file gives as text, alone or with the token's properties."""
    config = fields = read_fields(path / "tokenizer_config.json")
    if fields.data.get("eos_token") is None:
        fields = read_fields(path / "special_tokens_map.json")
    is_object = isinstance(fields.data.get("eos_token"), dict)
    token = fields.child("eos_token").text("content", None) if is_object else fields.text("eos_token", None)
    if token is None:
        return None
    ids = (index for pairs in _vocabularies(path, config) for text, index in pairs if text == token)
    if (found := str(next(ids, None))).isdecimal():
        return int(found)
    logger.warning("%s: eos_token %.80r is not in the vocabulary and has no effect", fields.source, token)
    return None


def _vocabularies(path: Path, config: Fields) -> Iterator[Iterable[tuple[Any, Any]]]:
    """Texts and ids that a tokenizer's files have, the smallest file first."""
    decoder = config.child("added_tokens_decoder")
    yield [(decoder.child(index).data.get("content"), index) for index in decoder.data]
    tokenizer = read_fields(path / "tokenizer.json")
    added = tokenizer.data.get("added_tokens")
    items = added if isinstance(added, list) else []
    yield [(item.get("content"), item.get("id")) for item in items if isinstance(item, dict)]
    vocab = tokenizer.child("model").data.get("vocab")
    if isinstance(vocab, list):  # Unigram: pieces with their scores, in order
        yield [(piece[0], index) for index, piece in enumerate(vocab) if isinstance(piece, list) and piece]
    yield vocab.items() if isinstance(vocab, dict) else ()
    for name in ("added_tokens.json", "vocab.json"):
        yield read_fields(path / name).data.items()
