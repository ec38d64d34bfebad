"""POST /v1/chat/completions: what clients may send, and the request that a chat of any dialect becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from minisgl.core import MAX_COUNT, MAX_LOGPROBS
from minisgl.errors import RequestError
from minisgl.message.tokenizer import ChatPrompt
from minisgl.server.bodies.content import Message, chat_messages
from minisgl.server.bodies.fields import Reading, fields_of, load_object
from minisgl.server.bodies.request import GenerationRequest, OpenAIBody, generation
from minisgl.server.bodies.sampling import Defaults
from minisgl.server.bodies.strict import Body, Count, Items, optional, shown, validate
from minisgl.server.bodies.tools import MAX_TOOLS, Tool, template_kwargs, tool_use
from minisgl.server.errors import renamed

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "default", "auto")


class Reasoning(Body):
    effort: str | None = optional("As `reasoning_effort`.", enum=[None, *EFFORTS])
    enabled: bool | None = optional("false: no reasoning.")


class Thinking(Body):
    type: str = "enabled"


class ChatBody(OpenAIBody):
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
    params = body.params(max_tokens, defaults, logprobs)
    return replace(generation(body, (prompt,), params), tools=tools)


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
