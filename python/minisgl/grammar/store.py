"""Compiled grammars: made off the caller's thread, kept for the next request that asks for the same."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher

from minisgl.config.runtime import EngineConfig, SchedulerConfig
from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.trial import Trial
from minisgl.grammar.vocabulary import Vocabulary, VocabularyConfig, load_vocabulary

logger = logging.getLogger(__name__)

_NUM_WORKERS = 2  # one that has to do with a grammar that never ends does not stop the others
MAX_STORED_BYTES = 512 << 20  # compiled grammars that no request uses
_MAX_REFUSED = 256


@dataclass(eq=False)
class CompiledGrammar:
    """As long as someone holds it, `GrammarStore.find` knows it."""

    matcher: LLMatcher
    num_bytes: int
    cost: float = 0.008  # seconds of a core that a mask takes: a guess, until some were computed

    def start(self) -> LLMatcher:
        """A matcher at the beginning of an output."""
        return self.matcher.deep_copy()


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
        self._recent: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._num_bytes = 0
        self._live: weakref.WeakValueDictionary[Grammar, CompiledGrammar] = weakref.WeakValueDictionary()
        self._refused: OrderedDict[Grammar, tuple[str, str | None]] = OrderedDict()  # what to say after which field
        self._compiling: dict[Grammar, Future[CompiledGrammar]] = {}
        self._trials = [Trial(config) for _ in range(_NUM_WORKERS)]
        self._idle = [*self._trials]
        self._pool = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="minisgl-grammar")
        self._vocabulary: Future[Vocabulary] = self._pool.submit(load_vocabulary, config)

    def request(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """The compiled grammar, now or later. Its exception is a RequestError that says what is wrong with it."""
        with self._lock:
            if grammar in self._compiling:
                return self._compiling[grammar]
            future: Future[CompiledGrammar] = Future()
            compiled = self._live.get(grammar)
            if compiled is not None:
                self._remember(grammar, compiled)
                future.set_result(compiled)
            elif grammar in self._refused:
                why, where = self._refused[grammar]
                where = where or grammar.param
                future.set_exception(RequestError(f"{where}{why}", param=where))
            else:
                future = self._compiling[grammar] = self._pool.submit(self._compile, grammar)
            return future

    def find(self, grammar: Grammar) -> CompiledGrammar | None:
        """A grammar that is compiled and still held."""
        return self._live.get(grammar)

    def close(self) -> None:
        """Idempotent."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials:
            trial.close()

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        compiled, trial = None, self._idle.pop()
        try:
            vocabulary = self._vocabulary.result()  # what is wrong with it is better told by this process
            source, num_bytes = trial.compile(grammar)
            compiled = CompiledGrammar(vocabulary.matcher(source, grammar.param), num_bytes)
            return compiled
        except RequestError as error:
            logger.debug("a grammar is refused: %s", error)
            if error.status == 400:
                self._refuse(grammar, error)
            raise
        except BaseException as error:  # a panic of llguidance is no Exception
            logger.warning("a grammar cannot be compiled: %s", error)
            raise RequestError(f"structured output is not available: {error}", param=grammar.param) from error
        finally:
            self._idle.append(trial)
            with self._lock:
                self._compiling.pop(grammar, None)
                if compiled is not None:
                    self._live[grammar] = compiled
                    self._remember(grammar, compiled)

    def _remember(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        if self._recent.pop(grammar, None) is None:
            self._num_bytes += compiled.num_bytes
        self._recent[grammar] = compiled
        while self._num_bytes > MAX_STORED_BYTES and len(self._recent) > 1:
            self._num_bytes -= self._recent.popitem(last=False)[1].num_bytes

    def _refuse(self, grammar: Grammar, error: RequestError) -> None:
        where = error.param or grammar.param
        why = str(error).removeprefix(where)
        with self._lock:  # without the field where it is the grammar's: requests name that differently
            self._refused[grammar] = why, None if where == grammar.param else where
            if len(self._refused) > _MAX_REFUSED:
                self._refused.popitem(last=False)


def open_store(engine: EngineConfig, scheduler: SchedulerConfig) -> GrammarStore:
    """For the model of these configurations."""
    return GrammarStore(VocabularyConfig(engine.model_path, engine.model.vocab_size, scheduler.eos_token_ids))
