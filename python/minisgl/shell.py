"""The interactive shell: a chat with the model in the terminal, over the same frontend that serves HTTP.

    lines → commands (`/set …`) or messages → ChatPrompt → Frontend.submit → text as it comes

It works on a pipe too: `echo 'Hello' | minisgl --shell` prints the answer and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from minisgl.config.args import ServerArgs
from minisgl.config.resolve import prepare
from minisgl.config.runtime import ServerConfig
from minisgl.core import DRAWING, FinishReason, SamplingParams
from minisgl.errors import ConfigError, RequestError
from minisgl.message.messages import ChatPrompt, UserReply
from minisgl.message.sockets import Endpoints
from minisgl.processes.launcher import LocalLauncher
from minisgl.processes.supervisor import Supervisor, call_in, run_with_workers
from minisgl.server.frontend import Frontend

DEFAULTS = SamplingParams(max_tokens=2048, temperature=0.6)
SETTINGS: Mapping[str, Callable[[str], int | float]] = {**DRAWING, "max_tokens": int, "seed": int}
OPTIONAL_SETTINGS = ("max_tokens", "seed")  # `none` is a value of these
ENV_SETTINGS = ("max_tokens", "temperature", "top_p", "top_k")
HELP = f"""\
/reset          forget the conversation
/system TEXT    set the system message (empty: none) and forget the conversation
/set NAME VALUE change how answers are drawn: {", ".join(SETTINGS)}
/stats          tokens, times and cache hits so far
/exit, Ctrl-D   leave; Ctrl-C stops an answer"""
# Output of a model must not move the cursor or change the terminal's colours.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def changed(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """`params` with one setting read from text. Raises: RequestError saying what the value may be."""
    if name not in SETTINGS:
        raise RequestError(f"unknown setting {name!r}; there are {', '.join(SETTINGS)}", param=name)
    value: Any
    try:
        value = None if text.lower() == "none" and name in OPTIONAL_SETTINGS else SETTINGS[name](text)
    except ValueError:
        kind = "a whole number" if SETTINGS[name] is int else "a number"
        raise RequestError(f"{name} must be {kind}, not {text!r}", param=name) from None
    return replace(params, **{name: value})


def shell_params(default_sampling: Mapping[str, float | int], environ: Mapping[str, str]) -> SamplingParams:
    """Where the shell starts: `MINISGL_SHELL_*`, else the model's generation_config.json, else DEFAULTS.

    Raises: ConfigError naming the variable whose value cannot be used.
    """
    params = replace(DEFAULTS, **default_sampling)  # type: ignore[arg-type]
    for name in ENV_SETTINGS:
        variable = f"MINISGL_SHELL_{name.upper()}"
        try:
            params = changed(params, name, environ[variable]) if environ.get(variable) else params
        except RequestError as error:
            raise ConfigError(f"{variable}: {error}") from None
    return params


@dataclass(slots=True)
class Stats:
    """Totals over the session, and the times of the last answer."""

    num_answers: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    last: str = ""

    def record(self, last: UserReply, started: float, first: float, ended: float) -> None:
        """Count an answer. `first` is when its first text came, in seconds as the others."""
        self.num_answers += 1
        self.num_prompt += last.num_prompt_tokens
        self.num_cached += last.num_cached_tokens
        self.num_output += last.num_output_tokens
        speed = (last.num_output_tokens - 1) / (ended - first) if ended > first else 0.0
        self.last = f"first token after {(first - started) * 1000:.0f} ms, then {speed:.1f} tokens/s"

    def __str__(self) -> str:
        if not self.num_answers:
            return "no answers yet"
        cached = f"{100 * self.num_cached / max(1, self.num_prompt):.0f}% from the cache"
        answers = "1 answer" if self.num_answers == 1 else f"{self.num_answers} answers"
        totals = f"{answers}: {self.num_prompt} prompt tokens ({cached}), {self.num_output} output tokens"
        return f"{totals}\nlast answer: {self.last}"


class Shell:
    """One conversation with the model.

    write: takes each piece of output. verbose: also say what a person at a terminal wants to know (hints, notices).
    """

    def __init__(
        self, frontend: Frontend, params: SamplingParams, write: Callable[[str], object], verbose: bool = True
    ) -> None:
        self.params = params
        self.system = ""
        self.turns: list[dict[str, Any]] = []  # user and assistant, alternating
        self.stats = Stats()
        self._frontend, self._write, self._verbose = frontend, write, verbose
        self._answering: asyncio.Future[None] | None = None
        self._done = self._interrupted = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/stats": lambda _: self._say(str(self.stats)),
            "/exit": self._exit,
        }

    async def run(self, reader: TerminalReader | PipeReader) -> None:
        """Read and answer lines until /exit or the end of input. Raises: WorkerDied when the server is gone."""
        while not self._done:
            try:
                line = await reader.read()
            except KeyboardInterrupt:
                self._say("(Ctrl-D or /exit leaves)")
                continue
            if line is None:
                return
            await self.handle(line)

    def interrupt(self) -> None:
        """Stop the current answer, if there is one."""
        if self._answering is not None:
            self._interrupted = True
            self._answering.cancel()

    async def handle(self, line: str) -> None:
        """Do what one line says."""
        name, _, rest = line.strip().partition(" ")
        if name and not name.startswith("/"):
            await self._answer(line.strip())
        elif name in self.commands:
            self.commands[name](rest.strip())
        elif name:
            self._say(f"unknown command {name}; /help lists the commands")

    async def _answer(self, text: str) -> None:
        """Ask the model, with an answer that Ctrl-C can stop. A refused question leaves no trace in the history."""
        before, answer = list(self.turns), list[str]()
        self.turns.append({"role": "user", "content": text})
        self._interrupted, self._answering = False, asyncio.ensure_future(self._stream_fitting(answer))
        try:
            await self._answering
        except RequestError as error:
            self._say(f"\nerror: {error}" if answer else f"error: {error}")
        except asyncio.CancelledError:
            if not self._interrupted:
                self._answering.cancel()
                raise
        finally:
            self._answering = None
        if answer:
            self._write("\n")
            self.turns.append({"role": "assistant", "content": "".join(answer)})
        else:
            self.turns = before

    async def _stream_fitting(self, answer: list[str]) -> None:
        """Stream the answer; as long as the conversation is too long for the context, forget its oldest turn."""
        num_turns = len(self.turns)
        while True:
            try:
                await self._stream(answer)
                break
            except RequestError as error:
                if "context" not in str(error) or answer or len(self.turns) < 3:
                    raise
                del self.turns[:2]  # never the question that is being asked
        if len(self.turns) < num_turns:
            self._notice("\n(the context is full: the oldest turns are forgotten; /reset forgets all)")

    async def _stream(self, answer: list[str]) -> None:
        """Write the pieces of one answer as they come, collect them in `answer` and count them."""
        started = first = time.perf_counter()
        last: UserReply | None = None
        head = [{"role": "system", "content": self.system}] if self.system else []
        (stream,) = self._frontend.submit(ChatPrompt(head + self.turns), self.params)
        try:
            async for last in stream:
                if last.num_output_tokens and first == started:
                    first = time.perf_counter()
                if last.text:
                    answer.append(last.text)
                    self._write(last.text.translate(_CONTROL))
        finally:
            stream.abort()
            if last is not None:
                self.stats.record(last, started, first, time.perf_counter())
        if last is not None and last.finish_reason is FinishReason.LENGTH:
            self._notice(f"\n(cut after {last.num_output_tokens} tokens: /set max_tokens, or the context is full)")

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self._say("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self.system = text
        self.turns.clear()
        self._say("the system message is set" if text else "there is no system message now")

    def _set(self, rest: str) -> None:
        name, _, text = rest.replace("=", " ", 1).partition(" ")
        if not rest:
            self._say("\n".join(f"{name} {self._value(name)}" for name in SETTINGS))
        elif name in SETTINGS and not text.strip():
            self._say(f"usage: /set {name} VALUE (now {self._value(name)})")
        else:
            try:
                self.params = changed(self.params, name, text.strip())
                self._say(f"{name} is {self._value(name)}")
            except RequestError as error:
                self._say(f"error: {error}")

    def _value(self, name: str) -> str:
        value = getattr(self.params, name)
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    def _exit(self, _: str) -> None:
        self._done = True

    def _say(self, text: str) -> None:
        self._write(text + "\n")

    def _notice(self, text: str) -> None:
        if self._verbose:
            self._write(text)


class TerminalReader:
    """Lines edited with prompt_toolkit, with completion of commands and a history that outlives the session."""

    def __init__(self, commands: list[str], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(history)) if history else InMemoryHistory(),
            completer=WordCompleter(commands, sentence=True),
            complete_while_typing=False,
        )

    async def read(self) -> str | None:
        try:
            # Ctrl-C is a key here; a handler of the prompt's own would take away the one for answers.
            return await self._session.prompt_async("> ", handle_sigint=False)
        except EOFError:
            return None


class PipeReader:
    """Lines of a pipe or file. The thread that waits for them holds nobody up at the end."""

    def __init__(self, fd: int) -> None:
        self._lines: asyncio.Queue[bytes] = asyncio.Queue()
        args = (asyncio.get_running_loop(), fd)
        threading.Thread(target=self._wait, args=args, name="stdin", daemon=True).start()

    def _wait(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        with open(fd, "rb", closefd=False) as file:
            for line in chain(file, [b""]):
                call_in(loop, self._lines.put_nowait, line)

    async def read(self) -> str | None:
        line = await self._lines.get()
        return line.decode(errors="replace").removesuffix("\n") if line else None


def history_file(environ: Mapping[str, str]) -> Path | None:
    """Where lines are remembered, private to the user; None when there is no place for it."""
    base = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "~"), ".local", "state")
    path = Path(base, "minisgl", "shell_history").expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError:
        return None
    return path


def run(args: ServerArgs) -> int:
    """Chat with a model in processes of its own, without HTTP. Returns the exit status.

    Raises: ConfigError, WorkerDied when a worker does not start; WorkerDied, from the streams, when one dies.
    """
    config = replace(prepare(args), restart_workers=0)

    async def use(supervisor: Supervisor, endpoints: Endpoints) -> int:
        async with Frontend(endpoints) as frontend:
            supervisor.watch(partial(call_in, asyncio.get_running_loop(), frontend.fail))
            await run_shell(frontend, config)
        return 0

    return run_with_workers(use, config, LocalLauncher())


async def run_shell(frontend: Frontend, config: ServerConfig) -> None:
    """Chat on stdin and stdout until the user leaves. In a terminal Ctrl-C stops an answer, on a pipe the program.

    Raises: ConfigError for a bad MINISGL_SHELL_* value, WorkerDied when the server is gone.
    """
    params = shell_params(config.default_sampling, os.environ)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    write = partial(print, end="", flush=True)
    shell = Shell(frontend, params, write, verbose=interactive)
    if not interactive:
        await shell.run(PipeReader(sys.stdin.fileno()))
        return
    write(f"minisgl: {config.served_model_name} is ready. /help lists the commands, Ctrl-D leaves.\n")
    with on_sigint(shell.interrupt):
        await shell.run(TerminalReader(list(shell.commands), history_file(os.environ)))


@contextlib.contextmanager
def on_sigint(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` in the loop for SIGINT while inside; afterwards the handler is what it was before."""
    before, loop = signal.getsignal(signal.SIGINT), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, callback)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":  # python -m minisgl.shell
    sys.argv.insert(1, "--shell")
    runpy.run_module("minisgl", run_name="__main__", alter_sys=True)
