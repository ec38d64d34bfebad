"""A request to generate, which a body of any dialect becomes; and those of /v1/chat/completions and /v1/completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec.msgpack import encode
from pydantic import Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from minisgl.core import MAX_COUNT, RANGES, Range, SamplingParams
from minisgl.errors import RequestError, too_long
from minisgl.message.messages import ChatPrompt, IdsPrompt, Prompt, TextPrompt, pack_ids
from minisgl.server.bodies.content import MAX_TOOLS, Message, Tool, ToolUse, chat_messages, template_kwargs, tool_use
from minisgl.server.bodies.fields import Body, Count, Ids, Items, MaxTokens, Object, Reading, load, optional, validate
from minisgl.server.bodies.sampling import Defaults, GrammarFields, Prediction, SamplingFields
from minisgl.server.errors import refuse_unless, renamed, shown

_CHOICES = Range(1, 128)  # of one prompt
MAX_PROMPTS = 1024
MAX_OUTPUTS = 2048  # choices of all prompts together
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "default", "auto")
LONGEST_TOKEN = 512  # bytes: no model has a longer one
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions


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
    names: Mapping[str, str] | None = None  # what the client's API calls fields of a chat; None: the same

    @property
    def num_choices(self) -> int:
        """Outputs for each prompt."""
        return self.best_of or self.n


class StreamOptions(Body):
    include_usage: bool | None = optional("Counts of tokens, in a last event.")


class _OpenAIBody(Body, SamplingFields, GrammarFields):
    model: str | None = optional("The id that /v1/models shows.")
    n: Count | None = optional("Outputs of each prompt.", _CHOICES)
    stream: bool | None = optional("Answer with server-sent events.")
    stream_options: StreamOptions | None = optional("For streams only.")

    def request(self, prompts: tuple[Prompt, ...], params: SamplingParams) -> GenerationRequest:
        n = 1 if self.n is None else self.n
        are_few = n * len(prompts) <= MAX_OUTPUTS
        refuse_unless(are_few, f"{len(prompts)} prompts with n={n} are more than {MAX_OUTPUTS} outputs", "n")
        usage = bool(self.stream_options and self.stream_options.include_usage)
        more: dict[str, Any] = {"logprobs": params.logprobs is not None, "timeout": self.timeout or 0.0}
        return GenerationRequest(prompts, params, n, self.model, bool(self.stream), usage, **more)


class Reasoning(Body):
    effort: str | None = optional("As `reasoning_effort`.", enum=[None, *EFFORTS])
    enabled: bool | None = optional("false: no reasoning.")


class ChatBody(_OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Items[Message] = Field(json_schema_extra={"minItems": 1})
    prompt: SkipJsonSchema[str | None] = None  # as Mini-SGLang has it: in place of messages, one of the user
    max_tokens: MaxTokens | None = optional("Most tokens of an output.")
    max_completion_tokens: MaxTokens | None = optional("The same, by its name of today.")
    logprobs: bool | None = optional("Log-probabilities of the output's tokens.")
    top_logprobs: Count | None = optional("So many alternatives to each; with `logprobs`.", RANGES["logprobs"])
    tools: Items[Tool] | None = optional("Functions that the model may call.", maxItems=MAX_TOOLS)
    tool_choice: str | Object | None = optional("Whether it has to.")
    parallel_tool_calls: bool | None = optional("false: one call at most.")
    prediction: Prediction | None = optional("What the answer may be, in part at least: it comes faster then.")
    chat_template_kwargs: Object | None = optional("For the chat template.")
    reasoning_effort: str | None = optional("For the chat template; none: no reasoning.", enum=[None, *EFFORTS])
    reasoning: Reasoning | None = optional("The same, as OpenRouter and /v1/responses have it.")
    enable_thinking: bool | None = optional("For the chat template.")
    thinking: bool | str | Object | None = optional("The same, as Anthropic, DeepSeek and others have it.")
    add_generation_prompt: bool | None = optional("false: nobody's turn is begun after the messages.")
    continue_final_message: bool | None = optional("The last message, an assistant's, goes on; the answer is the rest.")

    @model_validator(mode="before")
    @classmethod
    def _as_messages(cls, raw: Object) -> Object:
        refuse_unless(not {"prompt", "messages"} <= raw.keys(), "give either messages or prompt", "prompt")
        said = [{"role": "user", "content": raw.get("prompt")}]
        return {**raw, "messages": said} if isinstance(raw.get("prompt"), str) else raw


def parse_chat(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    return _chat_request(load(ChatBody, data, reading), defaults)


def chat_request(raw: Object, defaults: Defaults, names: Mapping[str, str] | None = None) -> GenerationRequest:
    """A chat, checked. names: that the client has for fields. Raises: RequestError naming the one at fault."""
    try:
        return replace(_chat_request(validate(ChatBody, raw), defaults), names=names)
    except RequestError as error:
        raise renamed(error, names) from None


def _chat_request(body: ChatBody, defaults: Defaults) -> GenerationRequest:
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    messages = chat_messages(body.messages)
    refuse_unless(body.logprobs or not body.top_logprobs, "top_logprobs is only allowed with logprobs", "top_logprobs")
    tools = tool_use(body.tools or (), body.tool_choice, body.parallel_tool_calls)
    if goes_on := bool(body.continue_final_message):
        name, last = "continue_final_message", messages[-1]
        refuse_unless(not body.add_generation_prompt, f"{name} needs add_generation_prompt=false", name)
        is_text = last["role"] == "assistant" and "tool_calls" not in last
        refuse_unless(is_text, f"{name}: the last message must be an assistant's, without tool calls", name)
    kwargs = _reasoning(body) | template_kwargs(body.chat_template_kwargs or {})
    begins = body.add_generation_prompt is not False
    prompt = ChatPrompt(messages, None if tools is None else tools.shown, kwargs, begins, goes_on)
    params = body.params(max_tokens, defaults, (body.top_logprobs or 0) if body.logprobs else None)
    guess = () if body.prediction is None else body.prediction.text()
    return replace(body.request((prompt,), replace(params, prediction=guess)), tools=tools)


def _reasoning(body: ChatBody) -> Object:
    """What the chat template is told of reasoning, by the names that templates have for it."""
    reasoning, thinking = body.reasoning or Reasoning(), body.thinking
    given = {"reasoning_effort": body.reasoning_effort, "reasoning.effort": reasoning.effort}
    given["thinking"] = thinking if isinstance(thinking, str) else None  # as Ollama has it
    where, effort = next(((name, value) for name, value in given.items() if value), ("", None))
    if effort not in (None, *EFFORTS):
        raise RequestError(f"{where} must be one of {', '.join(EFFORTS)}, not {shown(effort)!r}", param=where)
    switched = thinking.get("type") != "disabled" if isinstance(thinking, dict) else thinking
    wishes = (body.enable_thinking, switched, reasoning.enabled, False if effort == "none" else None)
    thinks = next((wish for wish in wishes if isinstance(wish, bool)), None)
    told: Object = {} if effort is None else {"reasoning_effort": effort}
    return told if thinks is None else {**told, "enable_thinking": thinks, "thinking": thinks}


class CompletionBody(_OpenAIBody):
    """POST /v1/completions."""

    prompt: str | Items[str] | Ids | Items[Ids] = Field(json_schema_extra={"minItems": 1, "minLength": 1})
    best_of: Count | None = optional("So many outputs, of which the `n` most probable come back.", _CHOICES)
    max_tokens: Count | None = optional("Most tokens of an output; 0 with `echo` only.", Range(0, MAX_COUNT))
    echo: bool | None = optional("The text begins with the prompt's.")
    logprobs: Count | None = optional("Log-probabilities, and so many alternatives to each token.", RANGES["logprobs"])


def parse_completion(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(CompletionBody, data, reading)
    given: Any = body.prompt
    is_one = isinstance(given, str) or (given and isinstance(given[0], int))
    prompts = tuple(
        TextPrompt(text=one) if isinstance(one, str) else IdsPrompt(input_ids=pack_ids(one))
        for one in ([given] if is_one else given)
    )
    is_right = 1 <= len(prompts) <= MAX_PROMPTS
    refuse_unless(is_right, f"prompt must hold from 1 to {MAX_PROMPTS} prompts, not {len(prompts)}", "prompt")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    echo = bool(body.echo)
    refuse_unless(max_tokens or echo, "max_tokens must be at least 1 without echo, not 0", "max_tokens")
    params = body.params(max_tokens or 1, defaults, body.logprobs)
    params = replace(params, max_tokens=max_tokens, echo=echo, prompt_logprobs=body.logprobs if echo else None)
    request, best_of = body.request(prompts, params), body.best_of
    if best_of is None or best_of == request.n:
        return request
    refuse_unless(best_of > request.n, f"best_of must be at least n={request.n}, not {best_of}", "best_of")
    are_few = best_of * len(request.prompts) <= MAX_OUTPUTS
    refuse_unless(are_few, f"best_of={best_of} makes more than {MAX_OUTPUTS} outputs", "best_of")
    refuse_unless(not request.stream, "best_of above n cannot be streamed", "best_of")
    ranked = params if params.logprobs is not None else replace(params, logprobs=0)
    return replace(request, params=ranked, best_of=best_of)


def check_size(prompts: Sequence[Prompt], most: int, names: Mapping[str, str] | None = None, least: int = 1) -> None:
    """Raises: RequestError, in words of `names`, when a prompt cannot fit beside an output of `least` tokens."""
    for prompt in prompts:
        size = len(prompt.input_ids) // 4 if isinstance(prompt, IdsPrompt) else len(encode(prompt)) // LONGEST_TOKEN
        if size > most - least and not (isinstance(prompt, TextPrompt) and prompt.most):  # it will be cut
            param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
            raise renamed(too_long(param, f"at least {size}", most), names)
