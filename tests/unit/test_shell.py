"""The shell's commands and memory, on a frontend that answers from a list."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minisgl.core import FinishReason, SamplingParams
from minisgl.errors import ConfigError, RequestError, WorkerDied
from minisgl.message.messages import ChatPrompt, UserReply
from minisgl.shell import DEFAULTS, PipeReader, Shell, history_file, on_sigint, shell_params


class FakeStream:
    """Replies word by word; an exception among the words is raised there, `...` waits for ever."""

    def __init__(self, words: list[Any], finish: FinishReason) -> None:
        self._words = words
        self._finish = finish
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[UserReply]:
        for index, word in enumerate(self._words):
            if isinstance(word, Exception):
                raise word
            if word is ...:
                await asyncio.Event().wait()
            finish = self._finish if index == len(self._words) - 1 else None
            yield UserReply(1, word, b"", 10, index + 1, 4, finish)

    def abort(self) -> None:
        self.closed = True


class FakeFrontend:
    def __init__(self, *answers: Any, finish: FinishReason = FinishReason.STOP) -> None:
        self._answers = list(answers)
        self._finish = finish
        self.seen: list[tuple[list[dict[str, Any]], SamplingParams]] = []
        self.streams: list[FakeStream] = []

    def submit(self, prompt: ChatPrompt, params: SamplingParams) -> list[FakeStream]:
        self.seen.append((list(prompt.messages), params))
        answer = self._answers.pop(0) if self._answers else ["ok"]
        self.streams.append(FakeStream(answer, self._finish))
        return self.streams[-1:]


class ScriptReader:
    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = list(lines)

    async def read(self) -> str | None:
        line = self._lines.pop(0) if self._lines else None
        if isinstance(line, type):
            raise line
        return line


async def play(frontend: FakeFrontend, *lines: str | type[BaseException]) -> tuple[Shell, str]:
    out: list[str] = []
    shell = Shell(frontend, DEFAULTS, out.append)
    with on_sigint(shell.interrupt):
        await shell.run(ScriptReader(*lines))
    return shell, "".join(out)


async def test_an_answer_is_streamed_and_remembered() -> None:
    frontend = FakeFrontend(["Hel", "lo"], ["Again"])
    _, out = await play(frontend, "hi", "", "more", "/exit", "never read")
    assert out == "Hello\nAgain\n"
    assert frontend.seen[1][0] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "more"},
    ]
    assert all(stream.closed for stream in frontend.streams)


async def test_reset_and_system() -> None:
    frontend = FakeFrontend()
    await play(frontend, "one", "/reset", "two", "/system be brief", "three", "/system", "four")
    system = {"role": "system", "content": "be brief"}
    assert [messages for messages, _ in frontend.seen] == [
        [{"role": "user", "content": "one"}],
        [{"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
        [{"role": "user", "content": "four"}],
    ]


async def test_set_changes_what_is_sent() -> None:
    frontend = FakeFrontend()
    shell, out = await play(
        frontend, "/set temperature 0.3", "/set top_k=5", "/set seed 7", "/set max_tokens none", "hi", "/set"
    )
    assert frontend.seen[0][1] == SamplingParams(temperature=0.3, top_k=5, seed=7, max_tokens=None)
    assert "temperature is 0.3" in out
    assert "seed 7" in out
    assert shell.params.max_tokens is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/set temperature hot", "temperature must be a number, not 'hot'"),
        ("/set temperature -1", "temperature must be from 0 to 100"),
        ("/set temperature nan", "temperature must be from 0 to 100"),
        ("/set top_k 1.5", "top_k must be a whole number"),
        ("/set top_p 0", "top_p must be above 0"),
        ("/set max_tokens 0", "max_tokens must be at least 1"),
        ("/set temperature none", "temperature must be a number"),
        ("/set colour red", "unknown setting 'colour'"),
        ("/set seed", "usage: /set seed VALUE"),
        ("/quit", "unknown command /quit; /help"),
        ("/help", "/reset"),
        ("/stats", "no answers yet"),
    ],
)
async def test_what_commands_say(line: str, expected: str) -> None:
    shell, out = await play(FakeFrontend(), line)
    assert expected in out
    assert shell.params == DEFAULTS


async def test_stats_count_tokens_and_cache_hits() -> None:
    shell, out = await play(FakeFrontend(["a", "b"], ["c"]), "x", "y", "/stats")
    assert (shell.stats.num_prompt, shell.stats.num_cached, shell.stats.num_output) == (20, 8, 3)
    assert "2 answers: 20 prompt tokens (40% from the cache), 3 output tokens" in out
    assert "first token after" in out


async def test_a_refused_question_is_forgotten_and_the_shell_goes_on() -> None:
    frontend = FakeFrontend([RequestError("the chat template refused the messages")], ["fine"])
    _, out = await play(frontend, "bad", "good")
    assert "error: the chat template refused" in out
    assert frontend.seen[1][0] == [{"role": "user", "content": "good"}]


async def test_a_full_context_forgets_the_oldest_turns() -> None:
    full = RequestError("the prompt has 99 tokens, but the context of this model is 64 tokens", param="messages")
    frontend = FakeFrontend(["a1"], ["a2"], [full], ["a3"])
    _, out = await play(frontend, "q1", "q2", "q3")
    assert frontend.seen[3][0] == [
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "q3"},
    ]
    assert "the context is full" in out
    frontend = FakeFrontend([full])
    _, out = await play(frontend, "far too long")
    assert out == f"error: {full}\n"
    assert len(frontend.seen) == 1


async def test_a_question_that_is_too_long_by_itself_costs_no_turns() -> None:
    full = RequestError("the prompt has 99 tokens, but the context of this model is 64 tokens", param="messages")
    frontend = FakeFrontend(["a1"], ["a2"], [full], [full], [full], ["a3"])
    _, out = await play(frontend, "q1", "q2", "far too long", "q3")
    assert [message["content"] for message in frontend.seen[-1][0]] == ["q1", "a1", "q2", "a2", "q3"]
    assert "forgotten" not in out


async def test_a_cut_answer_says_so_at_a_terminal_only() -> None:
    _, out = await play(FakeFrontend(["a"], finish=FinishReason.LENGTH), "q")
    assert "cut after 1 tokens" in out
    written: list[str] = []
    shell = Shell(FakeFrontend(["a"], finish=FinishReason.LENGTH), DEFAULTS, written.append, verbose=False)
    await shell.handle("q")
    assert "".join(written) == "a\n"


async def test_control_characters_of_the_model_do_not_reach_the_terminal() -> None:
    _, out = await play(FakeFrontend(["\x1b[2J\x07a\tb\nc\x9b"]), "q")
    assert out == "[2Ja\tb\nc\n"


async def test_ctrl_c_stops_the_answer_not_the_shell() -> None:
    before = signal.getsignal(signal.SIGINT)
    frontend = FakeFrontend(["partial", ...], ["next"])
    asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGINT)
    _, out = await play(frontend, "q1", "q2")
    assert out == "partial\nnext\n"
    assert frontend.streams[0].closed  # closing early is what aborts the request in the scheduler
    assert frontend.seen[1][0][1] == {"role": "assistant", "content": "partial"}
    assert signal.getsignal(signal.SIGINT) is before


async def test_ctrl_c_before_the_first_word_forgets_the_question() -> None:
    frontend = FakeFrontend([...])
    asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGINT)
    shell, _ = await play(frontend, "q1")
    assert shell.turns == []


async def test_ctrl_c_between_answers_does_nothing() -> None:
    asyncio.get_running_loop().call_later(0, os.kill, os.getpid(), signal.SIGINT)
    out: list[str] = []
    shell = Shell(FakeFrontend(), DEFAULTS, out.append)
    with on_sigint(shell.interrupt):
        await asyncio.sleep(0.05)
        await shell.handle("hi")
    assert out == ["ok", "\n"]


async def test_ctrl_c_at_the_prompt_is_a_hint() -> None:
    _, out = await play(FakeFrontend(), KeyboardInterrupt, "hi")
    assert out == "(Ctrl-D or /exit leaves)\nok\n"


async def test_a_dead_server_ends_the_shell() -> None:
    with pytest.raises(WorkerDied):
        await play(FakeFrontend([WorkerDied("TP0 is gone")]), "hi")


def test_where_sampling_starts() -> None:
    assert shell_params({}, {}) == DEFAULTS
    model = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "max_tokens": 100}
    assert shell_params(model, {}) == replace(DEFAULTS, **model)
    params = shell_params(model, {"MINISGL_SHELL_TEMPERATURE": "0", "MINISGL_SHELL_MAX_TOKENS": "9"})
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 20, 9)


@pytest.mark.parametrize("name", ["MAX_TOKENS", "TEMPERATURE", "TOP_P", "TOP_K"])
def test_a_bad_environment_variable_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^MINISGL_SHELL_{name}: .*'much'"):
        shell_params({}, {f"MINISGL_SHELL_{name}": "much"})


@pytest.mark.parametrize("as_file", [True, False])
async def test_lines_from_a_pipe_or_a_file(as_file: bool, tmp_path: Path) -> None:
    text = "one\n\ntwo ü\nno newline".encode()
    if as_file:
        (tmp_path / "in").write_bytes(text)
        fd = os.open(tmp_path / "in", os.O_RDONLY)
    else:
        fd, out = os.pipe()
        os.write(out, text)
        os.close(out)
    reader = PipeReader(fd)
    assert [await reader.read() for _ in range(5)] == ["one", "", "two ü", "no newline", None]
    os.close(fd)


async def test_a_pipe_that_stays_open_does_not_hold_the_program() -> None:
    fd, out = os.pipe()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(PipeReader(fd).read(), 0.05)
    os.close(fd)
    os.close(out)


@pytest.mark.parametrize("place", [lambda path: path, lambda path: path / "file" / "below"])
def test_history_is_private_and_optional(place: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = history_file({"XDG_STATE_HOME": str(place(tmp_path))})
    assert path is None or path.stat().st_mode & 0o777 == 0o600
    assert (path is None) == (place(tmp_path) != tmp_path)
