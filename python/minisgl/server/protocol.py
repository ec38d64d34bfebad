"""What clients may send: request bodies, checked and turned into prompts and sampling parameters.

Each field of OpenAI's API is honoured, accepted because it has no bearing on the output (`_NO_EFFECT`), accepted with
the one value that changes nothing (`_UNSUPPORTED`), or refused with a 400 that names it. Unknown fields are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from minisgl.core import MAX_SEED, SamplingParams
from minisgl.errors import RequestError
from minisgl.message.codec import pack_ids
from minisgl.message.tokenizer import ChatPrompt, IdsPrompt, Prompt, TextPrompt
from minisgl.server.content import text_of
from minisgl.server.strict import Body, load_object, validate

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_OUTPUTS = 2048  # choices of all prompts together
MAX_STOPS, MAX_STOP_LEN = 16, 1024
ROLES = ("system", "developer", "user", "assistant")
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions


def _is_empty(value: Any) -> bool:
    return value is None or value in ({}, [], 0, "")  # 0 == False


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or value in values


# Known to OpenAI's API, without bearing on what is generated.
_NO_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Known, and not supported: the test says which values mean the same as leaving the field out.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "audio": _is_empty,
    "best_of": _is(1),
    "echo": _is(False),
    "frequency_penalty": _is(0),
    "function_call": _is("none", "auto"),
    "functions": _is_empty,
    "logit_bias": _is_empty,
    "logprobs": _is(False),
    "modalities": _is(["text"]),
    "parallel_tool_calls": _is(True, False),
    "prediction": _is_empty,
    "presence_penalty": _is(0),
    "reasoning_effort": _is_empty,
    "repetition_penalty": _is(1),
    "response_format": _is({"type": "text"}),
    "suffix": _is_empty,
    "tool_choice": _is("none", "auto"),
    "tools": _is_empty,
    "top_logprobs": _is(0),
    "verbosity": _is("medium"),
    "web_search_options": lambda value: value is None,
}
# The same, in a message of a chat: what a client sends back as it got it from us.
_MESSAGE_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "annotations": _is_empty,
    "audio": _is_empty,
    "function_call": _is_empty,
    "refusal": _is_empty,
    "tool_call_id": _is_empty,
    "tool_calls": _is_empty,
}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(Body):
    """Sampling fields under the names that all endpoints share."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None

    def _params(self, max_tokens: int | None, defaults: Mapping[str, float | int]) -> SamplingParams:
        """Raises: RequestError naming the field that is out of range."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        chosen: dict[str, Any] = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        return SamplingParams(
            max_tokens=max_tokens,
            seed=self.seed,
            stop=_stops(self.stop),
            ignore_eos=bool(self.ignore_eos),
            **chosen,
        )


class _OpenAIBody(SamplingFields):
    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(_OpenAIBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None


class CompletionBody(_OpenAIBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]


class GenerateSampling(SamplingFields):
    """`sampling_params` of POST /generate."""

    max_tokens: int | None = None
    max_new_tokens: int | None = None


class GenerateBody(Body):
    """POST /generate: `text` or `input_ids`."""

    text: str | None = None
    input_ids: list[int] | None = None
    sampling_params: GenerateSampling | None = None
    stream: bool | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request: what to generate, and how to answer."""

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    n: int = 1
    model: str | None = None
    stream: bool = False
    include_usage: bool = False


def parse_chat(data: bytes, defaults: Mapping[str, float | int]) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = _parse(ChatBody, data)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens cannot both be given", param="max_tokens")
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(body.messages)]
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    return _request(body, (ChatPrompt(messages=messages),), max_tokens, defaults)


def parse_completion(data: bytes, defaults: Mapping[str, float | int]) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = _parse(CompletionBody, data)
    prompt = body.prompt
    prompts: tuple[Prompt, ...]
    if isinstance(prompt, str):
        prompts = (TextPrompt(text=prompt),)
    elif prompt and all(isinstance(token, int) for token in prompt):
        prompts = (_ids_prompt(prompt, "prompt"),)
    else:
        prompts = tuple(TextPrompt(text=p) if isinstance(p, str) else _ids_prompt(p, "prompt") for p in prompt)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"prompt must hold from 1 to {MAX_PROMPTS} prompts, not {len(prompts)}", param="prompt")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _request(body, prompts, max_tokens, defaults)


