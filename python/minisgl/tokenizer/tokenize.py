"""Prompts to token ids: chat template, encoding, and the checks that need the length of the prompt."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from minisgl.config.chat import reasoning_after
from minisgl.config.runtime import TokenizerConfig
from minisgl.core import MAX_SEED, SamplingParams
from minisgl.errors import RequestError
from minisgl.message.backend import UserMsg
from minisgl.message.codec import pack_ids, unpack_ids
from minisgl.message.frontend import ErrorReply
from minisgl.message.tokenizer import PROMPT_TAIL, ChatPrompt, IdsPrompt, Prompt, TextPrompt, TokenizeMsg
from minisgl.tokenizer.history import CallForm, learn
from minisgl.tokenizer.pieces import TokenBytes
from minisgl.utils.hf_tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_END = "\ue000end\ue001"  # put behind a message that goes on: what a template adds is cut off there


class TextCodec(Protocol):
    """What tokenizer and detokenizer need of a tokenizer. `HFTextCodec` is the real one; tests bring others."""

    @property
    def vocab_size(self) -> int:
        """Ids from here on mean nothing to the tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that never become text."""

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of each text; with `special`, in the frame of special tokens that the model expects (BOS …)."""

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text: perhaps a part of a character, or a special token's name."""

    @property
    def longest_token(self) -> int:
        """Bytes that one token stands for at most."""

    def render_chat(self, prompt: ChatPrompt) -> str:
        """The text that the chat template makes of the messages. Raises: RequestError when it cannot."""


class HFTextCodec:
    """A Hugging Face tokenizer, loaded from a local directory.

    visible: special tokens that become text nevertheless. chat_template: in place of the model's own.

    Raises: ConfigError naming the directory when there is no usable tokenizer in it.
    """

    def __init__(self, model_path: str, visible: Sequence[str] = (), chat_template: str | None = None) -> None:
        self._tokenizer = load_tokenizer(model_path)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend
        special_ids = frozenset(_special_ids(self._tokenizer))
        vocab = self._tokenizer.get_vocab()
        self._special_ids = special_ids.difference(vocab[token] for token in visible if token in vocab)
        self._skip_special = self._special_ids == special_ids  # the tokenizer's own choice is ours
        self._alone: dict[tuple[int, bool], str] = {}  # texts of single tokens, which streams ask for again and again
        self._vocab_size = len(self._tokenizer)  # asked for at each token, and slow to count
        self._longest_token = max(len(token.encode()) for token in vocab)
        self._pieces = TokenBytes(self._tokenizer)
        self._call_form: CallForm | None = None  # not known until a conversation has calls

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    @property
    def longest_token(self) -> int:
        return self._longest_token

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer.encode(text, add_special_tokens=special) for text in texts]
        if len(texts) == 1:
            return [self._backend.encode(texts[0], add_special_tokens=special).ids]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=special)]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        if len(token_ids) != 1:
            return self._decode(token_ids, skip_special)
        key = token_ids[0], skip_special
        text = self._alone.get(key)
        if text is None:
            text = self._alone[key] = self._decode(token_ids, skip_special)
        return text

    def _decode(self, token_ids: Sequence[int], skip_special: bool) -> str:
        skip = skip_special and self._skip_special
        if skip_special and not skip:
            token_ids = [token for token in token_ids if token not in self._special_ids]
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip))
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        )  # pragma: no cover

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def render_chat(self, prompt: ChatPrompt) -> str:
        if not self._tokenizer.chat_template:
            raise RequestError("this model has no chat template: use /v1/completions", param="messages")
        messages, last = prompt.messages, prompt.messages[-1]
        if prompt.continue_final:
            messages = [*messages[:-1], {**last, "content": last["content"] + _END}]
        try:
            if any(message.get("tool_calls") for message in messages):
                self._call_form = self._call_form or learn(lambda probe: self._render(probe, ChatPrompt([])))
                messages = self._call_form.fit(messages)
            text = self._render(messages, prompt)
        except Exception as error:  # templates run arbitrary code on the client's data: whatever fails is about it
            raise RequestError(f"the chat template refused the messages: {error}", param="messages") from error
        if not prompt.continue_final:
            return text
        text, found, _ = text.rpartition(_END)
        if not found:
            raise RequestError("this chat template does not show how the last message ends", param="messages")
        return text

    def _render(self, messages: list[dict[str, Any]], prompt: ChatPrompt) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=prompt.tools,
                tokenize=False,
                add_generation_prompt=prompt.add_generation_prompt and not prompt.continue_final,
                **prompt.template_kwargs,
            )
        )


def _special_ids(tokenizer: Any) -> list[int]:
    """Every added token that is marked special, and the named ones (BOS, EOS, PAD …)."""
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    return [*added, *(index for index in tokenizer.all_special_ids if index is not None)]


