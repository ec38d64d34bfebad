"""A request's output on its way through its grammar, and masks of the positions to which a draft would take it."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from minisgl.grammar.source import Matcher, one_line
from minisgl.grammar.store import CompiledGrammar
from minisgl.kernel.masks import NativeMatcher, Words

CHEAP_SECONDS, FREE_SECONDS = 0.00025, 0.001  # of a core: a mask that takes so little, and what each one may take


@dataclass(slots=True, eq=False)
class Matching:
    """How far a request's output has got in its grammar. One thread at a time follows it: the planner's or `job`'s."""

    grammar: CompiledGrammar  # held, so that the store keeps it while the request waits
    asks_forced: bool = False  # whether the matcher is asked for tokens that have to come next
    matcher: Matcher | None = None
    taken: int = 0  # tokens of the output, by a matcher that does not count them
    forced: Sequence[int] = ()  # such tokens, behind those that the matcher has taken
    forced_to: int = 0  # the position before which planners have been told of such tokens
    error: str | None = None  # its request is being ended
    cost: float = 0.0  # seconds of a core that the next mask may take; before the first as its grammar's others
    seconds: float = 0.0  # beyond what masks may take, altogether
    job: Future[list[Words]] | None = None  # computes a mask that was not there in time
    ready: tuple[int, Words] = (-1, np.empty(0, np.int32))  # the last mask, and its token's position

    @property
    def num_tokens(self) -> int:
        """How many tokens of the output the matcher has taken. A matcher that has broken meanwhile is dropped."""
        if isinstance(self.matcher, NativeMatcher):
            if (num := self.matcher.num_tokens) >= 0:
                return num
            self.matcher, self.taken = None, 0
        return self.taken

    def follow(
        self, ids: Sequence[int], length: int, draft: Sequence[int], num_words: int, seconds: float
    ) -> tuple[list[Words], str | None]:
        """Take new tokens of the output, which has `length` with them. → words of the next token's mask, and of those
        after the draft's tokens as far as `walk` gets, none with `num_words` 0; and why the output cannot go on, if so.
        A matcher that breaks otherwise makes way for one that takes the output from its beginning."""
        words, is_whole, why = list[Words](), not num_words, None
        try:
            with self.grammar.lock:
                matcher = self.matcher = self.matcher or self.grammar.matcher.deep_copy()
                self.taken += len(ids)
                if isinstance(matcher, NativeMatcher):
                    matcher.take(ids, length)
                elif ids and not matcher.is_stopped():
                    matcher.consume_tokens(list(ids))
                if self.asks_forced and not isinstance(matcher, NativeMatcher):
                    self.forced = matcher.compute_ff_tokens()
                if num_words:
                    words, is_whole = walk(matcher, draft, num_words, seconds)
                    why = None if words else one_line(matcher.get_error())
        except (KeyboardInterrupt, SystemExit):  # the main thread is told so to stop
            raise
        except BaseException as error:  # a panic of llguidance is no Exception
            is_whole, why = False, one_line(str(error))
        if not is_whole:
            self.matcher, self.taken = None, 0
        return words, why


def walk(matcher: Matcher, draft: Sequence[int], num_words: int, seconds: float) -> tuple[list[Words], bool]:
    """The masks of the next token, and of those after each token of a draft: as far as the grammar takes it, for so
    many seconds of a core. And whether the matcher is where it was: a draft may break its limits, and it is useless."""
    start, masks = time.thread_time() if draft else 0.0, list[Words]()
    while not matcher.is_error():
        mask = np.empty(num_words, np.int32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            break
        masks.append(mask)
        going_on = draft[len(masks) - 1 :][:1] if draft and time.thread_time() - start <= seconds else ()
        if not going_on or matcher.try_consume_tokens(list(going_on)) != 1:
            break
    return masks, (len(masks) < 2 or matcher.rollback(len(masks) - 1)) and not matcher.is_error()
