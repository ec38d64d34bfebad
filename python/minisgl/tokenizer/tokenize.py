"""Prompts to token ids: chat template, encoding, and the checks that need the length of the prompt."""

import logging
import random
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

from minisgl.config.chat import reasoning_after, template_problem
from minisgl.config.locate import load_tokenizer
from minisgl.config.runtime import TokenizerConfig
from minisgl.core import MAX_SEED, SamplingParams
from minisgl.errors import RequestError, too_long
from minisgl.message import messages as wire
from minisgl.tokenizer.chat import CUT, CallForm, ControlTokens, Message, learn

logger = logging.getLogger(__name__)
_END = f"\ue000{secrets.token_hex(8)}\ue001"  # put behind a message that goes on: what a template adds is cut off there
_GUARD = "\n"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE, _PART_OF_ONE = "\u2581", "\ufffd"  # sentencepiece's; for bytes that are no whole character
_PART = 2**16  # characters that are encoded at a time, to find out whether a text is too long


class HFTextCodec:
    """What tokenizer and detokenizer need of a Hugging Face tokenizer, loaded from a local directory.

    visible: special tokens that become text nevertheless. chat_template: in place of the model's own.
    vocab_size: ids from here on mean nothing to it. special_ids: they never become text. longest_token: bytes that one
    token stands for at most. max_chars: more than these are not wanted of a chat template, which stops there.
    token_bytes: what one id adds to a text, perhaps a part of a character, or a special token's name. Those of a
    text's tokens, joined, are the text's (but for the space that sentencepiece puts first).

    Raises: ConfigError naming the directory when there is no usable tokenizer in it."""

    def __init__(self, model_path: str, visible: Sequence[str] = (), chat_template: str | None = None) -> None:
        self.tokenizer = load_tokenizer(model_path)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        templates = self.tokenizer.chat_template or {}
        for text in templates.values() if isinstance(templates, dict) else [templates]:
            if problem := template_problem(text):
                logger.warning("%s: its chat template is broken, and chats will be refused: %s", model_path, problem)
        self._backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._joins = (decoder := repr(getattr(self._backend, "decoder", None))).startswith("ByteLevel(")
        bytes_of = {c: bytes([byte]) for byte, c in bytes_to_unicode().items()}
        self._byte_of = bytes_of if "ByteLevel(" in decoder else None
        self._added = self.tokenizer.added_tokens_decoder
        special_ids = {index for index in self.tokenizer.all_special_ids if index is not None}  # BOS, EOS, PAD …
        special_ids |= {index for index, token in self._added.items() if token.special}
        vocab = self.tokenizer.get_vocab()
        self.special_ids = frozenset(special_ids.difference(vocab[token] for token in visible if token in vocab))
        self.vocab_size = max(vocab.values(), default=-1) + 1  # there may be gaps
        self.longest_token, self.max_chars = max(len(token.encode()) for token in vocab), 2**30
        self.token_bytes = cache(self._token_bytes)
        self._text_of_one = cache(lambda token: self._text([token]))  # streams ask for them again and again
        # The text that an id has wherever it stands. "": it depends on those around it, or is none.
        self.whole = cache(lambda one: text if self._joins and _PART_OF_ONE not in (text := self.decode([one])) else "")
        self._control = ControlTokens(self.tokenizer)
        self._guard = self._encode(_GUARD, special=False)
        self.call_form: CallForm | None = None  # not known until a conversation has calls

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; with `special`, in the frame of special tokens that the model expects (BOS …)."""
        first, *others = text.split(CUT)
        ids = self._encode(first, special)
        for part in others:  # after something else: sentencepiece puts a space before the first word of a text
            guarded, size = self._encode(_GUARD + part, special=False), len(self._guard)
            ids += guarded[size:] if guarded[:size] == self._guard else self._encode(part, special=False)
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        if self._backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=special))
        return list(self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)  # lets others run

    def beginning(self, text: str, most: int) -> list[int]:
        """The first tokens of a text, so many with special ones around them; the last where its files say so."""
        size, side = most * self.longest_token, self.tokenizer.truncation_side
        text = text[-size:] if side == "left" else text[:size]
        if self._backend is None:
            return list(self.tokenizer.encode(text, truncation=True, max_length=most))
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)  # which lets others run
        encoding.truncate(max(0, most - self._backend.num_special_tokens_to_add(False)), direction=side)
        return list(self._backend.post_process(encoding, None, True).ids)

    def visible(self, token_ids: Sequence[int], *, skip_special: bool = True) -> list[int]:
        """The ids that become text: those it knows, and not the special ones where they are skipped."""
        special = self.special_ids if skip_special else ()
        return [token for token in token_ids if token < self.vocab_size and token not in special]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids, but for those that are not visible."""
        return self.text(self.visible(token_ids, skip_special=skip_special))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids that are all visible."""
        one_by_one = len(token_ids) == 1 or self._joins
        text = "".join([self._text_of_one(token) for token in token_ids]) if one_by_one else _PART_OF_ONE
        return self._text(token_ids) if _PART_OF_ONE in text and len(token_ids) != 1 else text

    def _text(self, token_ids: Sequence[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=False))
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if token_id >= self.vocab_size or (piece := self.tokenizer.convert_ids_to_tokens(token_id)) is None:
            return b""  # the model's vocabulary is padded
        if self._byte_of is not None:
            return b"".join(self._byte_of.get(character) or character.encode() for character in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()

    def render_chat(self, prompt: wire.ChatPrompt) -> str:
        """The text that the chat template makes of the messages, for `encode`. Raises: RequestError when it cannot."""
        if not self.tokenizer.chat_template:
            raise RequestError("this model has no chat template: use /v1/completions", param="messages")
        messages, last = prompt.messages, prompt.messages[-1]
        if prompt.continue_final:
            messages = [*messages[:-1], {**last, "content": last["content"] + _END}]
        mark = chr(0xF0000 + secrets.randbelow(0xFFFE))  # of private use
        try:
            if any(message.get("tool_calls") for message in messages):
                self.call_form = self.call_form or learn(lambda said: self._render(said, wire.ChatPrompt([]), None, {}))
                messages = self.call_form.fit(messages)
            marked = self._control.marked([messages, prompt.tools, prompt.template_kwargs], mark)
            text = self._render(marked[0], prompt, *marked[1:])
        except Exception as error:  # templates run arbitrary code on the client's data: whatever fails is about it
            why = str(error).replace(mark, "")
            raise RequestError(f"the chat template refused the messages: {why}", param="messages") from error
        if prompt.continue_final and len(text) <= self.max_chars:
            text, found, _ = text.rpartition(_END)
            if not found:
                raise RequestError("this chat template does not show how the last message ends", param="messages")
        return self._control.cut(text, mark)

    def _render(self, messages: list[Message], prompt: wire.ChatPrompt, tools: Any, kwargs: dict[str, Any]) -> str:
        from transformers.utils.chat_template_utils import _compile_jinja_template as compiled

        template = self.tokenizer.get_chat_template(None, tools)
        compiled(template).environment.concat = self._join  # it keeps the last ones
        begins = prompt.add_generation_prompt and not prompt.continue_final
        kwargs = {"tools": tools, "tokenize": False, "add_generation_prompt": begins, **kwargs}
        return str(self.tokenizer.apply_chat_template(messages, **kwargs))

    def _join(self, parts: Iterable[str]) -> str:
        """How templates put a text together."""
        joined, size = [], 0
        for part in parts:
            joined.append(part)
            size += len(part)
            if size > self.max_chars:
                break
        return "".join(joined)


class Tokenizer:
    """Turns requests into what the scheduler takes: ids within the vocabulary that leave room for output."""

    def __init__(self, config: TokenizerConfig, codec: HFTextCodec | None = None) -> None:
        self.codec = codec or HFTextCodec(config.model_path, config.visible_tokens, config.chat_template)
        self._vocab_size, self._max_seq_len, self._pooling = config.vocab_size, config.max_seq_len, config.pooling
        # A text with more characters cannot fit the context: it is refused before it is encoded, which takes a while.
        self.codec.max_chars = config.max_seq_len * self.codec.longest_token

    def tokenize(self, requests: Sequence[wire.TokenizeMsg]) -> list[wire.UserMsg | wire.ErrorReply]:
        """One answer for each request, in order. Never raises."""
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self.answer, requests))  # type: ignore[arg-type]

    def answer(self, message: wire.TextMsg) -> wire.UserMsg | wire.EncodedReply | wire.DecodedReply | wire.ErrorReply:
        """What a request has to become for the scheduler, a question's answer, or why it is refused. Never raises."""
        try:
            if isinstance(message, wire.TokenizeMsg):
                ids = self.encode(message.prompt)
                params, now = self._finish_params(message, ids), time.time()
                return wire.UserMsg(message.uid, wire.pack_ids(ids), params, message.count, now)
            if isinstance(message, wire.EncodeMsg):
                ids = self.encode_only(message.prompt, special=message.special)
                return wire.EncodedReply(message.uid, wire.pack_ids(ids))
            ids = self._check(wire.unpack_ids(message.token_ids), "tokens")
            return wire.DecodedReply(message.uid, self.codec.decode(ids, skip_special=message.skip_special))
        except RequestError as error:
            return wire.ErrorReply(message.uid, str(error), error.status, error.param, error.code)
        except Exception as error:
            logger.exception("request %d: tokenization failed", message.uid)
            return wire.ErrorReply(uid=message.uid, message=f"tokenization failed: {type(error).__name__}", status=500)

    def encode(self, prompt: wire.ChatPrompt | wire.TextPrompt | wire.IdsPrompt) -> list[int]:
        """Token ids of one prompt. Raises: RequestError when it is empty, malformed or outside the vocabulary."""
        if isinstance(prompt, wire.IdsPrompt):
            if (size := len(prompt.input_ids) // 4) > self._max_seq_len:
                raise too_long("prompt", str(size), self._max_seq_len)
            ids = wire.unpack_ids(prompt.input_ids)
        elif isinstance(prompt, wire.TextPrompt) and prompt.most:
            ids = self.codec.beginning(prompt.text, prompt.most)
        else:
            ids = self.encode_only(prompt)
        if not ids or (isinstance(prompt, wire.TextPrompt) and not prompt.text):
            raise RequestError("the prompt must not be empty", param="prompt")
        return self._check(ids, "prompt")

    def encode_only(self, prompt: wire.ChatPrompt | wire.TextPrompt, *, special: bool = True) -> list[int]:
        """The ids that a prompt has, which may be none and may be too many. Raises: RequestError.

        special: with the tokenizer's special tokens, where no chat template has put its own."""
        if isinstance(prompt, wire.TextPrompt):
            return self._encode(prompt.text, "prompt", special)
        if not prompt.messages:
            raise RequestError("messages must not be empty", param="messages")
        if (size := len(prompt.messages)) > self._max_seq_len:  # each is a token at least
            raise too_long("messages", f"at least {size}", self._max_seq_len)
        return self._encode(self.codec.render_chat(prompt), "messages", special=False)

    def _encode(self, text: str, param: str, special: bool) -> list[int]:
        """What is far too long is refused as soon as that is certain: encoding a megabyte takes a second."""
        if len(text) > self.codec.max_chars:
            raise too_long(param, f"at least {len(text) // self.codec.longest_token}", self._max_seq_len)
        if len(text) > max(_PART, 2 * self._max_seq_len):
            size = 0
            for first in range(0, len(text), _PART):
                size += len(self.codec.encode(text[first : first + _PART], special=False))
                if size > 2 * self._max_seq_len:  # cuts between the parts make a few tokens more
                    raise too_long(param, f"at least {size // 2}", self._max_seq_len)
        return self.codec.encode(text, special=special)

    def _check(self, ids: list[int], param: str, where: str = "") -> list[int]:
        """The ids. Raises: RequestError when one of them is not in the vocabulary."""
        if ids and (min(ids) < 0 or max(ids) >= self._vocab_size):
            bad = next(token for token in ids if not 0 <= token < self._vocab_size)
            known = f"0 to {self._vocab_size - 1}"
            raise RequestError(f"{where}token id {bad} is not in the vocabulary ({known})", param=param)
        return ids

    def _finish_params(self, request: wire.TokenizeMsg, ids: list[int]) -> SamplingParams:
        """The parameters with nothing left open: `seed` drawn, `max_tokens` set and within the context, and whether
        reasoning comes before what a grammar is about.

        A larger `max_tokens` than the context has room for is no error: the output ends with `length` there.
        Raises: RequestError when the prompt alone fills the context."""
        if self._pooling is not None and not (self._pooling.generates or request.params.pooling):
            use = "/v1/rerank or /v1/score" if self._pooling.kind == "score" else "/v1/embeddings"
            raise RequestError(f"this model gives vectors or scores, and no text: use {use}", param="model")
        room = self._max_seq_len + bool(request.params.pooling) - len(ids)
        if room < 1:
            param = "messages" if isinstance(request.prompt, wire.ChatPrompt) else "prompt"
            raise too_long(param, str(len(ids)), self._max_seq_len)
        params = request.params
        self._check(list(params.stop_token_ids), "stop_token_ids", "stop_token_ids: ")
        self._check([token for token, _ in params.logit_bias], "logit_bias", "logit_bias: ")
        given = params.prediction
        guess = self._encode(given, "prediction", special=False) if isinstance(given, str) else [*given]
        if len(self._check(guess, "prediction", "prediction: ")) > self._max_seq_len:
            raise too_long("prediction", str(len(guess)), self._max_seq_len)
        seed = params.seed if params.seed is not None else random.randint(0, MAX_SEED)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        if (grammar := params.grammar) is not None and grammar.reasoning:
            end = self.codec.decode(ids[-wire.PROMPT_TAIL :])
            grammar = replace(grammar, reasoning=reasoning_after(end, grammar.reasoning))
        least = min(params.min_tokens, limit)
        return replace(params, max_tokens=limit, min_tokens=least, seed=seed, grammar=grammar, prediction=(*guess,))
