"""Calls in a conversation, in the form that a chat template takes: what a model has said must not fail in its template.

Templates write the arguments of a call as JSON and want an object, or paste them as text, or do either; some want short
ids, some but one call a message. One conversation in each form tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

Message = dict[str, Any]
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
        """The conversation in this form. A message with several calls becomes several, each with its result."""
        fitted: list[Message] = []
        moved: set[int] = set()  # results
        for index, message in enumerate(messages):
            calls = message.get("tool_calls") or []
            if index in moved:
                continue
            if len(calls) < 2 or self.several:
                fitted.append(self._fit(message, calls))
                continue
            for number, call in enumerate(calls):
                fitted.append(self._fit({**message, "content": "" if number else message.get("content")}, [call]))
                for behind in range(index + 1, len(messages)):
                    if messages[behind].get("role") != "tool":
                        break
                    if messages[behind].get("tool_call_id") == call.get("id") and behind not in moved:
                        moved.add(behind)
                        fitted.append(self._fit(messages[behind], []))
        return fitted

    def _fit(self, message: Message, calls: list[Message]) -> Message:
        message = dict(message)
        if calls:
            message["tool_calls"] = [{**self._with_id(call, "id"), "function": self._called(call)} for call in calls]
        return self._with_id(message, "tool_call_id")

    def _with_id(self, message: Message, name: str) -> Message:
        given = str(message.get(name) or "")
        if not self.short_ids or name not in message or (len(given) == 9 and given.isalnum()):
            return message
        return {**message, name: hashlib.sha256(given.encode()).hexdigest()[:9]}

    def _called(self, call: Message) -> Message:
        function: Message = call["function"]
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and not self.texts:
            arguments = _object_in(arguments)
        if not self.objects and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**function, "arguments": arguments}


def _object_in(text: str) -> dict[str, Any]:
    """What of it could be parsed: the model may have been cut off."""
    try:
        value = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def learn(render: Callable[[list[Message]], str]) -> CallForm:
    """The form that a template takes. render: what it makes of messages; it may raise anything."""

    def shown(arguments: object, *ids: str) -> str | None:
        function = {"name": "f", "arguments": arguments}
        calls = [{"id": call_id, "type": "function", "function": function} for call_id in ids]
        results = [{"role": "tool", "name": "f", "tool_call_id": call_id, "content": "x"} for call_id in ids]
        said = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            text = render([{"role": "user", "content": "x"}, said, *results])
        except Exception:
            return None
        return text if "probe" in text else None

    for ids in (_LONG, _SHORT):
        by_object, by_text = shown(_OBJECT, ids[0]), shown(_CUT_OFF, ids[0])
        if by_object is None and by_text is None:
            continue
        objects = by_text is None or (by_object is not None and "'probe'" not in by_object)  # Python's own form
        texts = by_text is not None and _CUT_OFF in by_text
        several = shown(_OBJECT if objects else _CUT_OFF, *ids) is not None
        return CallForm(objects, texts, ids is _SHORT, several)
    return CallForm()
