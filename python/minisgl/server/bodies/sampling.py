"""The sampling fields that all endpoints share, and what of them becomes `SamplingParams`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from reprlib import repr as quoted
from typing import Annotated, Any

from pydantic import BaseModel, StringConstraints

from minisgl.core import MAX_BIAS, MAX_COUNT, MAX_SEED, RANGES, SamplingParams
from minisgl.errors import RequestError
from minisgl.server.bodies.grammar import parse_grammar
from minisgl.server.bodies.strict import SCHEMAS, Count, Ids, Items, optional

Defaults = Mapping[str, float | int]  # of the model: sampling fields that a request may leave out
MAX_STOPS, MAX_STOP_LEN = 16, 1024
MAX_STOP_IDS = 128
MAX_BIASES = 1024  # OpenAI's client libraries know of 300
Salt = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _within(name: str, text: str) -> Any:
    """A field of the range that `SamplingParams` has for it."""
    return optional(text, ge=RANGES[name].lowest, le=RANGES[name].highest)


class SamplingFields(BaseModel):
    """To be inherited by request bodies. None is the same as leaving a field out."""

    temperature: float | None = _within("temperature", "0 is greedy.")
    top_p: float | None = _within("top_p", "Only the most probable tokens that have so much together; 0: greedy.")
    top_k: Count | None = _within("top_k", "Only so many most probable tokens; 0 and -1: all.")
    min_p: float | None = _within("min_p", "Only tokens with this share of the highest probability.")
    presence_penalty: float | None = _within("presence_penalty", "Taken from logits of tokens in the output, once.")
    frequency_penalty: float | None = _within("frequency_penalty", "The same, for each time.")
    repetition_penalty: float | None = _within(
        "repetition_penalty", "Divides positive logits of tokens in prompt and output, multiplies negative ones."
    )
    logit_bias: dict[str, Any] | None = optional("Token id: what is added to its logit.", **SCHEMAS["logit_bias"])
    seed: Count | None = optional("The same seed, the same output; -1 is none.", ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: str | Items[str] | None = optional("What ends the output; it is cut off.", **SCHEMAS["stop"])
    stop_token_ids: Ids | None = optional("Tokens that end the output.", maxItems=MAX_STOP_IDS)
    include_stop_str_in_output: bool | None = optional("Do not cut the stop string off.")
    min_tokens: Count | None = optional("No end before so many tokens; at most `max_tokens`.", ge=0, le=MAX_COUNT)
    ignore_eos: bool | None = optional("Go on after end-of-sequence tokens.")
    skip_special_tokens: bool | None = optional("false: special tokens are text.")
    priority: Count | None = _within("priority", "The lowest goes first; for `--schedule-policy priority`.")
    cache_salt: Salt | None = optional("Cached prefixes are shared with requests of the same salt and API key only.")
    timeout: float | None = optional("The answer ends with an error after so many seconds.", gt=0, le=1e6)

    def params(self, max_tokens: int | None, defaults: Defaults, logprobs: int | None = None) -> SamplingParams:
        """Raises: RequestError naming the field that is out of range."""
        given = {name: getattr(self, name) for name in _PLAIN}
        if max_tokens is None and "max_tokens" in defaults:  # which is no limit to what the request asks for
            max_tokens = max(int(defaults["max_tokens"]), self.min_tokens or 0)
        given["max_tokens"] = max_tokens
        chosen: dict[str, Any] = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        if self.top_p == 0:
            chosen |= {"top_p": 1.0, "temperature": 0.0}
        stop_ids = self.stop_token_ids or []
        _check_count("stop_token_ids", stop_ids, MAX_STOP_IDS, "ids")
        check_ids("stop_token_ids", stop_ids)
        return SamplingParams(
            seed=None if self.seed in (None, -1) else self.seed % (MAX_SEED + 1),
            stop=_stops(self.stop),
            stop_token_ids=tuple(stop_ids),
            logit_bias=_biases(self.logit_bias or {}),
            logprobs=logprobs,
            grammar=parse_grammar(dict(self)),
            **chosen,
        )


# Of those fields: what `SamplingParams` has by the same name and in the same form.
_PLAIN = SamplingFields.model_fields.keys() - {"logit_bias", "seed", "stop", "stop_token_ids", "timeout"}


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    _check_count("stop", stops, MAX_STOPS, "strings")
    if any(len(string) > MAX_STOP_LEN for string in stops):
        raise RequestError(f"stop strings must have at most {MAX_STOP_LEN} characters", param="stop")
    return stops


def _biases(biases: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """JSON has no numbers as keys: token ids are written as strings."""
    _check_count("logit_bias", biases, MAX_BIASES, "tokens")
    bad = next((key for key in biases if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if bad is not None:
        raise RequestError(f"logit_bias: {quoted(bad)} is not a token id", param="logit_bias")
    wrong = [
        value for value in biases.values() if type(value) not in (int, float) or not -MAX_BIAS <= value <= MAX_BIAS
    ]
    if wrong:
        text = f"logit_bias must have numbers from -{MAX_BIAS} to {MAX_BIAS}, not {quoted(wrong[0])}"
        raise RequestError(text, param="logit_bias")
    return tuple({int(key): float(value) for key, value in biases.items()}.items())


def _check_count(name: str, values: Sized, most: int, what: str) -> None:
    if len(values) > most:
        raise RequestError(f"{name} must hold at most {most} {what}, not {len(values)}", param=name)


def check_ids(name: str, token_ids: Iterable[int]) -> None:
    """Raises: RequestError naming the field when one of them can be no token of any model."""
    bad = next((token for token in token_ids if not 0 <= token < 2**31), None)
    if bad is not None:
        raise RequestError(f"{name}: {bad} is not a token id", param=name)
