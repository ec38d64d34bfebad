"""The interactive shell: a chat with the model in the terminal, by way of an `LLM`.

    lines → commands (`/set …`) or messages → ChatPrompt → LLM.submit → text as it comes

On a pipe it prints the answers and nothing else: `echo 'Hello' | minisgl chat`.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console
from rich.theme import Theme

from minisgl.cli.answer import Screen
from minisgl.config.args import ServerArgs
from minisgl.core import DRAWING, FinishReason, SamplingParams
from minisgl.errors import ConfigError, RequestError
from minisgl.llm import LLM, Pending
from minisgl.message.messages import ChatPrompt
from minisgl.processes.workers import import_fast_tokenizer

DEFAULTS = SamplingParams(max_tokens=2048, temperature=0.6)
SETTINGS: Mapping[str, type[float]] = {**DRAWING, "max_tokens": int, "seed": int}
HELP = Path(__file__).parent / "texts" / "shell.txt"
LEAVE = ("exit", "quit", "/exit", "/quit", "/bye")


def changed(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """`params` with one setting read from text. Raises: RequestError saying what the value may be."""
    if name not in SETTINGS:
        raise RequestError(f"unknown setting {name!r}; there are {', '.join(SETTINGS)}", param=name)
    is_none, whole = text.lower() == "none" and name in ("max_tokens", "seed"), "whole " * (SETTINGS[name] is int)
    try:
        return replace(params, **{name: None if is_none else SETTINGS[name](text)})  # type: ignore[arg-type]
    except ValueError:
        raise RequestError(f"{name} must be a {whole}number, not {text!r}", param=name) from None


def shell_params(default_sampling: Mapping[str, float | int], environ: Mapping[str, str]) -> SamplingParams:
    """Where the shell starts: `MINISGL_SHELL_*`, else the model's generation_config.json, else DEFAULTS.

    Raises: ConfigError naming the variable whose value cannot be used.
    """
    params = replace(DEFAULTS, **default_sampling)  # type: ignore[arg-type]
    for name in SETTINGS:
        variable = f"MINISGL_SHELL_{name.upper()}"
        try:
            params = changed(params, name, environ[variable]) if environ.get(variable) else params
        except RequestError as error:
            raise ConfigError(f"{variable}: {error}") from None
    return params


class Shell:
    """One conversation with the model. A person at a terminal is told more than a pipe is, and their Ctrl-C stops an
    answer, not the program."""

    def __init__(self, llm: LLM, params: SamplingParams, screen: Screen) -> None:
        self.params, self.system = params, ""
        self.turns: list[dict[str, Any]] = []  # user and assistant, alternating
        self._llm, self._screen = llm, screen
        self._answers: list[Pending] = []  # each with its last reply
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: screen.say(HELP.read_text(encoding="utf-8").rstrip()),
            "/clear": self._clear,
            "/reset": self._clear,
            "/retry": self._retry,
            "/save": self._save,
            "/system": self._system,
            "/set": self._set,
            "/stats": self._stats,
        }

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer lines until the user leaves or `read` has no more. Raises: EngineError, WorkerDied."""
        line = ""
        while line not in LEAVE:
            try:
                self.handle(line)
                line = read().strip()
            except KeyboardInterrupt:
                if not self._screen.is_watched:
                    raise
                self._screen.say("(Ctrl-D or /exit leaves)")
                line = ""
            except (EOFError, StopIteration):
                return

    def handle(self, line: str) -> None:
        """Do what one line, or a question of several, says."""
        name, _, rest = line.strip().partition(" ")
        if name in self.commands:
            self.commands[name](rest.strip())
        elif name.startswith("/"):
            self._screen.say(f"unknown command {name}; /help lists the commands")
        elif name:
            self._answer(line.strip())

    def _answer(self, text: str) -> None:
        """Ask the model. A question that is refused, or stopped before the first word, leaves no trace."""
        before, answer = list(self.turns), list[str]()
        self.turns.append({"role": "user", "content": text})
        try:
            end = self._stream(self._submit(), answer)
        except RequestError as error:
            end = f"error: {error}"
        except KeyboardInterrupt:
            if not self._screen.is_watched:
                raise
            end = "(stopped)" if answer else "(stopped before the first word: the question is forgotten)"
        if answer:
            self.turns.append({"role": "assistant", "content": "".join(answer)})
            self._screen.end()
        else:
            self.turns = before
        if end:
            self._screen.say(end)

    def _submit(self) -> Pending:
        """As long as the conversation is too long for the context, its oldest turn is forgotten."""
        turns, head = list(self.turns), [{"role": "system", "content": self.system}] if self.system else []
        while True:
            try:
                (request,) = self._llm.submit([ChatPrompt(head + turns)], self.params)
                break
            except RequestError as error:
                if error.code != "context_length_exceeded" or len(turns) < 3:
                    raise
                del turns[:2]  # never the question that is being asked
        if len(turns) < len(self.turns) and self._screen.is_watched:
            self._screen.say("(the context is full: the oldest turns are forgotten; /reset forgets all)")
        self.turns = turns
        return request

    def _stream(self, request: Pending, answer: list[str]) -> str:
        """Show one answer as it comes, collect it in `answer` and count it. Returns what is to be said of its end."""
        try:
            for reply in self._llm.replies(request):
                if reply.text:
                    answer.append(reply.text)
                    self._screen.add(reply.text)
        finally:
            if request.replies:
                del request.replies[:-1]
                self._answers.append(request)
        if reply.error is not None:
            raise RequestError(reply.error)
        if reply.finish_reason is FinishReason.LENGTH and self._screen.is_watched:
            return f"(cut after {reply.num_output_tokens} tokens: /set max_tokens, or the context is full)"
        return ""

    def _stats(self, _: str) -> None:
        if not self._answers:
            self._screen.say("no answers yet")
            return
        last, ends = self._answers[-1], [answer.replies[-1] for answer in self._answers]
        prompt, output = sum(end.num_prompt_tokens for end in ends), sum(end.num_output_tokens for end in ends)
        cached = f"{100 * sum(end.num_cached_tokens for end in ends) / max(1, prompt):.0f}% from the cache"
        answers, seconds = f"{len(ends)} answer" + "s" * (len(ends) > 1), last.ended - last.first_token
        waited, speed = (last.first_token - last.submitted) * 1000, (ends[-1].num_output_tokens - 1) / (seconds or 1)
        self._screen.say(f"{answers}: {prompt} prompt tokens ({cached}), {output} output tokens")
        self._screen.say(f"last answer: first token after {waited:.0f} ms, then {speed:.1f} tokens/s")

    def _clear(self, _: str) -> None:
        self.turns = []
        self._screen.say("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self.system, self.turns = text, []
        self._screen.say("the system message is set" if text else "there is no system message now")

    def _retry(self, _: str) -> None:
        """The answer that there was is forgotten."""
        if self.turns:
            *self.turns, question, _answer = self.turns
            self._answer(question["content"])
        else:
            self._screen.say("there is no question to ask again")

    def _save(self, name: str) -> None:
        text = "\n\n".join(f"**{turn['role']}:** {turn['content']}" for turn in self.turns)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(f"{text}\n")
            self._screen.say(f"{name} has the conversation now")
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ of nobody
            self._screen.say(f"error: /save {name or 'FILE'}: {error}")

    def _set(self, rest: str) -> None:
        name, _, text = rest.replace("=", " ", 1).partition(" ")
        try:
            if text.strip() or name not in ("", *SETTINGS):
                self.params = changed(self.params, name, text.strip())
            shown = {each: getattr(self.params, each) for each in ([name] if name else SETTINGS)}
            self._screen.say("\n".join(f"{each} is {str(value).lower()}" for each, value in shown.items()))
        except RequestError as error:
            self._screen.say(f"error: {error}")


def line_reader(commands: list[str], history: Path | None, before: Callable[[], None]) -> Callable[[], str]:
    """Reads what is typed in a terminal, with completion of commands and a history that outlives the session.

    before: called before each prompt.
    """
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        [("bold ansicyan", "> ")],
        history=FileHistory(str(history)) if history else InMemoryHistory(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        prompt_continuation="  ",
    )
    return lambda: session.prompt(pre_run=before)


def history_file(environ: Mapping[str, str]) -> Path | None:
    """Where lines are remembered, private to the user; None when there is no place for it."""
    folder = Path(environ.get("XDG_STATE_HOME") or "~/.local/state", "minisgl")
    try:
        (path := folder.expanduser() / "shell_history").parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        return None
    return path


def run(args: ServerArgs) -> int:
    """Chat on stdin and stdout until the user leaves. Returns the exit status.

    Raises: ConfigError for what cannot be used, a MINISGL_SHELL_* value too; EngineError, WorkerDied.
    """
    shell_params({}, os.environ)  # a bad variable is told before a model is loaded
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    is_watched = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(theme=Theme({"markdown.code": "cyan"}))
    screen = Screen(console, is_watched and not console.is_dumb_terminal, is_watched)
    given = {f.name: value for f in fields(args) if (value := getattr(args, f.name)) != f.default}
    import_fast_tokenizer()
    gc.disable()  # what imports make is no garbage, and would be walked over again and again
    with LLM(**given) as llm:
        gc.enable()
        shell = Shell(llm, shell_params(llm.config.default_sampling, os.environ), screen)
        if not is_watched:
            shell.run(lambda: next(sys.stdin.buffer).decode(errors="replace"))
            return 0
        screen.say(f"minisgl: {llm.config.served_model_name} is ready. /help lists the commands, Ctrl-D leaves.")
        logger = logging.getLogger("minisgl")
        held = MemoryHandler(1000, logging.CRITICAL + 1, target=logger.handlers[0])
        logger.handlers[:] = [held]  # from now on lines of the log wait for the end of an answer
        shell.run(line_reader([*shell.commands, *LEAVE], history_file(os.environ), held.flush))
    return 0
