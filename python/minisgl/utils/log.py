"""Logging, configured once per process: level from `LOG_LEVEL`, each line marked with the process's role."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from queue import Full, Queue

from minisgl.errors import ConfigError

MAX_CHARS = 4096  # of a message, and of a line of a traceback
MAX_LINES = 200
MAX_WAITING = 1000  # messages that nobody has read yet
COLOURS = {"DEBUG": 2, "WARNING": 33, "ERROR": 31}  # of a terminal
LAST_SECONDS = 1.0  # at the end, for the reader to take what is left


class Writer(logging.Handler):
    """Writes to standard error from a thread of its own, so that a reader who stalls stops nobody: what is too much is
    dropped, and its number told. Python's own buffer, and its lock, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: Queue[str] = Queue(MAX_WAITING)
        self._num_dropped = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(self.format(record))
        except Full:
            self._num_dropped += 1

    def flush(self) -> None:
        deadline = time.monotonic() + LAST_SECONDS
        while self._waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            text = self._waiting.get()
            if dropped := self._num_dropped:
                text, self._num_dropped = f"{text}\n{dropped} messages are missing here: nobody read them", 0
            with suppress(OSError):
                os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))
            self._waiting.task_done()


class LineFormatter(logging.Formatter):
    """Whatever is in a message, from clients too, is one line of text: nothing in it ends the line, moves the cursor or
    goes on for ever. Lines of tracebacks are indented, so that none looks like a message. colours: by level."""

    def __init__(self, role: str, colours: Mapping[str, int] | None = None) -> None:
        super().__init__(f"%(asctime)s {role} %(levelname)s %(message)s", "%H:%M:%S")
        self._role, self._colours = role, colours or {}

    def format(self, record: logging.LogRecord) -> str:
        record.message, record.asctime = record.getMessage(), self.formatTime(record, self.datefmt)
        trace = self.formatException(record.exc_info).split("\n") if record.exc_info else []
        text = "\n    ".join(map(one_line, (self.formatMessage(record), *trace[:MAX_LINES])))
        colour = self._colours.get(record.levelname)
        return text if colour is None else f"\x1b[{colour}m{text}\x1b[0m"


class JsonFormatter(LineFormatter):
    """An object on each line. What a message has as `fields` is part of it."""

    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info).split("\n") if record.exc_info else []
        lines = "\n".join(map(one_line, (record.getMessage(), *trace[:MAX_LINES])))
        about = {"time": record.created, "role": self._role, "level": record.levelname, "message": lines}
        return json.dumps(about | record.__dict__.get("fields", {}))


def one_line(text: str) -> str:
    """The text with all that is not printed escaped; without its middle where it is too long."""
    half = MAX_CHARS // 2
    text = text if len(text) <= MAX_CHARS else f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def setup_logging(role: str) -> None:
    """Log to stderr as `role` ("server", "TP0", "tokenizer-0" …). Raises: ConfigError for an unknown LOG_LEVEL."""
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"LOG_LEVEL={level!r}: expected DEBUG, INFO, WARNING or ERROR")
    one_line("\n")  # Python looks for the codec at its first use, and there may be no descriptor then
    handler = Writer()
    is_plain = bool(os.environ.get("NO_COLOR")) or not os.isatty(2)
    lines, is_json = LineFormatter(role, {} if is_plain else COLOURS), os.environ.get("LOG_FORMAT") == "json"
    handler.setFormatter(JsonFormatter(role) if is_json else lines)
    for name, least in {"minisgl": level, "uvicorn": "WARNING", "asyncio": "WARNING"}.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(least)


@contextmanager
def told(what: str) -> Iterator[None]:
    """While the block runs, say every 3 s that it does: on a terminal in one line, else in lines of the log."""
    ended, begin, is_terminal = threading.Event(), time.monotonic(), sys.stderr.isatty()

    def tell() -> None:
        while not ended.wait(3.0):
            if is_terminal:
                os.write(2, f"\r{what}: {time.monotonic() - begin:.0f} s\x1b[K\r".encode())
            else:
                logging.getLogger(__name__).info("%s: %.0f s", what, time.monotonic() - begin)

    threading.Thread(target=tell, name="told", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        os.write(2, b"\x1b[K" * is_terminal)
