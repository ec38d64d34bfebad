"""Calls in a conversation, in the form that a chat template takes. One conversation in each form tells which it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

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

    def fit(self, messages: list[Message]) -> list[Message]:
        """The conversation in this form."""
        fitted: list[Message] = []
        for message in messages:
            message = self._with_id(message, "tool_call_id")
            given = message.get("tool_calls") or ()
            calls = [{**self._with_id(call, "id"), "function": self._called(call["function"])} for call in given]
            for turn in [calls] if self.several or not calls else [[call] for call in calls]:
                fitted.append({**message, "tool_calls": turn} if turn else message)
                message = {"role": message["role"], "content": ""}  # what else was said, is said once
        return fitted

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

    def shown(arguments: object, *ids: str) -> str | None:
        calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": arguments}} for i in ids]
        results = [{"role": "tool", "name": "f", "tool_call_id": i, "content": "x"} for i in ids]
        try:
            said = {"role": "assistant", "content": "", "tool_calls": calls}
            text = render([{"role": "user", "content": "x"}, said, *results])
            return text if "probe" in text else None
        except Exception:
            return None

    for ids in (_LONG, _SHORT):
        by_object, by_text = shown(_OBJECT, ids[0]), shown(_CUT_OFF, ids[0])
        if by_object or by_text:
            objects = by_text is None or (by_object is not None and "'probe'" not in by_object)  # Python's own form
            several = shown(_OBJECT if objects else _CUT_OFF, *ids) is not None
            return CallForm(objects, by_text is not None and _CUT_OFF in by_text, ids is _SHORT, several)
    return CallForm()
