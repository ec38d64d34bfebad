"""Matchers of llguidance through its C functions, and a thread that computes their masks without Python's lock."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance import LLParserLimits, LLTokenizer

from minisgl.core import MASK_PENDING
from minisgl.errors import ConfigError
from minisgl.kernel.jit import load_masks

Words = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
_SIZES = ("max_items_in_row", "initial_lexer_fuel", "step_lexer_fuel", "step_max_items", "max_lexer_states")
_LIMITS = (*_SIZES, "max_grammar_size", "precompute_large_lexemes", "verbose_errors")  # `Limits` of `llguidance.h`


class MaskRow(NamedTuple):
    """A mask to be computed: `Row` in `csrc/include/minisgl/masks/worker.h`, and a row of a table of int64."""

    matcher: int
    ref: int  # the address where the last token will be written; 0: the host knows it
    length: int  # tokens of the output that come before
    known: int  # the last of them that the host knows; -1: none
    place: int  # among the step's masks


class NativeMatcher:
    """A native matcher, for a `MaskWorker`, too, with the methods of `llguidance.LLMatcher` that are used here."""

    def __init__(self, address: int) -> None:
        self._ours, self.address = load_masks(), address

    def __del__(self) -> None:
        self._ours.free_matcher(self.address)

    @property
    def num_tokens(self) -> int:
        """How many tokens of the output it has taken; -1: it is broken."""
        return int(self._ours.num_tokens_of(self.address))

    @property
    def cost(self) -> float:
        """Seconds of a core that its last mask took, or a quarter of what was known before, if that is more."""
        return float(self._ours.cost_of(self.address))

    def deep_copy(self) -> "NativeMatcher":
        return NativeMatcher(self._ours.copy_matcher(self.address))

    def take(self, ids: Sequence[int], length: int) -> bool:
        """Take those of `ids`, the last tokens of an output of `length`, that it has not yet; whether it can go on."""
        return bool(self._ours.advance(self.address, length, ids, 0, 0))

    def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
        self._ours.advance(self.address, self.num_tokens, (), address, num_bytes)

    def try_consume_tokens(self, ids: Sequence[int]) -> int:
        return sum(1 for token in ids if self._ours.try_take(self.address, token))

    def rollback(self, num: int) -> bool:
        return bool(self._ours.rollback(self.address, num))

    def is_error(self) -> bool:
        return self.num_tokens < 0

    def get_error(self) -> str:
        return str(self._ours.error_of(self.address))


class NativeVocabulary:
    """Makes matchers for a tokenizer. Native code goes on referring to it.

    Raises: ConfigError when there is no compiler, or llguidance's functions are not those that are known here.
    """

    def __init__(self, tokenizer: LLTokenizer, slices: Sequence[str], limits: LLParserLimits) -> None:
        self._ours = load_masks()
        special, decode = tokenizer.is_special_token, tokenizer.decode_bytes
        texts = [b"\xff" * special(token) + decode([token]) for token in range(tokenizer.vocab_size)]
        try:
            known = [[getattr(one, name) for name in _LIMITS] for one in (llguidance.LLParserLimits(), limits)]
            self._ours.open(llguidance._lib.__file__, known[0])
            given = texts, tokenizer.eos_tokens, slices, known[1]
            self._own: int = self._ours.make_vocabulary(lambda text: tokenizer.tokenize_bytes(bytes(text)), *given)
        except RuntimeError as error:
            raise ConfigError(str(error)) from error

    def matcher(self, source: str, pattern: str = "") -> NativeMatcher:
        """At the beginning of an output. Its error says what is wrong. pattern: an expression that is all of it."""
        return NativeMatcher(self._ours.make_matcher(self._own, source, pattern))


class MaskWorker:
    """Computes masks in the order of their steps, on a thread of its own."""

    def __init__(self, dear: float) -> None:
        """dear: seconds of a core from which on a mask counts as dear (`num_dear`)."""
        ours = self._ours = load_masks()  # whose short functions keep Python's lock: to get it back takes longer
        for short in (ours.submit, ours.go_on, ours.tell, ours.num_dear_of, ours.last_cost_of):
            short.release_gil = False
        self._own, self._held = ours.make_worker(dear), deque[tuple[Words, ...]]()  # its arrays, states first

    @property
    def num_dear(self) -> int:
        """How many masks were dear."""
        return int(self._ours.num_dear_of(self._own))

    @property
    def cost(self) -> float:
        """Seconds of a core that the masks of the last step took."""
        return float(self._ours.last_cost_of(self._own))

    def submit(self, rows: npt.NDArray[np.int64] | None, words: Words, states: Words, *read: Words) -> None:
        """Have masks (words: [masks, words] int32) and states ([masks] int32) of a step written later, as `core.Masks`
        says. rows: `MaskRow`s, which refer to `read`; None: as in the last job, each with the next token, read[0]'s."""
        while self._held and MASK_PENDING not in self._held[0][0].tolist():
            self._held.popleft()
        self._held.append((states, words, *read))
        places = words.ctypes.data, states.ctypes.data
        if rows is None:
            self._ours.go_on(self._own, read[0].ctypes.data, *places)
        else:
            self._ours.submit(self._own, rows.ctypes.data, len(rows), *places, words.shape[1])

    def close(self) -> None:
        """What is not computed yet is not ready."""
        self._ours.close_worker(self._own)


def tell() -> None:
    """Wake workers, if there are any: tokens that they wait for are written."""
    if load_masks.cache_info().currsize:
        load_masks().tell()
