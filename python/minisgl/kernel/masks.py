"""Matchers of llguidance through its C functions, and a thread that computes their masks without Python's lock."""

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_double, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

import llguidance
import numpy as np
import numpy.typing as npt

from minisgl.errors import ConfigError
from minisgl.kernel.jit import load_masks

logger = logging.getLogger(__name__)

Words = npt.NDArray[np.int32]
_Tokenize = ctypes.CFUNCTYPE(c_size_t, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t)


class _Limits(ctypes.Structure):
    _sizes = "max_items_in_row", "initial_lexer_fuel", "step_lexer_fuel", "step_max_items", "max_lexer_states"
    _flags = "precompute_large_lexemes", "verbose_errors"
    _fields_ = [(name, c_uint64) for name in (*_sizes, "max_grammar_size")] + [(name, c_bool) for name in _flags]

    @staticmethod
    def of(limits: llguidance.LLParserLimits) -> "_Limits":
        return _Limits(*(getattr(limits, field[0]) for field in _Limits._fields_))


class _Numbers(ctypes.Structure):
    """The first members of `Matcher` in `csrc/src/masks.cc`."""

    _fields_ = [("num_tokens", c_int64), ("cost", c_double)]


class _Spent(ctypes.Structure):
    _fields_ = [("num_dear", c_int64), ("seconds", c_double)]


class MaskRow(NamedTuple):
    """A mask to be computed: `Row` in `csrc/src/masks.cc`, and a row of a table of int64."""

    matcher: int
    ref: int  # the address where the last token will be written; 0: the host knows it
    length: int  # tokens of the output that come before
    known: int  # the last of them that the host knows; -1: none
    place: int  # among the step's masks


class NativeMatcher:
    """As far as it is used here it is a `llguidance.LLMatcher`, which a `MaskWorker` can have, too."""

    def __init__(self, address: int) -> None:
        self._ours, self.address = load_masks(), address
        self._numbers: _Numbers = self._ours.masks_numbers(address).contents

    def __del__(self) -> None:
        self._ours.masks_free(self.address)

    @property
    def num_tokens(self) -> int:
        """Of the output, that it has taken; -1: it is broken."""
        return self._numbers.num_tokens

    @property
    def cost(self) -> float:
        """Seconds of a core that its last call took."""
        return self._numbers.cost

    def deep_copy(self) -> "NativeMatcher":
        return NativeMatcher(self._ours.masks_copy(self.address))

    def consume_tokens(self, ids: Sequence[int]) -> bool:
        return self._ours.masks_advance(self.address, (c_uint32 * len(ids))(*ids), len(ids), None, 0)

    def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
        self._ours.masks_advance(self.address, None, 0, address, num_bytes)

    def is_stopped(self) -> bool:
        """Never: tokens that come behind the end are counted, and that is all."""
        return False

    def is_error(self) -> bool:
        return self.num_tokens < 0

    def get_error(self) -> str:
        return (self._ours.masks_error(self.address) or b"").decode("utf-8", "replace")


class NativeVocabulary:
    """Makes matchers for a tokenizer. Native code goes on referring to it.

    Raises: ConfigError when there is no compiler, or llguidance's functions are not those that are known here.
    """

    def __init__(
        self, tokenizer: llguidance.LLTokenizer, slices: Sequence[str], limits: llguidance.LLParserLimits
    ) -> None:
        self._ours = declared(load_masks())
        defaults = _Limits.of(llguidance.LLParserLimits())
        if not self._ours.masks_open(llguidance._lib.__file__.encode(), byref(defaults)):
            raise ConfigError("llguidance has other functions than those that are known here")

        def ask(_: None, text: int, num_bytes: int, tokens: int, room: int) -> int:
            made = tokenizer.tokenize_bytes(ctypes.string_at(text, num_bytes))[:room]
            ctypes.memmove(tokens, (c_uint32 * len(made))(*made), 4 * len(made))
            return len(made)

        self._ask, num = _Tokenize(ask), tokenizer.vocab_size
        special, decode, ends = tokenizer.is_special_token, tokenizer.decode_bytes, tokenizer.eos_tokens
        texts = [b"\xff" * special(token) + decode([token]) for token in range(num)]
        table = (c_uint32 * num)(*map(len, texts)), b"".join(texts), num, (c_uint32 * len(ends))(*ends), len(ends)
        names, why = (c_char_p * (len(slices) + 1))(*map(str.encode, slices)), ctypes.create_string_buffer(500)
        self._own = self._ours.masks_vocabulary(self._ask, *table, names, byref(_Limits.of(limits)), why, len(why))
        if not self._own:
            raise ConfigError(why.value.decode("utf-8", "replace"))

    def matcher(self, source: str) -> NativeMatcher:
        """At the beginning of an output. Its error says what is wrong with the grammar, in llguidance's language."""
        return NativeMatcher(self._ours.masks_matcher(self._own, source.encode()))


class MaskWorker:
    """Computes masks in the order of their steps, on a thread of its own. What it writes to is there until `close`.

    dear: seconds of a core. spent: `num_dear`, of all masks those that took more, and `seconds` of the last step's.
    """

    def __init__(self, dear: float) -> None:
        self._ours = load_masks()
        self._own = self._ours.masks_worker(dear)
        self.spent = self._ours.masks_spent(self._own).contents

    def submit(self, rows: npt.NDArray[np.int64], words: Words, states: Words) -> None:
        """Write masks and states of a step, as `core.Masks` says, later. rows: of `MaskRow`s."""
        places = rows.ctypes.data, len(rows), words.ctypes.data, states.ctypes.data, words.shape[1]
        self._ours.masks_submit(self._own, *places)

    def close(self) -> None:
        """What is not computed yet is not ready."""
        self._ours.masks_close(self._own)


def declared(ours: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions."""
    pointer, size = c_void_p, c_size_t
    table = pointer, c_char_p, c_uint32, pointer, c_uint32, pointer, pointer, c_char_p, size
    types: tuple[tuple[Any, ...], ...] = (
        (ours.masks_open, c_bool, c_char_p, pointer),
        (ours.masks_vocabulary, pointer, _Tokenize, *table),
        (ours.masks_matcher, pointer, pointer, c_char_p),
        (ours.masks_error, c_char_p, pointer),
        (ours.masks_numbers, POINTER(_Numbers), pointer),
        (ours.masks_copy, pointer, pointer),
        (ours.masks_free, None, pointer),
        (ours.masks_advance, c_bool, pointer, pointer, size, pointer, size),
        (ours.masks_worker, pointer, c_double),
        (ours.masks_spent, POINTER(_Spent), pointer),
        (ours.masks_close, None, pointer),
        (ours.masks_submit, None, pointer, pointer, size, pointer, pointer, size),
    )
    for function, result, *arguments in types:
        function.restype, function.argtypes = result, arguments
    return ours
