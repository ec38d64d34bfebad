"""Compiled grammars: made off the caller's thread, kept for the next request that asks for the same."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from llguidance import LLMatcher

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.source import Vocabulary, VocabularyConfig, load_vocabulary
from minisgl.grammar.trial import Trial

logger = logging.getLogger(__name__)

_NUM_WORKERS = 3  # a client gets one of them at a time
MAX_STORED_BYTES = 256 << 20  # of compiled grammars; twice that, with those that the requests in the server have
MAX_STORED, MAX_REFUSED = 1024, 256
MAX_WAITING = 64  # of one client, to be compiled


@dataclass(eq=False)
class CompiledGrammar:
    """A grammar that llguidance follows. While someone holds it, it is not compiled again.

    matcher: at the beginning of an output; copied for each.
    lock: held while one of its matchers is at work. They share a lock of their own in llguidance, for which
    `consume_tokens` waits with Python's lock in its hands: everybody would wait for a mask.
    """

    matcher: LLMatcher
    num_bytes: int
    cost: float = 0.008  # seconds of a core that a mask takes: a guess, until some were computed
    lock: threading.Lock = field(default_factory=threading.Lock)


def yield_to_others() -> None:
    """From now on this thread gets what others leave of the cores. Elsewhere than on Linux nothing happens."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class GrammarStore:
    """Compiles on threads of its own, each with a trial process. Methods may be called from any thread.

    The vocabulary is loaded at once, in the background: later that would be felt by the requests that run.
    """

    def __init__(self, config: VocabularyConfig) -> None:
        self.vocab_size = config.vocab_size
        self._lock = threading.Lock()
        self._live: weakref.WeakValueDictionary[bytes, CompiledGrammar] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[bytes, CompiledGrammar] = OrderedDict()
        self._refused: OrderedDict[tuple[bytes, str], RequestError] = OrderedDict()  # by the field, too
        self._compiling: dict[bytes, Future[CompiledGrammar]] = {}
        self._waiting: dict[str, deque[tuple[bytes, Grammar]]] = {}  # by client, of whose grammars one is compiled
        self._trials = [Trial(config) for _ in range(_NUM_WORKERS)]
        self._idle = [*self._trials]
        self._pool = ThreadPoolExecutor(_NUM_WORKERS, "minisgl-grammar")
        self._vocabulary: Future[Vocabulary] = self._pool.submit(load_vocabulary, config)

    def request(self, grammar: Grammar, client: str = "") -> Future[CompiledGrammar]:
        """The compiled grammar, now or later. Its exception is a RequestError that says what is wrong with it, or that
        it cannot be compiled now. Clients take turns; those without a name are not limited."""
        parts = (grammar.kind, grammar.whitespace, grammar.reasoning, grammar.text)  # of its text no copy is kept
        key = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            if key in self._compiling:
                return self._compiling[key]
            future: Future[CompiledGrammar] = Future()
            if (compiled := self._live.get(key)) is not None:
                self._remember(key, compiled)
                future.set_result(compiled)
            elif (refusal := self._refused.get((key, grammar.param)) or self._no_room(grammar, client)) is not None:
                future.set_exception(refusal)
            else:
                self._compiling[key] = future
                if client in self._waiting:
                    self._waiting[client].append((key, grammar))
                else:
                    if client:
                        self._waiting[client] = deque()
                    self._pool.submit(self._work, client, key, grammar)
            return future

    def close(self) -> None:
        """Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials:
            trial.close()

    def _no_room(self, grammar: Grammar, client: str) -> RequestError | None:
        if len(self._waiting.get(client, ())) >= MAX_WAITING:
            text = f"{MAX_WAITING} other grammars of this client wait to be compiled; try again"
            return RequestError(text, param=grammar.param, status=429)
        if sum(one.num_bytes for one in self._live.values()) > 2 * MAX_STORED_BYTES:
            text = "grammars of other requests take all the memory that there is for them; try again"
            return RequestError(text, param=grammar.param, status=503)
        return None

    def _work(self, client: str, key: bytes, grammar: Grammar) -> None:
        """Compile it. The client's next one goes behind what others wait for by now."""
        yield_to_others()
        made = self._compile(grammar)
        with self._lock:
            future = self._compiling.pop(key)
            if isinstance(made, CompiledGrammar):
                self._live[key] = made
                self._remember(key, made)
            elif made.status == 400:  # others may be different the next time
                self._refused[key, grammar.param] = made.with_traceback(None)
                if len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
            following = self._waiting[client].popleft() if self._waiting.get(client) else None
            if following is None:
                self._waiting.pop(client, None)
        if isinstance(made, CompiledGrammar):
            future.set_result(made)
        else:
            logger.debug("a grammar is refused: %s", made)
            future.set_exception(made)
        if following is not None:
            self._pool.submit(self._work, client, *following)

    def _compile(self, grammar: Grammar) -> CompiledGrammar | RequestError:
        trial = self._idle.pop()
        try:
            vocabulary = self._vocabulary.result()  # what is wrong with it is better told by this process
            source, num_bytes = trial.compile(grammar)
            return CompiledGrammar(vocabulary.matcher(source, grammar.param), num_bytes)
        except RequestError as error:
            return error
        except BaseException as error:  # a panic of llguidance is no Exception
            logger.warning("a grammar cannot be compiled: %s", error)
            status = 503 if isinstance(error, MemoryError) else 400
            return RequestError(f"structured output is not available: {error}", param=grammar.param, status=status)
        finally:
            self._idle.append(trial)

    def _remember(self, key: bytes, compiled: CompiledGrammar) -> None:
        recent, is_new = self._recent, key not in self._recent
        recent[key] = compiled
        recent.move_to_end(key)
        while is_new and (len(recent) > MAX_STORED or sum(one.num_bytes for one in recent.values()) > MAX_STORED_BYTES):
            recent.popitem(last=False)
