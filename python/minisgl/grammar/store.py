"""Compiled grammars: made off the caller's thread, kept for the next request that asks for the same.

They are tried out in a process of their own before they come near the scheduler. The compiler is native code that
cannot be interrupted, and recursion in a grammar can overflow its stack. There the kernel ends it: after some seconds
of one core, or when memory or stack run out.
"""

import contextlib
import hashlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.source import Matcher, Vocabulary, VocabularyConfig, load_vocabulary, to_llguidance

logger = logging.getLogger(__name__)

_NUM_WORKERS = 3  # a client gets one of them at a time
MAX_STORED_BYTES = 256 << 20  # of compiled grammars; twice that, with those that the requests in the server have
MAX_STORED, MAX_REFUSED = 1024, 256
MAX_WAITING = 64  # of one client, to be compiled
_START_SECONDS = 60.0
# What a grammar may cost. One that costs more is refused, and must not be felt by anyone else.
_COMPILE_SECONDS = 3  # of one core
TRIAL_SECONDS = 20.0  # by the clock, when cores are busy
_TRIAL_BYTES = 1 << 30  # of memory, beyond what the trial process has when it starts
_FAULTS = {  # how a grammar ends the process; whatever else does is not its fault
    -signal.SIGPROF: f"takes more than {_COMPILE_SECONDS} s",
    **dict.fromkeys((-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS), "is too large or too deeply nested"),
}
_TRIAL_STACK = 2 << 20  # bytes, a quarter of what threads have: what passes the trial passes everywhere


@dataclass(eq=False)
class CompiledGrammar:
    """A grammar that llguidance follows. While someone holds it, it is not compiled again.

    matcher: at the beginning of an output; copied for each.
    lock: held while one of its matchers is at work. They share a lock of their own in llguidance, for which
    `consume_tokens` waits with Python's lock in its hands: everybody would wait for a mask.
    """

    matcher: Matcher
    num_bytes: int
    cost: float = 0.008  # seconds of a core that a mask takes, at most: a guess, until some were computed
    mean: float = 0.0  # seconds that the last masks took, but for those before a token; 0: not known
    lock: threading.Lock = field(default_factory=threading.Lock)


def yield_to_others() -> None:
    """From now on this thread gets what others leave of the cores. Elsewhere than on Linux nothing happens."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class GrammarStore:
    """Compiles on threads of its own, each with a trial process. Methods may be called from any thread.

    The vocabulary is loaded at once, in the background: later that would be felt by the requests that run.
    """

    def __init__(self, config: VocabularyConfig, is_native: bool = False) -> None:
        """is_native: as in `load_vocabulary`."""
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
        self._vocabulary: Future[Vocabulary] = self._pool.submit(load_vocabulary, config, is_native)

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
            pattern = "" if grammar.reasoning or grammar.kind != "regex" else grammar.text
            return CompiledGrammar(vocabulary.matcher(source, grammar.param, pattern), num_bytes)
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


class Trial:
    """A trial process, started at first use and again after it was killed. For one thread at a time."""

    def __init__(self, config: VocabularyConfig) -> None:
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    def compile(self, grammar: Grammar) -> tuple[str, int]:
        """The grammar in llguidance's language, and about how many bytes it takes when compiled.

        Raises: RequestError with what is wrong with it.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        answer = _ask(process, json.dumps(asdict(grammar)).encode() + b"\n", TRIAL_SECONDS)
        if not answer:
            status = process.wait()
            self.close()
            if status not in _FAULTS:
                raise RequestError("the grammar compiler did not answer; try again", param=grammar.param, status=503)
            raise RequestError(f"{grammar.param}: the grammar {_FAULTS[status]} to compile", param=grammar.param)
        result = json.loads(answer)
        if "error" in result:
            raise RequestError(result["error"], param=result["param"])
        return result["source"], result["num_bytes"]

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError), process:  # there may be something to be written to it still
                process.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).parents[2]), *filter(os.path.isabs, sys.path)]
        with contextlib.suppress(OSError, ValueError):  # where the server was started may be anybody's
            paths.remove(os.getcwd())
        code = f"import sys; sys.path[:0] = {paths}; from minisgl.grammar.store import main; main(sys.argv[1])"
        with contextlib.suppress(OSError):
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", code, json.dumps(asdict(self._config))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # what native code says when it is killed
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for the parent
            )
            if _ask(process, b"", _START_SECONDS):
                return process
            process.wait()
        raise RequestError("the grammar compiler could not be started; try again", status=503)


def _ask(process: subprocess.Popen[bytes], line: bytes, timeout: float) -> bytes:
    """The line that comes back; nothing when the process has ended, as it does when the time is over."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    answer = b""
    with contextlib.suppress(OSError):
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline()
    timer.cancel()
    if answer.endswith(b"\n"):
        return answer
    process.kill()
    return b""


def _num_bytes_in_use() -> int:
    """The memory of this process. What was freed, and serves the next grammar, does not count."""
    try:
        heap = psutil.heap_info()
    except AttributeError:  # a C library that does not tell
        return psutil.Process().memory_info().rss
    return heap.heap_used + heap.mmap_used


def try_out(grammar: Grammar, vocabulary: Vocabulary) -> dict[str, str | int]:
    """Compile a grammar and compute its first mask; what `Trial.compile` needs to know of it."""
    before = _num_bytes_in_use()
    try:
        source = to_llguidance(grammar, vocabulary.special)
        _held = vocabulary.matcher(source, grammar.param)  # while its memory is measured
    except RequestError as error:
        return {"error": str(error), "param": error.param or grammar.param}
    except BaseException:  # no memory, or a panic of llguidance
        return {"error": f"{grammar.param}: the grammar is too large to compile", "param": grammar.param}
    return {"source": source, "num_bytes": max(len(source), _num_bytes_in_use() - before)}


def main(config: str) -> None:
    """Serve grammars, a line of JSON each, until standard input ends. config: of the vocabulary, as JSON."""
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = load_vocabulary(VocabularyConfig(**json.loads(config)))
    num_bytes = psutil.Process().memory_info().vms + _TRIAL_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_STACK, (_TRIAL_STACK, _TRIAL_STACK))  # of this thread, which goes on growing
    print("ready", flush=True)
    for line in sys.stdin:
        grammar = Grammar(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, _COMPILE_SECONDS)  # its signal ends the process, whatever it is at
        answer = try_out(grammar, vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)
