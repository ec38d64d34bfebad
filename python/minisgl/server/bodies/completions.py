"""POST /v1/completions: texts, or token ids, that are to be continued."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from minisgl.core import MAX_COUNT, MAX_LOGPROBS
from minisgl.errors import RequestError
from minisgl.message.tokenizer import TextPrompt
from minisgl.server.bodies.fields import Reading, load
from minisgl.server.bodies.request import (
    MAX_CHOICES,
    MAX_OUTPUTS,
    GenerationRequest,
    OpenAIBody,
    generation,
    ids_prompt,
)
from minisgl.server.bodies.sampling import Defaults
from minisgl.server.bodies.strict import Count, Ids, Items, optional

MAX_PROMPTS = 1024
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: str | Items[str] | Ids | Items[Ids] = Field(json_schema_extra={"minItems": 1, "minLength": 1})
    best_of: Count | None = optional("So many outputs, of which the `n` most probable come back.", ge=1, le=MAX_CHOICES)
    max_tokens: Count | None = optional("Most tokens of an output; 0 with `echo` only.", ge=0, le=MAX_COUNT)
    echo: bool | None = optional("The text begins with the prompt's.")
    logprobs: Count | None = optional(
        "Log-probabilities, and so many alternatives to each token.", ge=0, le=MAX_LOGPROBS
    )


def parse_completion(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(CompletionBody, data, reading)
    is_one = isinstance(body.prompt, str) or (body.prompt and all(isinstance(token, int) for token in body.prompt))
    given = [body.prompt] if is_one else body.prompt
    prompts = tuple(TextPrompt(text=p) if isinstance(p, str) else ids_prompt(p, "prompt") for p in given)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"prompt must hold from 1 to {MAX_PROMPTS} prompts, not {len(prompts)}", param="prompt")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    echo = bool(body.echo)
    if max_tokens == 0 and not echo:
        raise RequestError("max_tokens must be at least 1 without echo, not 0", param="max_tokens")
    params = body.params(max_tokens or 1, defaults, body.logprobs)
    of_prompt = body.logprobs if echo else None
    params = replace(params, max_tokens=max_tokens, echo=echo, prompt_logprobs=of_prompt)
    return _best_of(generation(body, prompts, params), body.best_of)


def _best_of(request: GenerationRequest, best_of: int | None) -> GenerationRequest:
    if best_of is None or best_of == request.n:
        return request
    if best_of < request.n:
        raise RequestError(f"best_of must be at least n={request.n}, not {best_of}", param="best_of")
    if best_of * len(request.prompts) > MAX_OUTPUTS:
        raise RequestError(f"best_of={best_of} makes more than {MAX_OUTPUTS} outputs", param="best_of")
    if request.stream:
        raise RequestError("best_of above n cannot be streamed", param="best_of")
    params = request.params
    ranked = params if params.logprobs is not None else replace(params, logprobs=0)
    return replace(request, params=ranked, best_of=best_of)
