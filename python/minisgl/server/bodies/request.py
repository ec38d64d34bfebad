"""A request to generate, whatever dialect it came in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minisgl.config.runtime import ServerConfig
from minisgl.core import SamplingParams
from minisgl.errors import RequestError, too_long
from minisgl.message.tokenizer import ChatPrompt, Prompt, least_tokens
from minisgl.server.bodies.strict import refuse_unless, shown
from minisgl.server.bodies.tools import ToolUse
from minisgl.server.errors import renamed


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request: what to generate, and how to answer."""

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    n: int = 1
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    tools: ToolUse | None = None  # None: the model is not to know of any
    best_of: int = 0  # so many choices for each prompt, of which the `n` most probable ones are shown; 0: n
    logprobs: bool = False  # are shown
    timeout: float = 0.0  # seconds; 0: the client has named none
    names: Mapping[str, str] | None = None  # another API's, for fields of a chat: see `renamed`

    @property
    def num_choices(self) -> int:
        """Outputs for each prompt."""
        return self.best_of or self.n


def check_size(prompts: Sequence[Prompt], max_seq_len: int, names: Mapping[str, str] | None = None) -> None:
    """names: see `renamed`. Raises: RequestError when a prompt cannot fit the context, whatever its tokens are."""
    for prompt in prompts:
        if (size := least_tokens(prompt)) >= max_seq_len:
            param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
            raise renamed(too_long(param, f"at least {size}", max_seq_len), names)


def check_model(model: str | None, config: ServerConfig) -> None:
    """Raises: RequestError (404) unless it is the model that is served, by one of its names."""
    path = config.engine.model_path
    names = (None, config.served_model_name, path, os.path.basename(path.rstrip("/")))
    if config.model_name_check and model not in names:
        message = f"the model {shown(model)!r} does not exist; this server has {config.served_model_name!r}"
        raise RequestError(message, param="model", code="model_not_found", status=404)


def check_policy(params: SamplingParams, policy: str) -> None:
    """Raises: RequestError when the request has a priority and the scheduler does not look at it."""
    is_seen = not params.priority or policy == "priority"
    refuse_unless(is_seen, "priority needs a server started with --schedule-policy priority", "priority")
