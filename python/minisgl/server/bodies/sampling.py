"""The fields that say how tokens are chosen and what they have to match, for all dialects: `SamplingParams` of them.

`response_format` is OpenAI's. `structured_outputs` and `guided_*` are vLLM's; `json_schema`, `regex` and `ebnf`, in the
`sampling_params` of /generate, SGLang's. At most one of them may be given.
"""

import json
from collections.abc import Mapping
from reprlib import repr as quoted
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from minisgl.core import MAX_BIAS, MAX_COUNT, MAX_SEED, RANGES, Grammar, Range, SamplingParams
from minisgl.errors import RequestError
from minisgl.parser.tools import MAX_TEXT
from minisgl.server.bodies.content import text_of
from minisgl.server.bodies.fields import SCHEMAS, Body, Count, Ids, Items, Object, optional
from minisgl.server.errors import at_most, refuse_unless

MAX_CHOICES = 4096
_ANY_OBJECT: Object = {"type": "object"}


class GrammarFields(BaseModel):
    """To be inherited by request bodies of OpenAI's endpoints."""

    response_format: Object | None = optional("OpenAI's way to ask for JSON.", **SCHEMAS["response_format"])
    structured_outputs: Object | None = optional("The output matches one of these.", **SCHEMAS["structured_outputs"])
    guided_json: Object | str | None = optional("The output is JSON that matches the schema.")
    guided_regex: str | None = optional("The output matches.", minLength=1)
    guided_choice: Items[str] | None = optional("The output is one of these.", minItems=1, maxItems=MAX_CHOICES)
    guided_grammar: str | None = optional("The output follows the grammar, Lark or EBNF.", minLength=1)


def parse_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """fields: of a request, None where not given. Raises: RequestError naming the field at fault."""
    found: list[Grammar] = []
    for name, value in fields.items():
        if value is None:
            continue
        if name == "response_format":
            found += _response_format(value)
        elif name == "structured_outputs":
            found.append(_structured_outputs(value))
        elif name in SCHEMAS["kinds"]:
            found.append(_grammar(SCHEMAS["kinds"][name], value, name))
    if len(found) > 1:
        raise RequestError(f"{found[0].param} and {found[1].param} cannot both be given", param=found[1].param)
    return found[0] if found else None


def form_grammar(form: Any, param: str) -> Grammar:
    """A grammar of calls, and of what may come in their place. Raises: RequestError when it is too long."""
    return _grammar("form", json.dumps(form), param)


def _response_format(value: Any) -> list[Grammar]:
    name = "response_format"
    kind = value.get("type")
    is_known = kind in ("text", "json_object", "json_schema")
    refuse_unless(is_known, f"{name}.type must be text, json_object or json_schema, not {quoted(kind)}", name)
    if kind == "text":
        return []
    inner = value.get("json_schema")
    if inner is None and (kind == "json_object" or value.get("schema") is not None):
        inner = {"schema": value.get("schema")}  # beside the type, as others have it
    refuse_unless(isinstance(inner, dict), f"{name}.json_schema must be an object", name)
    for key, types in (("name", str), ("description", str), ("strict", bool)):
        is_right = isinstance(inner.get(key), types | None)
        refuse_unless(is_right, f"{name}.json_schema.{key} must be a {types.__name__}", name)
    schema, whitespace = inner.get("schema"), value.get("whitespace", inner.get("whitespace"))
    return [_grammar("json", _ANY_OBJECT if schema is None else schema, name, whitespace)]


def _structured_outputs(value: Any) -> Grammar:
    name = "structured_outputs"
    given = {key: part for key, part in value.items() if key != "whitespace" and part not in (None, False)}
    refuse_unless(len(given) == 1, f"{name} must have exactly one of json, regex, choice, grammar, json_object", name)
    ((key, part),) = given.items()
    if key == "json_object":
        refuse_unless(part is True, f"{name}.json_object must be true or false", name)
        key, part = "json", _ANY_OBJECT
    return _grammar(SCHEMAS["kinds"][key], part, name, value.get("whitespace"))


def _grammar(kind: str, value: Any, name: str, whitespace: Any = None) -> Grammar:
    """Raises: RequestError when it is no schema (an object, or its text), or choice, or text; or too long."""
    text = value
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(_bounded(value, name))
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{name} is not valid JSON: {error}", param=name) from None
        refuse_unless(isinstance(value, dict), f"{name} must be a JSON schema: an object", name)
        is_known = whitespace in (None, "compact", "any")
        refuse_unless(is_known, f"{name}.whitespace must be compact or any, not {quoted(whitespace)}", name)
        text = json.dumps(value)
    elif kind == "choice":
        are_texts = value and isinstance(value, list) and all(isinstance(item, str) for item in value)
        refuse_unless(are_texts, f"{name} must be a list of strings that is not empty", name)
        is_short = len(value) <= MAX_CHOICES
        refuse_unless(is_short, f"{name} must have at most {MAX_CHOICES} choices, not {len(value)}", name)
        text = json.dumps(value)
    refuse_unless(text and isinstance(text, str), f"{name} must be a {kind}: a string that is not empty", name)
    return Grammar(kind, _bounded(text, name), (kind == "json" and whitespace) or "compact", param=name)