class Tokenizer:
    """Turns requests into what the scheduler takes: ids within the vocabulary that leave room for output."""

    def __init__(self, config: TokenizerConfig, codec: TextCodec | None = None) -> None:
        self.codec: TextCodec = codec or HFTextCodec(config.model_path, config.visible_tokens, config.chat_template)
        self._vocab_size = config.vocab_size
        self._max_seq_len = config.max_seq_len
        # A text with more characters cannot fit the context: it is refused before it is encoded, which takes a while.
        self._max_chars = config.max_seq_len * self.codec.longest_token

    def tokenize(self, requests: Sequence[TokenizeMsg]) -> list[UserMsg | ErrorReply]:
        """One answer for each request, in order: its tokens, or why it is refused. Never raises."""
        prompts = self._encode_all([request.prompt for request in requests])
        return [self._finish(request, ids) for request, ids in zip(requests, prompts, strict=True)]

    def encode_only(self, prompt: ChatPrompt | TextPrompt, *, special: bool) -> list[int]:
        """The ids that a prompt has, which may be none and may be too many. Raises: RequestError."""
        if isinstance(prompt, ChatPrompt):
            text, special = self._render(prompt)
        else:
            text = self._bounded(prompt.text, "prompt")
        return self.codec.encode([text], special=special)[0]

    def decode_only(self, token_ids: list[int], *, skip_special: bool) -> str:
        """The text of the ids. Raises: RequestError when one of them is not in the vocabulary."""
        if token_ids:
            self._check(token_ids, "tokens")
        size = self.codec.vocab_size
        return self.codec.decode([token for token in token_ids if token < size], skip_special=skip_special)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt. Raises: RequestError when it is empty, malformed or outside the vocabulary."""
        if isinstance(prompt, IdsPrompt):
            return self._check(unpack_ids(prompt.input_ids))
        text, special = self._render(prompt)
        return self._check(self.codec.encode([text], special=special)[0])

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[list[int] | Exception]:
        """Ids, or what went wrong, per prompt. Texts are encoded in one call, which uses all cores."""
        if len(prompts) == 1:
            return [self._try(self.encode, prompts[0])]
        results: list[Any] = [None] * len(prompts)
        groups: dict[bool, list[tuple[int, str]]] = {False: [], True: []}
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, IdsPrompt):
                results[index] = self._try(self.encode, prompt)
                continue
            rendered = self._try(self._render, prompt)
            if isinstance(rendered, Exception):
                results[index] = rendered
            else:
                groups[rendered[1]].append((index, rendered[0]))
        for special, group in groups.items():
            for (index, _), ids in zip(group, self._encode_texts([text for _, text in group], special), strict=True):
                results[index] = ids if isinstance(ids, Exception) else self._try(self._check, ids)
        return results

    def _encode_texts(self, texts: list[str], special: bool) -> list[Any]:
        try:
            return list(self.codec.encode(texts, special=special)) if texts else []
        except Exception:  # one of them is to blame: find out which
            return [self._try(lambda text: self.codec.encode([text], special=special)[0], text) for text in texts]

    @staticmethod
    def _try(function: Any, argument: Any) -> Any:
        try:
            return function(argument)
        except Exception as error:
            return error

    def _render(self, prompt: ChatPrompt | TextPrompt) -> tuple[str, bool]:
        """The text to encode, and whether the tokenizer adds special tokens: a chat template has put its own."""
        if isinstance(prompt, ChatPrompt):
            if not prompt.messages:
                raise RequestError("messages must not be empty", param="messages")
            return self._bounded(self.codec.render_chat(prompt), "messages"), False
        if not prompt.text:
            raise RequestError("the prompt must not be empty", param="prompt")
        return self._bounded(prompt.text, "prompt"), True

    def _bounded(self, text: str, param: str) -> str:
        if len(text) > self._max_chars:
            raise self._too_long(f"at least {len(text) // self.codec.longest_token}", param)
        return text

    def _too_long(self, num_tokens: str, param: str) -> RequestError:
        """In OpenAI's words, which clients look for."""
        message = (
            f"This model's maximum context length is {self._max_seq_len} tokens. However, your {param} resulted in "
        )
        message += f"{num_tokens} tokens, and at least 1 is for the output. Please reduce the length of the {param}."
        return RequestError(message, param=param, code="context_length_exceeded")

    def _check(self, ids: list[int], param: str = "prompt") -> list[int]:
        if not ids:
            raise RequestError("the prompt must not be empty", param="prompt")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise RequestError(f"token id {bad} is not in the vocabulary (0 to {self._vocab_size - 1})", param=param)
        return ids

    def _finish(self, request: TokenizeMsg, ids: list[int] | Exception) -> UserMsg | ErrorReply:
        try:
            if isinstance(ids, Exception):
                raise ids
            params = self._finish_params(request, ids)
            return UserMsg(request.uid, pack_ids(ids), params, request.count)
        except RequestError as error:
            return ErrorReply(request.uid, str(error), error.status, error.param, error.code)
        except Exception as error:
            logger.exception("request %d: tokenization failed", request.uid)
            return ErrorReply(uid=request.uid, message=f"tokenization failed: {type(error).__name__}", status=500)

    def _finish_params(self, request: TokenizeMsg, ids: list[int]) -> SamplingParams:
        """The parameters with nothing left open: `seed` drawn, `max_tokens` set and within the context, and whether
        reasoning comes before what a grammar is about.

        A larger `max_tokens` than the context has room for is no error: the output ends with `length` there.
        Raises: RequestError when the prompt alone fills the context.
        """
        room = self._max_seq_len - len(ids)
        if room < 1:
            raise self._too_long(str(len(ids)), "messages" if isinstance(request.prompt, ChatPrompt) else "prompt")
        params = request.params
        self._check_token_params(params)
        seed = params.seed if params.seed is not None else random.randint(0, MAX_SEED)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        grammar = params.grammar
        if grammar is not None and grammar.reasoning:
            end = self.codec.decode(ids[-PROMPT_TAIL:])
            grammar = replace(grammar, reasoning=reasoning_after(end, grammar.reasoning))
        least = min(params.min_tokens, limit)
        return replace(params, max_tokens=limit, min_tokens=least, seed=seed, grammar=grammar)

    def _check_token_params(self, params: SamplingParams) -> None:
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", [token for token, _ in params.logit_bias]),
        ):
            bad = next((token for token in ids if not 0 <= token < self._vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"{name}: token id {bad} is not in the vocabulary (0 to {self._vocab_size - 1})", param=name
                )
