"""The sampling fields that all dialects share, and what of them becomes `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as quoted
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints

from minisgl.core import MAX_BIAS, MAX_COUNT, MAX_SEED, RANGES, Range, SamplingParams
from minisgl.server.bodies.grammar import parse_grammar
from minisgl.server.bodies.strict import Count, Ids, Items, Object, at_most, optional, refuse_unless

Defaults = Mapping[str, float | int]  # of the model: sampling fields that a request may leave out
MAX_STOPS, MAX_STOP_LEN = 16, 1024
MAX_STOP_IDS = 128
MAX_BIASES = 1024  # OpenAI's client libraries know of 300
Salt = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]
_STRING: Object = {"minLength": 1, "maxLength": MAX_STOP_LEN}
_BIAS = {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS}


def _within(name: str, text: str) -> Any:
    """A field that is a parameter of the same name, and has its range."""
    return optional(text, RANGES[name])


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
    logit_bias: dict[str, Any] | None = optional(
        "Token id: what is added to its logit.",
        maxProperties=MAX_BIASES,
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties=_BIAS,
    )
    seed: Count | None = optional("The same seed, the same output; -1 is none.", Range(-MAX_SEED - 1, MAX_SEED))
    stop: str | Items[str] | None = optional(
        "What ends the output; it is cut off.", maxItems=MAX_STOPS, items={"type": "string", **_STRING}, **_STRING
    )
    stop_token_ids: Ids | None = optional("Tokens that end the output.", maxItems=MAX_STOP_IDS)
    include_stop_str_in_output: bool | None = optional("Do not cut the stop string off.")
    min_tokens: Count | None = optional("No end before so many tokens; at most `max_tokens`.", Range(0, MAX_COUNT))
    ignore_eos: bool | None = optional("Go on after end-of-sequence tokens.")
    skip_special_tokens: bool | None = optional("false: special tokens are text.")
    priority: Count | None = _within("priority", "The lowest goes first; for `--schedule-policy priority`.")
    cache_salt: Salt | None = optional("Cached prefixes are shared with requests of the same salt and API key only.")
    timeout: Seconds | None = optional("The answer ends with an error after so many seconds.")

    def params(self, max_tokens: int | None, defaults: Defaults, logprobs: int | None = None) -> SamplingParams:
        """Raises: RequestError naming the field that is out of range."""
        if max_tokens is None and "max_tokens" in defaults:  # which is no limit to what the request asks for
            max_tokens = max(int(defaults["max_tokens"]), self.min_tokens or 0)
        given = {"max_tokens": max_tokens, **{name: getattr(self, name) for name in _PLAIN}}
        chosen: dict[str, Any] = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        if self.top_p == 0:
            chosen |= {"top_p": 1.0, "temperature": 0.0}
        stop_ids = at_most(MAX_STOP_IDS, "ids", "stop_token_ids", self.stop_token_ids or ())
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
    stops = at_most(MAX_STOPS, "strings", "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
    are_short = all(len(string) <= MAX_STOP_LEN for string in stops)
    refuse_unless(are_short, f"stop strings must have at most {MAX_STOP_LEN} characters", "stop")
    return stops


def _biases(biases: Object) -> tuple[tuple[int, float], ...]:
    """JSON has no numbers as keys: token ids are written as strings."""
    name = "logit_bias"
    at_most(MAX_BIASES, "tokens", name, biases)
    expected = f"must have numbers from -{MAX_BIAS} to {MAX_BIAS}"
    for key, value in biases.items():
        is_id = key.isascii() and key.isdigit() and len(key) < 10
        refuse_unless(is_id, f"{name}: {quoted(key)} is not a token id", name)
        is_bias = type(value) in (int, float) and abs(value) <= MAX_BIAS
        refuse_unless(is_bias, f"{name} {expected}, not {quoted(value)}", name)
    return tuple({int(key): float(value) for key, value in biases.items()}.items())