def _bounded(text: str, name: str) -> str:
    refuse_unless(len(text) <= MAX_TEXT, f"{name} has {len(text)} characters, more than {MAX_TEXT}", name)
    return text


Defaults = Mapping[str, float | int]  # of the model: sampling fields that a request may leave out
MAX_STOPS, MAX_STOP_LEN = SCHEMAS["stop"]["maxItems"], SCHEMAS["stop"]["maxLength"]
MAX_STOP_IDS, MAX_BIASES = 128, SCHEMAS["logit_bias"]["maxProperties"]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _within(name: str, text: str) -> Any:
    """A field that is a parameter of the same name, and has its range."""
    return optional(text, RANGES[name])


class RequestFields(BaseModel):
    """Of all that asks a model."""

    cache_salt: Salt | None = optional("Cached prefixes are shared with requests of the same salt and API key only.")
    timeout: Annotated[float, Field(gt=0, le=1e6)] | None = optional("Seconds until the answer ends with an error.")


class SamplingFields(RequestFields):
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
    seed: Count | None = optional("The same seed, the same output; -1 is none.", Range(-MAX_SEED - 1, MAX_SEED))
    stop: str | Items[str] | None = optional("What ends the output; it is cut off.", **SCHEMAS["stop"])
    stop_token_ids: Ids | None = optional("Tokens that end the output.", maxItems=MAX_STOP_IDS)
    include_stop_str_in_output: bool | None = optional("Do not cut the stop string off.")
    min_tokens: Count | None = optional("No end before so many tokens; at most `max_tokens`.", Range(0, MAX_COUNT))
    ignore_eos: bool | None = optional("Go on after end-of-sequence tokens.")
    skip_special_tokens: bool | None = optional("false: special tokens are text.")
    priority: Count | None = _within("priority", "The lowest goes first; for `--schedule-policy priority`.")
    speculate: Count | None = _within("speculate", "The longest draft, where the server speculates; 0: none.")

    def params(self, max_tokens: int | None, defaults: Defaults, logprobs: int | None = None) -> SamplingParams:
        """Raises: RequestError naming the field that is out of range."""
        if max_tokens is None and "max_tokens" in defaults:  # which is no limit to what the request asks for
            max_tokens = max(int(defaults["max_tokens"]), self.min_tokens or 0)
        given = {"max_tokens": max_tokens, **{name: getattr(self, name) for name in _PLAIN}}
        chosen: dict[str, Any] = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        if self.top_p == 0:
            chosen |= {"top_p": 1.0, "temperature": 0.0}
        stop_ids = at_most(MAX_STOP_IDS, "ids", "stop_token_ids", self.stop_token_ids or ())
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        are_short = all(len(string) <= MAX_STOP_LEN for string in at_most(MAX_STOPS, "strings", "stop", stops))
        refuse_unless(are_short, f"stop strings must have at most {MAX_STOP_LEN} characters", "stop")
        return SamplingParams(
            seed=None if self.seed in (None, -1) else self.seed % (MAX_SEED + 1),
            stop=tuple(stops),
            stop_token_ids=tuple(stop_ids),
            logit_bias=_biases(self.logit_bias or {}),
            logprobs=logprobs,
            grammar=parse_grammar(dict(self)),
            **chosen,
        )


class Prediction(Body):
    type: Literal["content"]
    content: str | Items[Object]

    def text(self) -> str:
        """Raises: RequestError where a part is none."""
        return text_of(self.content, "prediction.content")


# Of those fields: what `SamplingParams` has by the same name and in the same form.
_PLAIN = SamplingFields.model_fields.keys() - {"logit_bias", "seed", "stop", "stop_token_ids", "timeout"}


def _biases(biases: Object) -> tuple[tuple[int, float], ...]:
    """JSON has no numbers as keys: token ids are written as strings."""
    name = "logit_bias"
    at_most(MAX_BIASES, "tokens", name, biases)
    for key, value in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"{name}: {quoted(key)} is not a token id", param=name)
        if type(value) not in (int, float) or abs(value) > MAX_BIAS:
            expected = f"numbers from -{MAX_BIAS} to {MAX_BIAS}"
            raise RequestError(f"{name} must have {expected}, not {quoted(value)}", param=name)
    return tuple({int(key): float(value) for key, value in biases.items()}.items())
