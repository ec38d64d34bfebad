"""Single tokens as bytes. A decoder cannot tell: half a character is no text, and some drop a token's leading space."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # sentencepiece's


class TokenBytes:
    """Token id → bytes, worked out when asked for. The bytes of a text's tokens, joined, are the text's (but for the
    space that sentencepiece puts first).

    tokenizer: of Hugging Face.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
        self._byte_of = byte_alphabet() if '"ByteLevel"' in decoder else None
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        added = self._tokenizer.added_tokens_decoder.get(token_id)
        if added is not None:
            return str(added.content).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None
        if piece is None:
            return b""  # the model's vocabulary is padded
        if self._byte_of is not None:
            table = self._byte_of
            return b"".join(table[c] if c in table else c.encode() for c in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()


def byte_alphabet() -> dict[str, bytes]:
    """The printable character by which byte-level BPE writes each byte (GPT-2): bytes that print stand for themselves,
    the others follow from U+0100 on, in order."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    table = {chr(byte): bytes([byte]) for byte in printing}
    return table | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
