"""`content` that is a list of parts: the text of it. All our models read text only."""

from __future__ import annotations

import json
from reprlib import repr as quoted
from typing import Any

from minisgl.errors import RequestError

# Type of a part: the field that has its text.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHTS = ("thinking", "reasoning", "reasoning_text", "summary_text")
_IN_THOUGHTS = ("thinking", "reasoning", "text", "summary", "content")
_OTHER_MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image"), "images"),
    **dict.fromkeys(("input_audio", "audio", "audio_url"), "audio"),
    **dict.fromkeys(("video_url", "input_video"), "videos"),
    **dict.fromkeys(("file", "input_file"), "files"),
}


def text_of(content: Any, where: str, thoughts: list[str] | None = None) -> str:
    """The text of a message's content, one string or parts. Raises: RequestError naming `where` it is something else.

    Parts follow each other with nothing between them, as in templates that read lists of parts themselves.
    thoughts: given for what a model has said, whose reasoning is added to it. Parts without text are left out there.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
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
    kind = part.get("type", "text") if isinstance(part, dict) else None
    field = TEXTS.get(kind, "") if isinstance(kind, str) else ""
    if field and isinstance(part.get(field), str):
        return str(part[field])
    if thoughts is not None:
        thoughts.append(thought_of(part) if kind in _THOUGHTS else "")
        return ""
    if field:
        raise RequestError(f"{here} must have a {field}", param=where)
    if isinstance(kind, str) and kind in _OTHER_MEDIA:
        message = f"{here}: this model is text-only and cannot take {_OTHER_MEDIA[kind]} ({kind})"
        raise RequestError(message, param=where)
    raise RequestError(f"{here}: the type must be one of {', '.join(TEXTS)}, not {quoted(kind)}", param=where)


def thought_of(given: Any) -> str:
    """The text of reasoning, in any of the forms that servers and client libraries have for it."""
    if isinstance(given, list):
        return "".join(map(thought_of, given))
    if isinstance(given, dict):
        return thought_of(next((given[name] for name in _IN_THOUGHTS if given.get(name)), None))
    return given if isinstance(given, str) else ""
