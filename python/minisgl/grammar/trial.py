"""Grammars are tried out in a process of their own before they come near the scheduler.

The compiler is native code that cannot be interrupted, and recursion in a grammar can overflow its stack. Here the
kernel ends it: after some seconds of one core, or when memory or stack run out.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import psutil

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.source import Vocabulary, VocabularyConfig, load_vocabulary, to_llguidance

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
        code = f"import sys; sys.path[:0] = {paths}; from minisgl.grammar.trial import main; main(sys.argv[1])"
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
