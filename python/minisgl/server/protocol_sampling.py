"""The sampling fields that all endpoints share, and what of them becomes `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from minisgl.core import SamplingParams
from minisgl.errors import RequestError
from minisgl.server.protocol_grammar import parse_grammar

MAX_STOPS, MAX_STOP_LEN = 16, 1024
MAX_STOP_IDS = 128
MAX_BIASES = 1024  # OpenAI's client libraries know of 300
_PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "priority",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


class SamplingFields(BaseModel):
    """To be inherited by request bodies. None is the same as leaving a field out."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None

    def _params(
        self, max_tokens: int | None, defaults: Mapping[str, float | int], logprobs: int | None = None
    ) -> SamplingParams:
        """Raises: RequestError naming the field that is out of range."""
        given = {name: getattr(self, name) for name in _PLAIN}
        chosen: dict[str, Any] = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        return SamplingParams(
            max_tokens=max_tokens,
            seed=self.seed,
            stop=_stops(self.stop),
            stop_token_ids=_stop_ids(self.stop_token_ids),
            logit_bias=_biases(self.logit_bias),
            logprobs=logprobs,
            grammar=parse_grammar(dict(self)),
            **chosen,
        )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop must hold at most {MAX_STOPS} strings, not {len(stops)}", param="stop")
    if any(len(string) > MAX_STOP_LEN for string in stops):
        raise RequestError(f"stop strings must have at most {MAX_STOP_LEN} characters", param="stop")
    return stops


def _stop_ids(token_ids: list[int] | None) -> tuple[int, ...]:
    if token_ids is None:
        return ()
    if len(token_ids) > MAX_STOP_IDS:
        message = f"stop_token_ids must hold at most {MAX_STOP_IDS} ids, not {len(token_ids)}"
        raise RequestError(message, param="stop_token_ids")
    bad = next((token for token in token_ids if not 0 <= token < 2**31), None)
    if bad is not None:
        raise RequestError(f"stop_token_ids: {bad} is not a token id", param="stop_token_ids")
    return tuple(token_ids)


def _biases(biases: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """JSON has no numbers as keys: token ids are written as strings."""
    if not biases:
        return ()
    if len(biases) > MAX_BIASES:
        raise RequestError(f"logit_bias must hold at most {MAX_BIASES} tokens, not {len(biases)}", param="logit_bias")
    bad = next((key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if bad is not None:
        raise RequestError(f"logit_bias: {bad!r} is not a token id", param="logit_bias")
    return tuple({int(key): float(value) for key, value in biases.items()}.items())


def check_count(name: str, value: int | None, most: int) -> None:
    """Raises: RequestError unless the field is left out or from 0 to `most`."""
    if value is not None and not 0 <= value <= most:
        raise RequestError(f"{name} must be from 0 to {most}, not {value}", param=name)


def check_policy(params: SamplingParams, policy: str) -> None:
    """Raises: RequestError when the request has a priority and the scheduler does not look at it."""
    if params.priority and policy != "priority":
        raise RequestError("priority needs a server started with --schedule-policy priority", param="priority")
