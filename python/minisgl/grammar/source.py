"""A request's grammar in the language of llguidance, and the model's tokens as llguidance sees them."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from tokenizers import AddedToken, Tokenizer

from minisgl.config.locate import load_tokenizer
from minisgl.core import Grammar
from minisgl.errors import ConfigError, RequestError
from minisgl.gguf.model import is_gguf
from minisgl.gguf.tokenizer import load_gguf_backend
from minisgl.grammar.schema import SchemaError, children, definitions, followed
from minisgl.kernel.masks import NativeMatcher, NativeVocabulary
from minisgl.utils.math import div_ceil

logger = logging.getLogger(__name__)

Matcher = LLMatcher | NativeMatcher

_TABLE = msgspec.yaml.decode(Path(__file__).with_suffix(".yaml").read_bytes())
_WHITESPACE: dict[str, Any] = _TABLE["whitespace"]
_LIMITS = LLParserLimits(**_TABLE["limits"], verbose_errors=False)
_LOCATE_SECONDS = 0.5


def to_llguidance(grammar: Grammar, special: Mapping[str, int]) -> str:
    """special: texts of the tokens that are no text to a grammar, and have to be named by their ids.

    Raises: RequestError when the grammar is not even well-formed.
    """
    writer = _Writer(special, grammar.param)
    try:
        rules = {"start": writer.expression(asdict(grammar))}
        if grammar.reasoning:
            rules = {"start": f"reasoning ({rules['start']})", **writer.reasoning(grammar.reasoning)}
    except RecursionError:
        raise RequestError(f"{grammar.param} is too deeply nested", param=grammar.param) from None
    lark = "\n".join(f"{name}: {rule}" for name, rule in {**rules, **writer.rules}.items())
    return json.dumps({"grammars": [{"name": "outer", "lark_grammar": lark}, *writer.grammars.values()]})


class _Writer:
    """Writes forms in Lark, with what stands in other languages as grammars of their own.

    A form is a text, a list of forms that follow each other, or one of these: `{"any": [form, …]}`, one of them;
    `{"many": form, "between": text}`, once or more; `{"until": text}`, whatever comes before that text, and the text;
    or the fields of a `Grammar`, and `"then"`, text; `param` names what is wrong, or `"or"` is a form for that case.
    """

    def __init__(self, special: Mapping[str, int], param: str) -> None:
        self._special, self._param = special, param
        self.rules: dict[str, str] = {}
        self.grammars: dict[str, dict[str, Any]] = {}  # by what they are made of

    def expression(self, form: Any) -> str:
        """Raises: RequestError."""
        if isinstance(form, str):
            return self._literal(form) or '""'
        if isinstance(form, list):
            return " ".join(map(self.expression, form)) or '""'
        if "any" in form:
            return f"({' | '.join(map(self.expression, form['any']))})"
        if "many" in form:
            match, between = self.expression(form["many"]), self._literal(form["between"])
            return f"{match} ({between} {match})*"
        if "until" in form:
            if form["until"] in self._special:
                self.rules["ANYTHING"] = r"/(.|\n)*/"
                return f"ANYTHING {self._literal(form['until'])}"
            name = f"until{len(self.rules)}"
            self.rules[f"{name}[lazy]"] = rf"/(.|\n)*{_escaped(form['until'])}/"
            return name
        return self.expression(json.loads(form["text"])) if form["kind"] == "form" else self._body(form)

    def reasoning(self, reasoning: str) -> dict[str, str]:
        """Rules of what comes before the answer, tags and whitespace included. No token that ends the output does."""
        when, opening, closing = reasoning.split()
        opening, thought = self._literal(opening), {"thought": self.expression({"until": closing})}
        start = f"({opening})? thought SPACE?" if when == "always" else f"({opening} thought SPACE?)?"
        return {"reasoning": start, "SPACE": r"/[ \t\n]{1,32}/", **thought}

    def _body(self, form: Mapping[str, Any]) -> str:
        key = json.dumps([form["kind"], form["text"], form.get("whitespace")])
        if key not in self.grammars:
            param = form.get("param", self._param)
            try:
                body = self._compiled(form)
                if why := LLMatcher.validate_grammar(body):
                    raise ValueError(one_line(why))
            except ValueError as error:
                if "or" in form:
                    return self.expression(form["or"])
                raise RequestError(f"{param}: {error}", param=param) from None
            self.grammars[key] = {**json.loads(body)["grammars"][0], "name": f"body{len(self.grammars)}"}
        return f"@{self.grammars[key]['name']} {self._literal(form.get('then', ''))}"

    def _compiled(self, form: Mapping[str, Any]) -> str:
        """A list of one grammar, as JSON. Raises: ValueError."""
        text: str = form["text"]
        if form["kind"] == "json":
            return _of_schema(text, form["whitespace"])
        if form["kind"] == "regex":
            return LLMatcher.grammar_from_regex(text)
        if form["kind"] == "choice":
            text = f"start: {self.expression({'any': json.loads(text)})}"
        elif re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE):  # EBNF as llama.cpp writes it (`root ::= …`)
            try:
                text = gbnf_to_lark(text)
            except RecursionError:
                raise
            except Exception as error:  # that is what it raises
                raise ValueError(one_line(str(error))) from None
        return json.dumps({"grammars": [{"lark_grammar": text}]})

    def _literal(self, text: str) -> str:
        """A text as Lark terms: quoted, with special tokens by id. Strings and brackets are terms of their own, so that
        JSON that begins in the same way can stand beside it."""
        special = self._special
        pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        parts = re.split(f"({pattern})" if special else "$^", text)
        terms = [[part] if part in special else re.findall(r'"[^"]*"|[\[\]{}]|[^"\[\]{}]+|"', part) for part in parts]
        flat = [term for part in terms for term in part]
        return " ".join(f"<[{special[term]}]>" if term in special else json.dumps(term) for term in flat)


def _of_schema(text: str, whitespace: str) -> str:
    """Raises: SchemaError with the place of what llguidance does not follow, if that can be found."""

    def problem(schema: Any) -> tuple[str, str]:
        source = LLMatcher.grammar_from_json_schema(schema, overrides=_WHITESPACE[whitespace])
        return source, LLMatcher.validate_grammar(source)

    try:
        schema = json.loads(text)
    except ValueError as error:
        raise SchemaError(f"it is not valid JSON: {error}") from None
    schema = followed(schema)
    source, why = problem(schema)
    if why:
        raise SchemaError(one_line(why), _place(schema, lambda inner: problem(inner)[1] == why))
    return source


def _place(schema: Any, is_cause: Callable[[Any], bool]) -> tuple[str, ...]:
    """The way to the innermost schema that is the cause by itself."""
    path: tuple[str, ...] = ()
    shared = definitions(schema)
    deadline = time.monotonic() + _LOCATE_SECONDS
    while isinstance(schema, dict):
        inside = (way for way in children(schema) if isinstance(way[1], dict) and time.monotonic() < deadline)
        found = next((way for way in inside if is_cause({**shared, **way[1]})), None)
        if found is None:
            break
        path, schema = (*path, *found[0]), found[1]
    return path


def one_line(error: str) -> str:
    """llguidance's error: its first line, and that of the regex compiler behind it."""
    lines = [line.strip() for line in error.splitlines() if line.strip() not in ("", "<non-verbose/>")]
    lines = lines[:1] + [line for line in lines[1:] if line.startswith("error:")]
    text = " ".join(lines).replace("NoExtensionBias", "nothing matches it") or "it cannot be compiled"
    return text if len(text) <= 500 else text[:500] + " …"


