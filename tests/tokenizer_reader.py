"""What a codec makes of some texts: here, and as a process in which a server's tokenizer lives.

python -m tests.tokenizer_reader DIRECTORY...   # JSON: of each, and whether a part of transformers was enough
"""

from __future__ import annotations

import json
import sys
from typing import Any

from msgspec.structs import replace

from minisgl.message.messages import ChatPrompt
from minisgl.processes.workers import import_fast_tokenizer
from minisgl.tokenizer.chat import CUT

SAMPLES = ["Hello world, how are you?", "größer 你好 🙂", " two  spaces", "x"]
CHAT = ChatPrompt([{"role": "user", "content": "a <|im_end|> b"}])
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def read(path: str) -> list[Any]:
    """Ids, texts, pieces, chats, and what the tokenizer is."""
    from minisgl.tokenizer.tokenize import HFTextCodec

    codec = HFTextCodec(path)
    ids = [codec.encode(text, special=special) for text in SAMPLES for special in (True, False)]
    texts = [codec.decode(one, skip_special=skip) for one in ids for skip in (True, False)]
    pieces = [[codec.text([token]), codec.token_bytes(token).hex()] for token in range(codec.vocab_size)]
    chats = [codec.render_chat(replace(CHAT, tools=tools)).split(CUT) for tools in (None, TOOLS)]
    return [ids, texts, pieces, chats, sorted(codec.special_ids), codec.vocab_size, codec.longest_token]


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]
    import_fast_tokenizer()
    part = sys.modules["transformers"]
    print(json.dumps({path: [*read(path), sys.modules["transformers"] is part] for path in sys.argv[1:]}))
