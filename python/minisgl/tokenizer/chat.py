"""A conversation, before and after a chat template: calls in the form that the template takes, and no control token
that a client has written; only templates write them, and models in what they have said.

A string that could make one gets a mark wherever it would have to be cut. The rendered text shows where they end up:
a control token with a mark within is cut there, all others are the template's own (docs/adr/0019-control-tokens.md)."""

import contextlib
import hashlib
import json
import re
import secrets
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from pydantic_core import from_json
from tokenizers import NormalizedString, Regex

from minisgl.config.chat import SPOKEN

CUT = f"\U000f0000{secrets.token_hex(16)}"  # in a rendered text: what stands before and behind is encoded apart

_NAMED = re.compile(r"<[^<>\s]+>|\[[^][\s]+\]")  # what a template writes and looks like a control token
_SAID = ("content", "reasoning_content", "reasoning", "thinking")  # fields in which the model's own words come back
_STEP = 2**16  # characters that are searched at a time: meanwhile other threads wait


class ControlTokens:
    """The control tokens of one tokenizer of Hugging Face."""

    def __init__(self, tokenizer: Any) -> None:
        template, vocab = str(tokenizer.chat_template), tokenizer.get_vocab()
        added = {str(token.content): token for token in tokenizer.added_tokens_decoder.values()}
        names = {*tokenizer.all_special_tokens, *SPOKEN.intersection(added)}
        names |= {name for name in _NAMED.findall(template) if name in vocab}
        names |= {name for name in added if added[name].special or name in template or re.match(r"<[|｜].*>$", name)}
        names = {name for name in names if len(name) > 1 and not name[0].isalnum() and not name.isspace()}
        self._pattern = _pattern(names) or "(?!)"
        self._tokens, self._spoken = re.compile(self._pattern), re.compile(f"({_pattern(SPOKEN)})")
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._firsts, self._longest = {name[0] for name in names}, max(map(len, names), default=1)
        is_made = any(name not in added or added[name].normalized for name in names)  # perhaps of what is none
        self._normalizer: Any = is_made and getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)

    def marked(self, value: Any, mark: str, *, said: bool = False) -> Any:
        """What a template is given. said: by the model, whose tags of reasoning and calls are what they were."""
        if isinstance(value, str):
            if not said:
                return self._text(value, mark)
            pieces = self._spoken.split(value)
            return "".join(piece if index % 2 else self._text(piece, mark) for index, piece in enumerate(pieces))
        if isinstance(value, dict):
            model = value.get("role") == "assistant"
            return {self.marked(k, mark): self.marked(v, mark, said=model and k in _SAID) for k, v in value.items()}
        return [self.marked(item, mark, said=said) for item in value] if isinstance(value, (list, tuple)) else value

    def cut(self, text: str, mark: str) -> str:
        """A rendered text without marks, and with CUT where a control token would be that has one within."""
        pieces = text.replace(json.dumps(mark)[1:-1], mark).split(mark)
        text, places = "".join(pieces), list(accumulate(map(len, pieces[:-1])))
        cuts, position = {place for place, again in pairwise(places) if place == again}, 0
        while len(pieces) > 1 and (match := self._find(text, position)):
            index, position = bisect_right(places, match.start()), match.end()
            if index < len(places) and places[index] < position:
                position = places[index]
                cuts.add(position)
        return CUT.join(text[start:end] for start, end in pairwise([0, *sorted(cuts), len(text)]))

    def _text(self, text: str, mark: str) -> str:
        """One mark cuts a control token that it is within, two cut always."""
        if self._normalizer and self._is_risky(self._normalizer.normalize_str(text)):
            parts = NormalizedString(text)
            self._normalizer.normalize(parts)
            shown = [(part.original, part.normalized) for part in parts.split(Regex(self._pattern), "isolated")]
            text = "".join((2 * mark).join(old) if self._tokens.fullmatch(new) else old for old, new in shown)
            text += 2 * mark
        elif not self._is_risky(text):
            return text
        for first in self._firsts:
            text = text.replace(first, first + mark)
        return text

    def _is_risky(self, text: str) -> bool:
        """Whether there is a control token, or where the text ends the beginning of one, which others may complete."""
        if not any(first in text for first in self._firsts):
            return False
        end = text.rstrip()[-self._longest :]
        starts = (index for index, character in enumerate(end) if character in self._firsts)
        return any(end[start:] in self._beginnings for start in starts) or self._find(text) is not None

    def _find(self, text: str, position: int = 0) -> re.Match[str] | None:
        for first in range(position, len(text), _STEP):
            match = self._tokens.search(text, first, first + _STEP + self._longest)
            if match and match.start() < first + _STEP:
                return match
        return None


