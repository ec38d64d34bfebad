"""The interactive shell: a chat with the model in the terminal, by way of an `LLM`.

    lines → commands (`/set …`) or messages → ChatPrompt → LLM.submit → text as it comes

It works on a pipe too: `echo 'Hello' | minisgl --shell` prints the answer and nothing else.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisgl.config.args import ServerArgs
from minisgl.core import DRAWING, FinishReason, SamplingParams
from minisgl.errors import ConfigError, RequestError
from minisgl.message.messages import ChatPrompt

if TYPE_CHECKING:
    from minisgl.llm import LLM, Pending

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

    def record(self, answer: Pending) -> None:
        """Count an answer of which something has come."""
        last, seconds = answer.replies[-1], answer.ended - answer.first_token
        self.num_answers += 1
        self.num_prompt += last.num_prompt_tokens
        self.num_cached += last.num_cached_tokens
        self.num_output += last.num_output_tokens
        speed = (last.num_output_tokens - 1) / seconds if seconds > 0 else 0.0
        waited = (answer.first_token - answer.submitted) * 1000
        self.last = f"first token after {waited:.0f} ms, then {speed:.1f} tokens/s"

    def __str__(self) -> str:
        if not self.num_answers:
            return "no answers yet"
        cached = f"{100 * self.num_cached / max(1, self.num_prompt):.0f}% from the cache"
        answers = "1 answer" if self.num_answers == 1 else f"{self.num_answers} answers"
        totals = f"{answers}: {self.num_prompt} prompt tokens ({cached}), {self.num_output} output tokens"
        return f"{totals}\nlast answer: {self.last}"


class Shell:
    """One conversation with the model.

    write: takes each piece of output. verbose: a person is at a terminal, who wants to know more (hints, notices), and
    whose Ctrl-C stops an answer.
    """

    def __init__(self, llm: LLM, params: SamplingParams, write: Callable[[str], object], verbose: bool = True) -> None:
        self.params = params
        self.system = ""
        self.turns: list[dict[str, Any]] = []  # user and assistant, alternating
        self.stats = Stats()
        self._llm, self._write, self._verbose = llm, write, verbose
        self._done = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._say(HELP),
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/stats": lambda _: self._say(str(self.stats)),
            "/exit": self._exit,
        }

    def run(self, read: Callable[[], str | None]) -> None:
        """Read and answer lines until /exit or the end of input (None). Raises: EngineError, WorkerDied."""
        while not self._done:
            try:
                line = read()
            except KeyboardInterrupt:
                self._say("(Ctrl-D or /exit leaves)")
                continue
            if line is None:
                return
            self.handle(line)

    def handle(self, line: str) -> None:
        """Do what one line says."""
        name, _, rest = line.strip().partition(" ")
        if name and not name.startswith("/"):
            self._answer(line.strip())
        elif name in self.commands:
            self.commands[name](rest.strip())
        elif name:
            self._say(f"unknown command {name}; /help lists the commands")

    def _answer(self, text: str) -> None:
        """Ask the model. A question that is refused, or stopped before the first word, leaves no trace."""
        before, answer = list(self.turns), list[str]()
        self.turns.append({"role": "user", "content": text})
        try:
            self._stream(self._submit(), answer)
        except RequestError as error:
            self._say(f"\nerror: {error}" if answer else f"error: {error}")
        except KeyboardInterrupt:
            if not self._verbose:
                raise
        if answer:
            self._write("\n")
            self.turns.append({"role": "assistant", "content": "".join(answer)})
        else:
            self.turns = before

    def _submit(self) -> Pending:
        """As long as the conversation is too long for the context, its oldest turn is forgotten."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        turns = list(self.turns)
        while True:
            try:
                (request,) = self._llm.submit([ChatPrompt(head + turns)], self.params)
                break
            except RequestError as error:
                if error.code != "context_length_exceeded" or len(turns) < 3:
                    raise
                del turns[:2]  # never the question that is being asked
        if len(turns) < len(self.turns):
            self._notice("(the context is full: the oldest turns are forgotten; /reset forgets all)\n")
        self.turns = turns
        return request

    def _stream(self, request: Pending, answer: list[str]) -> None:
        """Write the pieces of one answer as they come, collect them in `answer` and count them."""
        try:
            for reply in self._llm.replies(request):
                if reply.text:
                    answer.append(reply.text)
                    self._write(reply.text.translate(_CONTROL))
        finally:
            if request.replies:
                self.stats.record(request)
        if reply.finish_reason is FinishReason.LENGTH:
            self._notice(f"\n(cut after {reply.num_output_tokens} tokens: /set max_tokens, or the context is full)")
        if reply.error is not None:
            raise RequestError(reply.error)

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


def terminal_reader(commands: list[str], history: Path | None) -> Callable[[], str | None]:
    """Reads lines edited with prompt_toolkit, with completion of commands and a history that outlives the session."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)) if history else InMemoryHistory(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
    )

    def read() -> str | None:
        try:
            return session.prompt("> ")
        except EOFError:
            return None

    return read


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
    """Chat on stdin and stdout until the user leaves. Returns the exit status.

    Raises: ConfigError for what cannot be used, a MINISGL_SHELL_* value too; EngineError, WorkerDied.
    """
    shell_params({}, os.environ)  # a bad variable is told before a model is loaded
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from minisgl.llm import LLM

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    write = partial(print, end="", flush=True)
    given = {f.name: value for f in fields(args) if (value := getattr(args, f.name)) != f.default}
    with LLM(**given) as llm:
        shell = Shell(llm, shell_params(llm.config.default_sampling, os.environ), write, verbose=interactive)
        if interactive:
            write(f"minisgl: {llm.config.served_model_name} is ready. /help lists the commands, Ctrl-D leaves.\n")
            shell.run(terminal_reader(list(shell.commands), history_file(os.environ)))
        else:
            lines = (line.decode(errors="replace").removesuffix("\n") for line in sys.stdin.buffer)
            shell.run(lambda: next(lines, None))
    return 0


if __name__ == "__main__":  # python -m minisgl.shell
    sys.argv.insert(1, "--shell")
    runpy.run_module("minisgl", run_name="__main__", alter_sys=True)
