"""`content` that is a list of parts: the text of it. All our models read text only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisgl.errors import RequestError

CHAT_PARTS = {"text": "text", "refusal": "refusal"}  # type of a part: the field that has its text
RESPONSE_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
_OTHER_MEDIA = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "audio",
    "audio": "audio",
    "audio_url": "audio",
    "video_url": "videos",
    "input_video": "videos",
    "file": "files",
    "input_file": "files",
}


def text_of(content: Any, where: str, parts: Mapping[str, str] = CHAT_PARTS) -> str:
    """The text of a message's content, one string or parts. Raises: RequestError naming `where` it is something else.

    Parts follow each other with nothing between them, as in templates that read lists of parts themselves.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
    return "".join(_part(part, where, f"{where}[{index}]", parts) for index, part in enumerate(content))


def _part(part: Any, where: str, here: str, parts: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _OTHER_MEDIA:
        message = f"{here}: this model is text-only and cannot take {_OTHER_MEDIA[kind]} ({kind})"
        raise RequestError(message, param=where)
    if not isinstance(kind, str) or kind not in parts:
        raise RequestError(f"{here}: the type must be one of {', '.join(parts)}, not {kind!r}", param=where)
    field = parts[kind]
    text = part.get(field)
    if not isinstance(text, str):
        raise RequestError(f"{here} must have a {field}", param=where)
    return text