def _pattern(words: Collection[str]) -> str:
    """A regular expression that matches the longest of these words, and looks at each character once."""
    if len(words) == 1:
        return re.escape(*words)
    ends: defaultdict[str, list[str]] = defaultdict(list)
    for word in words:
        ends[word[:1]].append(word[1:])
    branches = "|".join(re.escape(first) + _pattern(rest) for first, rest in ends.items() if first)
    return f"(?:{branches}){'?' * ('' in ends)}" if branches else ""


Message = dict[str, Any]
# Templates write arguments as JSON and want an object, or paste them as text; some want short ids, or one call a turn.
_LONG, _SHORT = ("call_0123456789", "call_9876543210"), ("callABCD1", "callABCD2")  # the latter: as Mistral's want them
_OBJECT, _CUT_OFF = {"probe": "x"}, '{"probe": "x'


@dataclass(frozen=True, slots=True)
class CallForm:
    """What a template takes. objects: arguments that are one. texts: arguments that are no JSON, as they are."""

    objects: bool = True
    texts: bool = False
    short_ids: bool = False
    several: bool = True  # calls in one message
    thinking: bool = False  # a field of that name, in which what is said before a call has to stand too

    def fit(self, messages: list[Message]) -> list[Message]:
        """The conversation in this form. Where a message has one call, its result comes before the next."""
        turns: list[list[Message]] = []
        waiting: dict[str, list[Message]] = {}  # where results belong
        for message in messages:
            message = self._with_id(message, "tool_call_id")
            given = message.get("tool_calls") or ()
            calls = [{**self._with_id(call, "id"), "function": self._called(call["function"])} for call in given]
            if calls and self.thinking:
                said = filter(None, (message.get("reasoning_content"), message["content"]))
                message = {**message, "content": "", "thinking": "\n\n".join(said)}
            for some in [calls] if self.several or not calls else [[call] for call in calls]:
                turn = waiting.pop(message.get("tool_call_id", ""), [])
                turns += [] if turn else [turn]
                turn.append({**message, "tool_calls": some} if some else message)
                waiting |= {} if self.several else {call["id"]: turn for call in some}
                message = {"role": message["role"], "content": ""}  # what else was said, is said once
        return [message for turn in turns for message in turn]

    def _with_id(self, message: Message, name: str) -> Message:
        given = str(message.get(name, ""))
        fits = not self.short_ids or name not in message or (len(given) == 9 and given.isalnum())
        return message if fits else {**message, name: hashlib.sha256(given.encode()).hexdigest()[:9]}

    def _called(self, function: Message) -> Message:
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and not self.texts:
            with contextlib.suppress(ValueError):  # what of it can be parsed: the model may have been cut off
                arguments = from_json(arguments, allow_partial="trailing-strings")
            arguments = arguments if isinstance(arguments, dict) else {}
        if not self.objects and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**function, "arguments": arguments}


def learn(render: Callable[[list[Message]], str]) -> CallForm:
    """The form that a template takes. render: what it makes of messages; it may raise anything."""

    def shown(arguments: object, *ids: str, **more: str) -> str | None:
        calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": arguments}} for i in ids]
        results = [{"role": "tool", "name": "f", "tool_call_id": i, "content": "x"} for i in ids]
        try:
            said = {"role": "assistant", "content": "", **more, "tool_calls": calls}
            text = render([{"role": "user", "content": "x"}, said, *results])
            return text if text.count("probe") >= len(ids) else None
        except Exception:
            return None

    for ids in (_LONG, _SHORT):
        by_object, by_text = shown(_OBJECT, ids[0]), shown(_CUT_OFF, ids[0])
        if by_object or by_text:
            objects = by_text is None or (by_object is not None and "'probe'" not in by_object)  # Python's own form
            takes = partial(shown, _OBJECT if objects else _CUT_OFF, ids[0])
            thinking = "musing" in (takes(thinking="musing") or "") and not takes(thinking="musing", content="x")
            texts, several = by_text is not None and _CUT_OFF in by_text, takes(ids[1]) is not None
            return CallForm(objects, texts, ids is _SHORT, several, thinking)
    return CallForm()
