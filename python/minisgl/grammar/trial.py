"""Grammars are tried out in a process of their own before they come near the scheduler.

The compiler is native code that cannot be interrupted, and recursion in a grammar can overflow its stack. Here the
kernel ends it: after some seconds of one core, or when memory or stack run out.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from dataclasses import asdict

import psutil

from minisgl.core import Grammar
from minisgl.errors import RequestError
from minisgl.grammar.source import to_llguidance
from minisgl.grammar.vocabulary import Vocabulary, VocabularyConfig, load_vocabulary

_START_SECONDS = 60.0
# What a grammar may cost. One that costs more is refused, and must not be felt by anyone else.
_COMPILE_SECONDS = 3  # of one core
_TRIAL_SECONDS = 10.0  # by the clock, when cores are busy
_TRIAL_BYTES = 1 << 30  # of memory, beyond what the trial process has when it starts
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
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(asdict(grammar)).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            self.close()
            raise RequestError("the grammar compiler ended; try again", status=500) from None
        answer = _read_line(process, _TRIAL_SECONDS)
        if not answer:
            ended_by_limit = answer is None or process.wait() == -signal.SIGPROF
            self.close()
            why = f"takes more than {_COMPILE_SECONDS} s" if ended_by_limit else "is too large or too deeply nested"
            raise RequestError(f"{grammar.param}: the grammar {why} to compile", param=grammar.param)
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
        folder = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        paths = filter(None, (folder, os.environ.get("PYTHONPATH")))
        process = subprocess.Popen(
            [sys.executable, "-m", "minisgl.grammar.trial", json.dumps(asdict(self._config))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what native code says when it is killed
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for the parent
        )
        if not _read_line(process, _START_SECONDS):
            process.kill()
            process.wait()
            raise RequestError("the grammar compiler could not be started", status=500)
        return process


def _read_line(process: subprocess.Popen[bytes], timeout: float) -> bytes | None:
    """None when nothing comes in time, nothing (b"") when the process has ended."""
    assert process.stdout is not None
    if not select.select([process.stdout], (), (), timeout)[0]:
        return None
    return process.stdout.readline()


def try_out(grammar: Grammar, vocabulary: Vocabulary) -> dict[str, str | int]:
    """Compile a grammar and compute its first mask; what `Trial.compile` needs to know of it."""
    process = psutil.Process()
    before = process.memory_info().rss
    try:
        source = to_llguidance(grammar, vocabulary.special)
        _held = vocabulary.matcher(source, grammar.param)  # while its memory is measured
    except RequestError as error:
        return {"error": str(error), "param": error.param or grammar.param}
    return {"source": source, "num_bytes": max(0, process.memory_info().rss - before) + len(source)}


def _serve(vocabulary: Vocabulary) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        grammar = Grammar(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, _COMPILE_SECONDS)  # its signal ends the process, whatever it is at
        answer = try_out(grammar, vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def main(config: str) -> None:
    """Serve grammars, a line of JSON each, until standard input ends. config: of the vocabulary, as JSON."""
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = load_vocabulary(VocabularyConfig(**json.loads(config)))
    num_bytes = psutil.Process().memory_info().vms + _TRIAL_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    threading.stack_size(_TRIAL_STACK)
    worker = threading.Thread(target=_serve, args=(vocabulary,))
    worker.start()
    worker.join()


if __name__ == "__main__":
    main(sys.argv[1])
