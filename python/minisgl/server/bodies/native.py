"""The bodies of this server's own routes, which vLLM and SGLang have too."""

from minisgl.message.messages import ChatPrompt, IdsPrompt, TextPrompt, pack_ids
from minisgl.server.bodies.chat import GenerationRequest, chat_request, check_size
from minisgl.server.bodies.content import Message, Tool
from minisgl.server.bodies.fields import Body, Ids, Items, MaxTokens, Object, Reading, load, optional
from minisgl.server.bodies.sampling import Defaults, RequestFields, SamplingFields
from minisgl.server.errors import refuse_unless

_CHAT_FIELDS = {"messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"}


class GenerateSampling(Body, SamplingFields):
    """`sampling_params` of POST /generate."""

    max_tokens: MaxTokens | None = optional("Most tokens of the output.")
    max_new_tokens: MaxTokens | None = optional("The same.")
    json_schema: Object | str | None = optional("The output is JSON that matches.")
    regex: str | None = optional("The output matches.")
    ebnf: str | None = optional("The output follows the grammar, Lark or EBNF.")


class GenerateBody(Body, RequestFields):
    """POST /generate: `text` or `input_ids`."""

    inner = {"sampling_params": GenerateSampling}  # noqa: RUF012
    text: str | None = optional("The prompt.", minLength=1)
    input_ids: Ids | None = optional("The prompt as token ids.", minItems=1)
    sampling_params: GenerateSampling | None = optional("How to continue it.")
    max_tokens: MaxTokens | None = optional("As in `sampling_params`.")
    ignore_eos: bool | None = optional("As in `sampling_params`.")
    stream: bool | None = optional("Answer with server-sent events.")


def parse_generate(data: bytes, defaults: Defaults, reading: Reading | None = None) -> GenerationRequest:
    """Raises: RequestError naming the field at fault."""
    body = load(GenerateBody, data, reading)
    text, ids = body.text, body.input_ids
    refuse_unless((text is None) != (ids is None), "give either text or input_ids", "text")
    sampling = body.sampling_params or GenerateSampling()
    max_tokens = sampling.max_new_tokens or sampling.max_tokens or body.max_tokens
    prompt = IdsPrompt(input_ids=pack_ids(ids or ())) if text is None else TextPrompt(text=text)
    sampling.cache_salt = body.cache_salt or sampling.cache_salt
    sampling.ignore_eos = body.ignore_eos or sampling.ignore_eos
    params, timeout = sampling.params(max_tokens, defaults), body.timeout or sampling.timeout or 0.0
    return GenerationRequest((prompt,), params, stream=bool(body.stream), timeout=timeout)


class TokenizeBody(Body):
    """POST /tokenize: `prompt`, or `messages` and what goes with them as in /v1/chat/completions."""

    model: str | None = optional("The id that /v1/models shows.")
    prompt: str | None = optional("A text.")
    add_special_tokens: bool | None = optional("Those that the tokenizer puts around a `prompt`; true unless given.")
    messages: Items[Message] | None = optional("A chat.", minItems=1)
    tools: Items[Tool] | None = optional("Functions that the model may call.")
    chat_template_kwargs: Object | None = optional("For the chat template.")
    add_generation_prompt: bool | None = optional("As in a chat.")
    continue_final_message: bool | None = optional("As in a chat.")


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = optional("The id that /v1/models shows.")
    tokens: Ids
    skip_special_tokens: bool | None = optional("false: special tokens are text.")


class AbortBody(Body):
    """POST /abort_request: ids (`x-request-id`, or the `id` of an answer), or `abort_all`."""

    rid: str | Items[str] | None = optional("Of the requests to end.")
    abort_all: bool | None = optional("All of them.")


def parse_tokenize(max_len: int, data: bytes, reading: Reading) -> tuple[TokenizeBody, ChatPrompt | TextPrompt]:
    body = load(TokenizeBody, data, reading)
    given = body.model_dump(include=_CHAT_FIELDS, exclude_none=True)
    text, param = body.prompt, "add_special_tokens"
    refuse_unless(text is None or not given, f"give either prompt or {next(iter(given), '')}", "prompt")
    refuse_unless(text is not None or body.messages is not None, "give prompt or messages", "prompt")
    is_text = text is not None or not body.add_special_tokens
    refuse_unless(is_text, f"{param} is for prompt: a chat template has its own", param)
    prompt = chat_request(given, {}).prompts[0] if text is None else TextPrompt(text=text)
    assert not isinstance(prompt, IdsPrompt)
    check_size([prompt], max_len)
    return body, prompt
