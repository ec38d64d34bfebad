"""Control tokens in what a client says are text: only chat templates write them, and models in what they have said.

A client's string that could make one gets marks where it would have to be cut. The template shows where they end up: a
control token that has a mark within is cut there, all others are the template's own (docs/adr/0019-control-tokens.md).
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import accumulate, pairwise
from typing import Any

from tokenizers import NormalizedString, Regex

from minisgl.config.chat import SPOKEN
from minisgl.errors import RequestError

CUT = f"\U000f0000{secrets.token_hex(16)}"  # in a rendered text: what stands before and behind is encoded apart

_SHAPE = re.compile(r"<[|｜].*[|｜]>")  # of control tokens that are not said to be special
_NAMED = re.compile(r"<[^<>\s]+>|\[[^][\s]+\]")  # what looks like one in a template
_SAID = ("content", "reasoning_content", "reasoning", "thinking")  # fields in which the model's own words come back
_MARKS = range(0xF0000, 0xF1000)  # private use


class ControlTokens:
    """Those of one tokenizer, of Hugging Face: what is special, and the tokens that its chat templates write."""

    def __init__(self, tokenizer: Any) -> None:
        template, vocab = str(tokenizer.chat_template), tokenizer.get_vocab()
        added = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
        names = {*tokenizer.all_special_tokens, *filter(vocab.__contains__, _NAMED.findall(template))}
        for name, token in added.items():
            if token.special or name in SPOKEN or _SHAPE.fullmatch(name) or (name in template and not name.isalnum()):
                names.add(name)
        names = {name for name in names if name.strip() and len(name) > 1}
        self._pattern = _pattern(names)
        self._tokens = re.compile(self._pattern or "(?!)")
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._longest = max(map(len, names), default=1)
        self._heads = re.compile(_pattern({name if name[0].isalnum() else name[0] for name in names}) or "(?!)")
        self._spoken = re.compile(f"({_pattern(SPOKEN)})")
        backend = getattr(tokenizer, "backend_tokenizer", None)  # normalizing may make one of what is none
        made = any(name not in added or added[name].normalized for name in names)
        self._normalizer: Any = backend.normalizer if backend is not None and made else None

    def marked(self, messages: list[Any], others: list[Any]) -> tuple[list[Any], list[Any], str]:
        """Messages, and what else a template is given, with marks; and the mark, which is "" where none is needed."""
        texts: list[str] = []
        risky = False

        def look(text: str, spoken: bool) -> str:
            nonlocal risky
            risky = risky or any(map(self._is_risky, self._unspoken(text, spoken)[::2]))
            texts.append(text)
            return text

        _rewrite(messages, others, look)
        if not risky:
            return messages, others, ""
        used = set().union(*texts)
        mark = next((character for character in map(chr, _MARKS) if character not in used), "")
        if not mark:
            raise RequestError("the messages have control tokens, and too many characters of private use")

        def put(text: str, spoken: bool) -> str:
            pieces = self._unspoken(text, spoken)
            pieces[::2] = [self._with_marks(piece, mark) for piece in pieces[::2]]
            return "".join(pieces)

        return *_rewrite(messages, others, put), mark

    def cut(self, text: str, mark: str) -> str:
        """A rendered text without marks, and with CUT where a control token would be that has one within."""
        pieces = text.replace(json.dumps(mark)[1:-1], mark).split(mark)
        text = "".join(pieces)
        places = list(accumulate(map(len, pieces[:-1])))
        cuts = {place for place, again in pairwise(places) if place == again}
        position = 0
        while match := self._tokens.search(text, position):
            index = bisect_right(places, match.start())
            position = match.end()
            if index < len(places) and places[index] < position:
                position = places[index]
                cuts.add(position)
        bounds = [0, *sorted(cuts), len(text)]
        return CUT.join(text[start:end] for start, end in pairwise(bounds))

    def _unspoken(self, text: str, spoken: bool) -> list[str]:
        """Every other piece, from the first on, is without what the model may have said as tokens."""
        return self._spoken.split(text) if spoken else [text]

    def _is_risky(self, text: str) -> bool:
        return self._has_one(text) or self._makes_one(text)

    def _makes_one(self, text: str) -> bool:
        """Whether there is one once the text is normalized."""
        return self._normalizer is not None and self._has_one(self._normalizer.normalize_str(text))

    def _has_one(self, text: str) -> bool:
        """Whether there is a control token, or where the text ends the beginning of one, which others may complete."""
        if text.isalnum() or not self._heads.search(text):
            return False
        end = text.rstrip()[-self._longest :]
        return bool(self._tokens.search(text)) or any(end[start:] in self._beginnings for start in range(len(end)))

    def _with_marks(self, text: str, mark: str) -> str:
        """One mark cuts a control token that it is within, two cut always."""
        if self._makes_one(text):
            parts = NormalizedString(text)
            self._normalizer.normalize(parts)
            shown = [(part.original, part.normalized) for part in parts.split(Regex(self._pattern), "isolated")]
            text = (
                "".join((2 * mark).join(old) if self._tokens.fullmatch(new) else old for old, new in shown) + 2 * mark
            )
        return self._heads.sub(lambda head: head[0][0] + mark + head[0][1:], text)


def _rewrite(
    messages: list[Any], others: list[Any], use: Callable[[str, bool], str]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """With all strings as `use` has them, which is told whether a string is what the model has said."""
    said = [
        {key: _each(value, use, message["role"] == "assistant" and key in _SAID) for key, value in message.items()}
        for message in messages
    ]
    return said, _each(others, use, False)


def _each(value: Any, use: Callable[[str, bool], str], spoken: bool) -> Any:
    if isinstance(value, str):
        return use(value, spoken)
    if isinstance(value, dict):
        return {_each(key, use, spoken): _each(item, use, spoken) for key, item in value.items()}
    return [_each(item, use, spoken) for item in value] if isinstance(value, (list, tuple)) else value


def _pattern(words: Collection[str]) -> str:
    """A regular expression that matches the longest of these words, and looks at each character once."""
    if len(words) == 1:
        return re.escape(*words)
    ends: defaultdict[str, list[str]] = defaultdict(list)
    for word in words:
        ends[word[:1]].append(word[1:])
    branches = "|".join(re.escape(first) + _pattern(rest) for first, rest in ends.items() if first)
    return f"(?:{branches}){'?' * ('' in ends)}" if branches else ""
