"""A request's grammar in the language of llguidance: Lark, with JSON schemas inline.

A schema is compiled as it is or refused: what llguidance does not know of it is an error and never left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from minisgl.config.chat import CLOSING, OPENING
from minisgl.core import Grammar
from minisgl.errors import RequestError

# JSON between whose parts any amount of whitespace may stand would let a model go on with it for ever.
_WHITESPACE = r"[ \t\n]{0,32}"


def to_llguidance(grammar: Grammar, special: Mapping[str, int]) -> str:
    """special: texts of the tokens that are no text to a grammar, and have to be named by their ids.

    Raises: RequestError when the grammar is not even well-formed.
    """
    try:
        body = _BODIES[grammar.kind](grammar.text, special)
    except (GbnfToLarkError, RecursionError, ValueError) as error:
        raise RequestError(f"{grammar.param}: {error}", param=grammar.param) from None
    if not (grammar.prefix or grammar.suffix or grammar.reasoning or grammar.separator is not None):
        return body
    parts = [_literal(grammar.prefix, special), "@body", _literal(grammar.suffix, special)]
    rules = {"start": "match", "match": " ".join(filter(None, parts))}
    if grammar.separator is not None:
        rules["start"] = f"match ({_literal(grammar.separator, special)} match)*"
    if grammar.reasoning:
        rules = {**rules, **_reasoning(grammar.reasoning, special), "start": f"reasoning {rules['start']}"}
    lark = "\n".join(f"{name}: {rule}" for name, rule in rules.items())
    grammars = [{"name": "outer", "lark_grammar": lark}, {**json.loads(body)["grammars"][0], "name": "body"}]
    return json.dumps({"grammars": grammars})


def _reasoning(reasoning: str, special: Mapping[str, int]) -> dict[str, str]:
    """Rules of what comes before the answer, tags and whitespace included. No token that ends the output does."""
    opening = _literal(OPENING, special)
    if CLOSING in special:
        thought = {"thought": f"ANYTHING {_literal(CLOSING, special)}", "ANYTHING": r"/(.|\n)*/"}
    else:  # a text as any other
        thought = {"thought[lazy]": r"/(.|\n)*" + CLOSING.replace("/", r"\/") + "/"}
    start = f"({opening})? thought SPACE?" if reasoning == "always" else f"({opening} thought SPACE?)?"
    return {"reasoning": start, "SPACE": r"/[ \t\n]{1,32}/", **thought}


def _json_body(text: str, special: Mapping[str, int]) -> str:  # noqa: ARG001
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})


def _regex_body(text: str, special: Mapping[str, int]) -> str:  # noqa: ARG001
    return LLMatcher.grammar_from_regex(text)


def _choice_body(text: str, special: Mapping[str, int]) -> str:
    choices = " | ".join(_literal(choice, special) or '""' for choice in json.loads(text))
    return _lark_body(f"start: {choices}")


def _grammar_body(text: str, special: Mapping[str, int]) -> str:  # noqa: ARG001
    """Lark, or EBNF as llama.cpp writes it (`root ::= …`)."""
    if re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE):
        text = gbnf_to_lark(text)
    return _lark_body(text)


# Each makes a list of one grammar, as JSON.
_BODIES = {"json": _json_body, "regex": _regex_body, "choice": _choice_body, "grammar": _grammar_body}


def _lark_body(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _literal(text: str, special: Mapping[str, int]) -> str:
    """A text as Lark terms: quoted, with special tokens by id."""
    if not special:
        return json.dumps(text) if text else ""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    parts = re.split(f"({pattern})", text)
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)