def _escaped(text: str) -> str:
    """A text in a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", "n")  # `re` writes a backslash before the line break


@dataclass(frozen=True, slots=True)
class VocabularyConfig:
    """model_path: with a tokenizer. vocab_size: of the model's logits. eos_token_ids: what ends an output."""

    model_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """special: texts of the added tokens, which no string of a grammar matches, and their ids. native: makes matchers
    whose masks can be computed beside Python."""

    tokenizer: LLTokenizer
    special: dict[str, int]
    native: NativeVocabulary | None = None

    def matcher(self, text: str, param: str, pattern: str = "") -> Matcher:
        """A grammar, in llguidance's language, at the beginning of an output. What is built for the first mask is there
        for all matchers that are copied from this one. pattern: as for `NativeVocabulary`. Raises: RequestError."""
        own, words = self.native, np.empty(div_ceil(self.tokenizer.vocab_size, 32), np.int32)
        matcher = own.matcher(text, pattern) if own else LLMatcher(self.tokenizer, text, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            raise RequestError(f"{param}: {one_line(matcher.get_error())}", param=param)
        return matcher


def load_vocabulary(config: VocabularyConfig, is_native: bool = False) -> Vocabulary:
    """It takes a second with a hundred thousand tokens. is_native: matchers are native ones, if there can be some.

    Raises: ConfigError when the model has no such tokenizer.
    """
    if not config.eos_token_ids:
        raise ConfigError("this model has no end-of-sequence token, which structured output needs")
    try:
        data = json.loads(_load(config.model_path).to_str())
        _leave_out(data, config.vocab_size)
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        _rename_added(data)
        ends = [token for token in config.eos_token_ids if token < config.vocab_size]
        tokenizer = LLTokenizer(json.dumps(data), config.vocab_size, ends, _TABLE["slices"])
        return Vocabulary(tokenizer, special, _native(tokenizer) if is_native else None)
    except Exception as error:  # whatever the two libraries find wrong with the file
        raise ConfigError(f"structured output cannot use this model's tokenizer: {error}") from error


def _native(tokenizer: LLTokenizer) -> NativeVocabulary | None:
    try:
        return NativeVocabulary(tokenizer, _TABLE["slices"], _LIMITS)
    except (ConfigError, OSError) as error:
        logger.warning("grammars slow down the requests beside them: %s", error)
        return None


def _load(model_path: str) -> Tokenizer:
    """With the tokens that only tokenizer_config.json has."""
    path, config = (os.path.join(model_path, name) for name in ("tokenizer.json", "tokenizer_config.json"))
    if os.path.isfile(path):
        tokenizer = Tokenizer.from_file(path)
    elif is_gguf(Path(model_path)):
        tokenizer = load_gguf_backend(Path(model_path))
    else:
        converted = getattr(load_tokenizer(model_path), "backend_tokenizer", None)
        if converted is None:
            raise ConfigError("it is of a kind that has no tokenizer.json")
        tokenizer = Tokenizer.from_str(converted.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if os.path.isfile(config):
        with open(config, encoding="utf-8") as file:
            added: dict[str, Any] = json.load(file).get("added_tokens_decoder", {})
        for index, token in sorted(added.items(), key=lambda item: int(item[0])):
            if tokenizer.id_to_token(int(index)) is None:
                tokenizer.add_tokens([AddedToken(token["content"], special=token.get("special", False))])
    return tokenizer


def _leave_out(data: dict[str, Any], vocab_size: int) -> None:
    """Tokens for which the model has no logits, and merges that need them."""
    model = data["model"]
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    if isinstance(vocab := model.get("vocab"), list):
        model["vocab"] = vocab[:vocab_size]
    elif any(index >= vocab_size for index in vocab.values()):
        model["vocab"] = vocab = {token: index for token, index in vocab.items() if index < vocab_size}
        pairs = [(*pair.split(" "),) if isinstance(pair, str) else pair for pair in model.get("merges", ())]
        if pairs:
            model["merges"] = [[a, b] for a, b in pairs if a in vocab and b in vocab and a + b in vocab]


def _rename_added(data: dict[str, Any]) -> None:
    """Give added tokens names that no grammar has in its strings.

    llguidance lets no string match an added token (`<tool_call>`, `<|im_end|>`); but it also tokenizes the strings
    that a grammar prescribes, would get this very token, and be stuck.
    """
    vocab = data["model"].get("vocab")
    for token in data["added_tokens"]:
        name = f"<|added token {token['id']}|>"
        if isinstance(vocab, dict) and token["content"] in vocab:
            vocab[name] = vocab.pop(token["content"])
        token["content"], token["special"] = name, True
