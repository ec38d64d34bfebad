"""What clients may send: request bodies, checked and turned into prompts and sampling parameters.

What becomes of fields that no body here has, `fields` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from minisgl.core import MAX_COUNT, MAX_LOGPROBS, SamplingParams
from minisgl.errors import RequestError, too_long
from minisgl.message.codec import pack_ids
from minisgl.message.tokenizer import ChatPrompt, IdsPrompt, Prompt, TextPrompt, least_tokens
from minisgl.server.fields import fields_of, load
from minisgl.server.messages import Message, chat_messages
from minisgl.server.protocol_grammar import GrammarFields
from minisgl.server.protocol_sampling import Defaults, Salt, SamplingFields, check_ids
from minisgl.server.protocol_tools import MAX_TOOLS, Tool, ToolUse, template_kwargs, tool_use
from minisgl.server.strict import Body, Count, Fields, Ids, Items, Reading, load_object, optional, shown, validate

MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_OUTPUTS = 2048  # choices of all prompts together
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "default", "auto")
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions

Describe = Callable[[dict[str, Any]], dict[str, Any]]


class StreamOptions(Body):
    include_usage: bool | None = optional("Counts of tokens, in a last event.")


class _OpenAIBody(Body, SamplingFields, GrammarFields):
    model: str | None = optional("The id that /v1/models shows.")
    n: Count | None = optional("Outputs of each prompt.", ge=1, le=MAX_CHOICES)
    stream: bool | None = optional("Answer with server-sent events.")
    stream_options: StreamOptions | None = optional("For streams only.")


class Reasoning(Body):
    effort: str | None = optional("As `reasoning_effort`.", enum=[None, *EFFORTS])
    enabled: bool | None = optional("false: no reasoning.")


class Thinking(Body):
    type: str = "enabled"


class ChatBody(_OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Items[Message] = Field(json_schema_extra={"minItems": 1})
    max_tokens: Count | None = optional("Most tokens of an output.", ge=1, le=MAX_COUNT)
    max_completion_tokens: Count | None = optional("The same, by its name of today.", ge=1, le=MAX_COUNT)
    logprobs: bool | None = optional("Log-probabilities of the output's tokens.")
    top_logprobs: Count | None = optional("So many alternatives to each; with `logprobs`.", ge=0, le=MAX_LOGPROBS)
    tools: Items[Tool] | None = optional("Functions that the model may call.", maxItems=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = optional("Whether it has to.")
    parallel_tool_calls: bool | None = optional("false: one call at most.")
    chat_template_kwargs: dict[str, Any] | None = optional("For the chat template.")
    reasoning_effort: str | None = optional("For the chat template; none: no reasoning.", enum=[None, *EFFORTS])
    reasoning: Reasoning | None = optional("The same, as OpenRouter and /v1/responses have it.")
    enable_thinking: bool | None = optional("For the chat template.")
    thinking: bool | str | Thinking | None = optional("The same, as Anthropic, DeepSeek and others have it.")
    add_generation_prompt: bool | None = optional("false: nobody's turn is begun after the messages.")
    continue_final_message: bool | None = optional("The last message, an assistant's, goes on; the answer is the rest.")


class CompletionBody(_OpenAIBody):
    """POST /v1/completions."""

    prompt: str | Items[str] | Ids | Items[Ids] = Field(json_schema_extra={"minItems": 1, "minLength": 1})
    best_of: Count | None = optional("So many outputs, of which the `n` most probable come back.", ge=1, le=MAX_CHOICES)
    max_tokens: Count | None = optional("Most tokens of an output; 0 with `echo` only.", ge=0, le=MAX_COUNT)
    echo: bool | None = optional("The text begins with the prompt's.")
    logprobs: Count | None = optional(
        "Log-probabilities, and so many alternatives to each token.", ge=0, le=MAX_LOGPROBS
    )


class GenerateSampling(Body, SamplingFields):
    """`sampling_params` of POST /generate."""

    max_tokens: Count | None = optional("Most tokens of the output.", ge=1, le=MAX_COUNT)
    max_new_tokens: Count | None = optional("The same.", ge=1, le=MAX_COUNT)
    json_schema: dict[str, Any] | str | None = optional("The output is JSON that matches.")
    regex: str | None = optional("The output matches.")
    ebnf: str | None = optional("The output follows the grammar, Lark or EBNF.")


class GenerateBody(Body):
    """POST /generate: `text` or `input_ids`."""

    inner = {"sampling_params": GenerateSampling}  # noqa: RUF012
    text: str | None = optional("The prompt.", minLength=1)
    input_ids: Ids | None = optional("The prompt as token ids.", minItems=1)
    sampling_params: GenerateSampling | None = optional("How to continue it.")
    cache_salt: Salt | None = optional("As in `sampling_params`.")
    stream: bool | None = optional("Answer with server-sent events.")
    timeout: float | None = optional("As in `sampling_params`.", gt=0, le=1e6)


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


def parse_chat(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    return chat_request(load_object(data, fields_of(ChatBody), reading), defaults)


def chat_request(raw: dict[str, Any], defaults: Defaults, names: Mapping[str, str] | None = None) -> GenerationRequest:
    """The body of a chat, checked. names: see `renamed`. Raises: RequestError naming the field at fault."""
    try:
        return replace(_chat_request(validate(ChatBody, raw), defaults), names=names)
    except RequestError as error:
        raise renamed(error, names) from None


def _chat_request(body: ChatBody, defaults: Defaults) -> GenerationRequest:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = chat_messages(body.messages)
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs is only allowed with logprobs", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    tools = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    described = None if tools is None else tools.shown
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        raise RequestError("continue_final_message needs add_generation_prompt=false", param="continue_final_message")
    if goes_on and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]):
        message = "continue_final_message: the last message must be an assistant's, without tool calls"
        raise RequestError(message, param="continue_final_message")
    kwargs = _reasoning(body) | template_kwargs(body.chat_template_kwargs)
    prompt = ChatPrompt(messages, described, kwargs, body.add_generation_prompt is not False, goes_on)
    params = body._params(max_tokens, defaults, logprobs)
    return replace(_request(body, (prompt,), params), tools=tools)


def parse_completion(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(CompletionBody, data, reading)
    is_one = isinstance(body.prompt, str) or (body.prompt and all(isinstance(token, int) for token in body.prompt))
    given = [body.prompt] if is_one else body.prompt
    prompts = tuple(TextPrompt(text=p) if isinstance(p, str) else _ids_prompt(p, "prompt") for p in given)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"prompt must hold from 1 to {MAX_PROMPTS} prompts, not {len(prompts)}", param="prompt")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    echo = bool(body.echo)
    if max_tokens == 0 and not echo:
        raise RequestError("max_tokens must be at least 1 without echo, not 0", param="max_tokens")
    params = body._params(max_tokens or 1, defaults, body.logprobs)
    of_prompt = body.logprobs if echo else None
    params = replace(params, max_tokens=max_tokens, echo=echo, prompt_logprobs=of_prompt)
    return _best_of(_request(body, prompts, params), body.best_of)


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


def parse_generate(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(GenerateBody, data, reading)
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("give either text or input_ids", param="text")
    sampling = body.sampling_params or GenerateSampling()
    max_tokens = sampling.max_tokens if sampling.max_new_tokens is None else sampling.max_new_tokens
    prompt = TextPrompt(text=body.text) if body.text is not None else _ids_prompt(body.input_ids or [], "input_ids")
    sampling.cache_salt = body.cache_salt or sampling.cache_salt
    params, timeout = sampling._params(max_tokens, defaults), body.timeout or sampling.timeout or 0.0
    return GenerationRequest((prompt,), params, stream=bool(body.stream), timeout=timeout)


def _request(body: _OpenAIBody, prompts: tuple[Prompt, ...], params: SamplingParams) -> GenerationRequest:
    n = 1 if body.n is None else body.n
    if n * len(prompts) > MAX_OUTPUTS:
        raise RequestError(f"{len(prompts)} prompts with n={n} are more than {MAX_OUTPUTS} outputs", param="n")
    usage = bool(body.stream_options and body.stream_options.include_usage)
    logprobs, timeout = params.logprobs is not None, body.timeout or 0.0
    return GenerationRequest(
        prompts, params, n, body.model, bool(body.stream), usage, logprobs=logprobs, timeout=timeout
    )


def _reasoning(body: ChatBody) -> dict[str, Any]:
    """What the chat template is told of reasoning, by the names that templates have for it."""
    reasoning, thinking = body.reasoning or Reasoning(), body.thinking
    given = {"reasoning_effort": body.reasoning_effort, "reasoning.effort": reasoning.effort}
    given["thinking"] = thinking if isinstance(thinking, str) else None  # as Ollama has it
    where, effort = next(((name, value) for name, value in given.items() if value), ("", None))
    if effort not in (None, *EFFORTS):
        raise RequestError(f"{where} must be one of {', '.join(EFFORTS)}, not {shown(effort)!r}", param=where)
    switched = thinking.type != "disabled" if isinstance(thinking, Thinking) else thinking
    wishes = (body.enable_thinking, switched, reasoning.enabled, False if effort == "none" else None)
    thinks = next((wish for wish in wishes if isinstance(wish, bool)), None)
    told: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    return told if thinks is None else {**told, "enable_thinking": thinks, "thinking": thinks}


def _ids_prompt(token_ids: Any, name: str) -> IdsPrompt:
    check_ids(name, token_ids)
    return IdsPrompt(input_ids=pack_ids(token_ids))


def check_size(prompts: Sequence[Prompt], max_seq_len: int, names: Mapping[str, str] | None = None) -> None:
    """names: see `renamed`. Raises: RequestError when a prompt cannot fit the context, whatever its tokens are."""
    for prompt in prompts:
        if (size := least_tokens(prompt)) >= max_seq_len:
            param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
            raise renamed(too_long(param, f"at least {size}", max_seq_len), names)


def functions_of(
    tools: Sequence[dict[str, Any]], kinds: Mapping[str, Describe], reading: Reading, known: Fields
) -> list[dict[str, Any]]:
    """Tools of another API as chats have them. kinds: what makes functions of them; without a kind, a tool is of the
    first. Other kinds are run by another server, or known to another model: they are ignored."""
    functions = []
    for index, tool in enumerate(tools):
        kind = tool.get("type", next(iter(kinds)))
        if isinstance(kind, str) and kind in kinds:
            functions.append({"type": "function", "function": kinds[kind](tool)})
        else:
            reading.ignore(f"tools[{index}].{shown(str(kind))}", known)
    return functions


def renamed(error: RequestError, names: Mapping[str, str] | None) -> RequestError:
    """An error about a chat, as another API says it. names: that it has for parameters (None: it is no other); a
    function is flat there."""
    if names is None:
        return error
    old, message = (error.param or "").partition("[")[0], str(error)
    param = names.get(old, error.param)
    message = names[old] + message.removeprefix(old) if old in names and message.startswith(old) else message
    for text, other in {**names, ".function": ""}.items():
        if text.startswith("."):
            message, param = message.replace(text, other, 1), param and param.replace(text, other, 1)
    return RequestError(message, param=param, code=error.code, status=error.status)
