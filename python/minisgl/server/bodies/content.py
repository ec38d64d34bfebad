"""Messages of a chat, as templates take them. What a model has said is never refused, however it comes back."""

from __future__ import annotations

import json
from reprlib import repr as quoted
from typing import Annotated, Any

from pydantic import WithJsonSchema
from pydantic_core import from_json

from minisgl.errors import RequestError
from minisgl.message.codec import carried
from minisgl.server.bodies.strict import SCHEMAS, Object, at_most, refuse_unless

MAX_MESSAGES = 16384
ROLES: list[str] = SCHEMAS["message"]["properties"]["role"]["enum"]
Message = Annotated[Object, WithJsonSchema(SCHEMAS["message"])]
_OTHER_ROLES = {"developer": "system", "function": "tool"}  # what templates know them as
# Type of a part: the field that has its text.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_OTHER_MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image"), "images"),
    **dict.fromkeys(("input_audio", "audio", "audio_url"), "audio"),
    **dict.fromkeys(("video_url", "input_video"), "videos"),
    **dict.fromkeys(("file", "input_file"), "files"),
}
# Reasoning: types of parts, fields of such parts, and fields of messages.
_THOUGHTS = ("thinking", "reasoning", "reasoning_text", "summary_text")
_IN_THOUGHTS = ("thinking", "reasoning", "text", "summary", "content")
_OF_MESSAGES = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")


def text_of(content: Any, where: str, thoughts: list[str] | None = None) -> str:
    """The text of a message's content, one string or parts. Raises: RequestError naming `where` it is something else.

    Parts follow each other with nothing between them, as in templates that read lists of parts themselves.
    thoughts: given for what a model has said, whose reasoning is added to it. Parts without text are left out there.
    """
    if isinstance(content, str):
        return content
    refuse_unless(isinstance(content, list), f"{where} must be a string or a list of text parts", where)
    return "".join(_part(part, where, f"{where}[{index}]", thoughts) for index, part in enumerate(content))


def kept_as_text(content: Any, *, parts: bool = True) -> Any:
    """What a tool gave or a model said, where a client has kept JSON. parts: of these a list is, whatever it has."""
    taken = isinstance(content, list) and (parts or all(map(_is_part, content)))
    taken = taken or content is None or isinstance(content, str)
    return content or "" if taken else json.dumps(content, ensure_ascii=False)


def _is_part(item: Any) -> bool:
    """Objects of other lists may have a type as well, and be files."""
    if not isinstance(item, dict):
        return isinstance(item, str)
    kind = item.get("type", "text" if item.keys() == {"text"} else None)
    return kind in tuple(TEXTS) or (kind in tuple(_OTHER_MEDIA) and (kind in item or kind.startswith("input_")))


def _part(part: Any, where: str, here: str, thoughts: list[str] | None) -> str:
    if isinstance(part, str):
        return part
    given = part if isinstance(part, dict) else {"type": None}
    kind = given.get("type", "text")
    name = kind if isinstance(kind, str) else ""
    field = TEXTS.get(name, "")
    if field and isinstance(given.get(field), str):
        return str(given[field])
    if thoughts is not None:
        thoughts.append(thought_of(part) if name in _THOUGHTS else "")
        return ""
    why = f": the type must be one of {', '.join(TEXTS)}, not {quoted(kind)}"
    if field:
        why = f" must have a {field}"
    elif name in _OTHER_MEDIA:
        why = f": this model is text-only and cannot take {_OTHER_MEDIA[name]} ({name})"
    raise RequestError(here + why, param=where)


def thought_of(given: Any) -> str:
    """The text of reasoning, in any of the forms that servers and client libraries have for it."""
    if isinstance(given, list):
        return "".join(map(thought_of, given))
    if isinstance(given, dict):
        return thought_of(next((given[name] for name in _IN_THOUGHTS if given.get(name)), None))
    return given if isinstance(given, str) else ""


def chat_messages(given: list[Object]) -> list[Object]:
    """Each with its text as one string, and what goes with the role. Raises: RequestError naming the field at fault."""
    at_most(MAX_MESSAGES, "messages", "messages", given)
    refuse_unless(given, "messages must not be empty", "messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    waiting: dict[str, None] = {}  # calls that have no result yet
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            call["id"] = call["id"] or f"call_{index}_{number}"
            waiting[call["id"]] = None
        if message["role"] == "tool":
            message["tool_call_id"] = message["tool_call_id"] or next(iter(waiting), f"call_{index}")
            waiting.pop(message["tool_call_id"], None)
    return messages


def _message(given: Object, where: str) -> Object:
    role = given.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, not {quoted(role)}", param=f"{where}.role")
    template_role, content = _OTHER_ROLES.get(role, role), given.get("content")
    thoughts: list[str] | None = [] if role == "assistant" else None
    if template_role in ("assistant", "tool"):  # it may be nothing, beside calls and of functions that give nothing
        said = _text(given.get("refusal")) if content is None else content
        content = kept_as_text(said, parts=template_role == "assistant")
    message = {"role": template_role, "content": text_of(content, f"{where}.content", thoughts)}
    if (name := given.get("name")) is not None:
        refuse_unless(isinstance(name, str), f"{where}.name must be a string", f"{where}.name")
        message["name"] = name
    if template_role == "tool":
        message["tool_call_id"] = _text(given.get("tool_call_id"))
    return message if thoughts is None else message | _said(given, thoughts, where)


def _said(given: Object, thoughts: list[str], where: str) -> Object:
    """Reasoning and calls of an assistant's message."""
    fields: Object = {}
    where = f"{where}.tool_calls"
    calls = given.get("tool_calls") or ([given["function_call"]] if given.get("function_call") else [])
    refuse_unless(isinstance(calls, list), f"{where} must be a list", where)
    if calls:
        fields["tool_calls"] = [_call(call, f"{where}[{index}].function.name") for index, call in enumerate(calls)]
    reasoning = next(filter(None, (thought_of(given.get(name)) for name in _OF_MESSAGES)), "".join(thoughts))
    if reasoning or given.get("reasoning_content") == "":
        fields["reasoning_content"] = reasoning
    return fields


def _call(given: Any, where: str) -> Object:
    """A call: of a function, of a custom tool, or flat as the older API and some libraries have it."""
    call = given if isinstance(given, dict) else {}
    function = call.get("function", call.get("custom", call))
    function = function if isinstance(function, dict) else {}
    refuse_unless(isinstance(function.get("name"), str), f"{where} must be a string", where)
    arguments = next((function[key] for key in ("arguments", "input", "args") if key in function), None)
    called = {"name": function["name"], "arguments": sent(arguments)}
    return {"id": _text(call.get("id")), "type": "function", "function": called}


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def sent(arguments: Any) -> Object | str:
    """A call's arguments as messages between processes carry them: an object if that can be, otherwise their text."""
    value = arguments
    for _ in range(2):  # some clients write the text of JSON as JSON
        if isinstance(value, str):
            try:
                value = from_json(value) if value.strip() else {}
            except ValueError:
                break
    if isinstance(value, dict) and carried(value):
        return value
    return {} if value is None else arguments if isinstance(arguments, str) else json.dumps(arguments)