def parse_generate(data: bytes, defaults: Mapping[str, float | int]) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = _parse(GenerateBody, data)
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("give either text or input_ids", param="text")
    sampling = body.sampling_params or GenerateSampling()
    if sampling.max_tokens is not None and sampling.max_new_tokens is not None:
        raise RequestError("max_tokens and max_new_tokens cannot both be given", param="max_tokens")
    max_tokens = sampling.max_new_tokens if sampling.max_tokens is None else sampling.max_tokens
    prompt = TextPrompt(text=body.text) if body.text is not None else _ids_prompt(body.input_ids or [], "input_ids")
    return GenerationRequest((prompt,), sampling._params(max_tokens, defaults), stream=bool(body.stream))


def _request(
    body: _OpenAIBody, prompts: tuple[Prompt, ...], max_tokens: int | None, defaults: Mapping[str, float | int]
) -> GenerationRequest:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        raise RequestError(f"n must be from 1 to {MAX_CHOICES}, not {n}", param="n")
    if n * len(prompts) > MAX_OUTPUTS:
        raise RequestError(f"{len(prompts)} prompts with n={n} are more than {MAX_OUTPUTS} outputs", param="n")
    options = body.stream_options
    if options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream", param="stream_options")
    if options is not None and options.include_obfuscation:
        raise RequestError("stream_options.include_obfuscation is not supported", param="stream_options")
    return GenerationRequest(
        prompts=prompts,
        params=body._params(max_tokens, defaults),
        n=n,
        model=body.model,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
    )


B = TypeVar("B", bound=BaseModel)


def _parse(model: type[B], data: bytes) -> B:
    raw = load_object(data)
    if issubclass(model, _OpenAIBody):
        _drop_known(raw, "")
    return validate(model, raw)


def _drop_known(raw: dict[str, Any], where: str) -> None:
    """Remove fields that change nothing. Raises: RequestError naming a field that would and is not supported."""
    table = _MESSAGE_UNSUPPORTED if where else _UNSUPPORTED
    for name in [name for name in raw if name in table or (not where and name in _NO_EFFECT)]:
        value = raw.pop(name)
        if name in table and not table[name](value):
            raise RequestError(f"{where}{name} is not supported", param=f"{where}{name}")


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """One message of a chat as templates expect it: a role, and its text as one string."""
    message = dict(message)
    _drop_known(message, f"{where}.")
    unknown = [name for name in message if name not in ("role", "content", "name")]
    if unknown:
        raise RequestError(f"unknown field: {where}.{unknown[0]}", param=f"{where}.{unknown[0]}")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}", param=f"{where}.role")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    result = {"role": "system" if role == "developer" else role, "content": text_of(content, f"{where}.content")}
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise RequestError(f"{where}.name must be a string", param=f"{where}.name")
        result["name"] = name
    return result


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop must hold at most {MAX_STOPS} strings, not {len(stops)}", param="stop")
    if any(len(string) > MAX_STOP_LEN for string in stops):
        raise RequestError(f"stop strings must have at most {MAX_STOP_LEN} characters", param="stop")
    return stops


def _ids_prompt(token_ids: Any, name: str) -> IdsPrompt:
    bad = next((token for token in token_ids if not 0 <= token < 2**31), None)
    if bad is not None:
        raise RequestError(f"{name}: {bad} is not a token id", param=name)
    return IdsPrompt(input_ids=pack_ids(token_ids))


def choice_seeds(params: SamplingParams, count: int) -> list[int | None]:
    """Seeds of the `count` outputs of one request: they differ, and are as reproducible as the request asks."""
    return [None if params.seed is None else (params.seed + index) % (MAX_SEED + 1) for index in range(count)]
