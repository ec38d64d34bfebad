"""Replies as /generate shows them: text and token ids, with counts in `meta_info`; streams send increments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minisgl.message.messages import UserReply, unpack_ids
from minisgl.server.answers.renderer import Events, Renderer


class GenerateRenderer(Renderer):
    """The answer to one request."""

    def chunk(self, index: int, reply: UserReply) -> Events:  # noqa: ARG002
        return [self._shown([reply])]

    def body(self, choices: Sequence[Sequence[UserReply]]) -> dict[str, Any]:
        return self._shown(choices[0])

    def _shown(self, replies: Sequence[UserReply]) -> dict[str, Any]:
        last = replies[-1]
        return {
            "text": "".join(reply.text for reply in replies),
            "output_ids": unpack_ids(b"".join(reply.token_ids for reply in replies)),
            "meta_info": {
                "id": self.id,
                "finish_reason": last.finish_reason,
                "prompt_tokens": last.num_prompt_tokens,
                "completion_tokens": last.num_output_tokens,
                "cached_tokens": last.num_cached_tokens,
            },
        }
