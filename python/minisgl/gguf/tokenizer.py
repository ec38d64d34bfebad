"""The tokenizer that a GGUF file describes, as one of transformers: the same ids and texts as the model's own.

A file names how a text is split (`tokenizer.ggml.pre`), and pre_tokenizers.yaml says what the names stand for. A name
that is not there is refused: any other splitting gives ids that the model was not trained on.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from minisgl.gguf.model import TEMPLATE, GgufFile, chat_templates
from minisgl.utils.fields import Fields

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # in tokenizer.ggml.token_type; 6: a byte


def load_gguf_tokenizer(path: Path) -> Any:
    """Raises: ConfigError naming the file, and what of its tokenizer is missing, wrong or not supported."""
    return build_tokenizer(GgufFile(path).values("tokenizer."))


def load_gguf_backend(path: Path) -> Any:
    """The `tokenizers.Tokenizer` alone: to import transformers takes longer than to make it. Raises: ConfigError."""
    return _assemble(_Vocabulary(GgufFile(path).values("tokenizer.")))


def build_tokenizer(metadata: Fields) -> Any:
    """A `PreTrainedTokenizerFast`, chat templates included."""
    from transformers import PreTrainedTokenizerFast

    vocabulary, templates = _Vocabulary(metadata), chat_templates(metadata)
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    options: dict[str, Any] = {theirs: vocabulary.special(name) for theirs, name in names.items()}
    template = templates if len(templates) > 1 else metadata.text(TEMPLATE, None)
    options |= {"chat_template": template, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=_assemble(vocabulary), **options)


class _Vocabulary(Fields):
    """The fields of `tokenizer.ggml`, and of these tokens and their types, checked. ids: of the tokens that the model's
    own tokenizer has, which are all but unused ones."""

    def __init__(self, metadata: Fields) -> None:
        start = "tokenizer.ggml."
        values = {key.removeprefix(start): value for key, value in metadata.data.items()}
        super().__init__(values, metadata.source, start)
        self.model = self.text("model", None)
        if self.model not in ("gpt2", "llama", "gemma4"):
            raise self.wrong("model", "gpt2, which is byte-level BPE, llama or gemma4")
        self.tokens = self.items(str, "tokens")
        self.types = self.items(int, "token_type") if "token_type" in values else [_NORMAL] * len(self.tokens)
        self.ids = {token: i for i, token in enumerate(self.tokens) if self.types[i] != _UNUSED}
        if len(self.ids) != len(self.tokens) - self.types.count(_UNUSED):
            raise self.wrong("tokens", "a list without a token twice")

    def items(self, kind: type[Any], key: str) -> list[Any]:
        """A list, of numbers one for each token."""
        items = self.list_of(kind, key)
        if not items or (kind is not str and len(items) != len(self.tokens)):
            raise self.wrong(key, "a list" if kind is str else f"a list of {len(self.tokens)}, as tokens is")
        return items

    def special(self, name: str) -> str | None:
        """The text of a special token: bos, eos, padding or unknown."""
        usual = {"unknown": 0, "bos": 1, "eos": 2} if self.model == "llama" else {}
        index = self.integer(f"{name}_token_id", usual.get(name), 0, len(self.tokens) - 1)
        if index is not None and self.tokens[index] not in self.ids:
            raise self.wrong(f"{name}_token_id", "a token that is used")
        return None if index is None else self.tokens[index]

    def complete(self, tokenizer: Any, adds_bos: bool | str) -> None:
        """Has it find control tokens and users' own before it splits a text, and put BOS and EOS around texts."""
        from tokenizers import AddedToken
        from tokenizers.processors import TemplateProcessing

        kinds = [(text, self.types[index]) for text, index in self.ids.items() if text]
        added = [(text, kind != _USER_DEFINED) for text, kind in kinds if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added])
        bos = self.special("bos") if adds_bos == "always" or self.boolean("add_bos_token", adds_bos is True) else None
        eos = self.special("eos") if self.boolean("add_eos_token", False) else None
        template = [piece for piece in (bos, "$A", eos) if piece is not None]
        ids = [(token, tokenizer.token_to_id(token)) for token in {bos, eos} if token is not None]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)


def _assemble(vocabulary: _Vocabulary) -> Any:
    """SentencePiece's merges follow from the tokens' scores."""
    from tokenizers import Tokenizer, models

    table = msgspec.yaml.decode(Path(__file__).with_name("pre_tokenizers.yaml").read_bytes())
    kinds = {name: kind for kind in table[vocabulary.model] for name in kind["names"]}
    name = "prefix" if vocabulary.boolean("add_space_prefix", True) else "no prefix"
    if vocabulary.model == "gpt2" and (name := vocabulary.text("pre", "")) not in kinds:
        raise vocabulary.wrong("pre", f"one of {', '.join(kinds)}")
    kind, unknown = kinds[name], {} if vocabulary.model == "gpt2" else {"unk_token": vocabulary.special("unknown")}
    if vocabulary.model != "llama":
        merges = [(left, right) for left, _, right in (pair.partition(" ") for pair in vocabulary.items(str, "merges"))]
    else:
        from transformers.convert_slow_tokenizer import generate_merges

        scores, types = vocabulary.items(float, "scores"), vocabulary.types
        normal = {token: scores[index] for token, index in vocabulary.ids.items() if types[index] == _NORMAL}
        merges = generate_merges(vocabulary.ids, normal)
    parts = {part: kind.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")}
    tokenizer = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, **parts}))
    try:
        tokenizer.model = models.BPE(vocab=vocabulary.ids, merges=merges, **kind.get("options", {}), **unknown)
    except Exception as error:  # of no class of its own
        raise vocabulary.wrong("merges", f"of the tokens ({error})") from None
    vocabulary.complete(tokenizer, kind.get("adds_bos", False))
    return tokenizer
