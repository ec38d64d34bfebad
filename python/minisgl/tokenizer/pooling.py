"""Prompts for vectors and scores, and what those who ask are told of what the model says."""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from minisgl.config.model import ModelConfig
from minisgl.config.pooling import TEXTS, Pooling
from minisgl.core import SamplingParams
from minisgl.errors import RequestError
from minisgl.message.messages import ChatPrompt, IdsPrompt, Prompt, TextPrompt, pack_ids


def served(model: ModelConfig, task: str, dimensions: int = 0) -> tuple[Pooling, SamplingParams]:
    """What requests are sent with. task: "score", or "embed", to vectors of so many numbers. Raises: RequestError where
    the model is not for that, or its vectors have fewer."""
    pooling, most = model.pooling, model.hidden_size
    if pooling is None or (pooling.kind == "score") != (task == "score"):
        raise RequestError(f"this model is not served for that: start the server with --task {task}", param="model")
    if not 0 <= dimensions <= most:
        raise RequestError(f"dimensions must be at least 1 and at most {most}, not {dimensions}", param="dimensions")
    return pooling, SamplingParams(max_tokens=1, temperature=0.0, pooling=pooling.kind)


def text_prompt(pooling: Pooling, text: str | Sequence[int], name: str = "", most: int = 0) -> Prompt:
    """name: of what comes before a text. most: tokens that are kept; 0: as files say. Raises: RequestError."""
    if not isinstance(text, str):
        return IdsPrompt(pack_ids(text[: most or None]))
    if name and name not in pooling.prompts:
        known = ", ".join(pooling.prompts) or "none"
        raise RequestError(f"prompt_name {name!r} is not known (known: {known})", param="prompt_name")
    before = pooling.prompts[name] if name else pooling.prompt
    if not pooling.has_roles:
        return TextPrompt(before + text, most or pooling.longest)
    if most:
        raise RequestError("truncate_prompt_tokens: this model reads texts as messages", param="truncate_prompt_tokens")
    return _chat(pooling, {"system": before, "user": text})


def _chat(pooling: Pooling, said: Mapping[str, str]) -> ChatPrompt:
    """said: by whom; of the system, perhaps nothing."""
    messages = [{"role": role, "content": text} for role, text in said.items() if text or role != "system"]
    return ChatPrompt(messages, template_kwargs={**pooling.kwargs}, add_generation_prompt=False)


def pair_prompt(pooling: Pooling, query: str, document: str, instruction: str) -> ChatPrompt:
    """A query and a document that may answer it, in the words of the model's template."""
    given = {"instruction": instruction or pooling.prompt, "query": query, "document": document}
    said = {"system": TEXTS["judge"], "user": TEXTS["asked"].format(**given)}
    return _chat(pooling, {"system": given.pop("instruction"), **given} if pooling.has_roles else said)


def _whole(data: bytes) -> bytes:
    if not data:
        raise RequestError("the request was aborted", status=499)  # what fails has ended before
    return data


def vector_of(pooling: Pooling, data: bytes, dimensions: int) -> Any:
    """The first `dimensions` numbers of a vector (0: all), in an array of float32."""
    import numpy as np  # servers of other models do without it

    vector = np.frombuffer(_whole(data), "<f4")[: dimensions or None]
    length = max(float(np.linalg.norm(vector)), 1e-12) if pooling.is_normalized else 1.0
    return (vector / length).astype("<f4")


def score_of(data: bytes) -> float:
    """From 0 to 1: how probable yes is beside no, or what a classifier says."""
    yes, *no = struct.unpack(f"<{len(_whole(data)) // 4}f", data)
    return 1 / (1 + math.exp(min(sum(no) - yes, 700.0)))
