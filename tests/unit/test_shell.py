"""The shell's commands and memory, on a model that answers from a list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minisgl.cli.answer import Screen
from minisgl.cli.shell import DEFAULTS, LEAVE, Shell, history_file, shell_params
from minisgl.core import FinishReason, SamplingParams
from minisgl.errors import ConfigError, EngineError, RequestError, too_long
from minisgl.message.messages import ChatPrompt, UserReply


class FakePending:
    def __init__(self, words: list[Any]) -> None:
        self.words = words
        self.replies: list[UserReply] = []
        self.submitted, self.first_token, self.ended = 0.0, 1.0, 2.0
        self.closed = False


class FakeLLM:
    """Replies word by word; an exception among the words is raised there, one in the place of an answer at once."""

    def __init__(self, *answers: Any, finish: FinishReason = FinishReason.STOP, error: str | None = None) -> None:
        self._answers = list(answers)
        self._finish, self._error = finish, error
        self.seen: list[tuple[list[dict[str, Any]], SamplingParams]] = []
        self.requests: list[FakePending] = []

    def submit(self, prompts: list[ChatPrompt], params: SamplingParams) -> list[FakePending]:
        (prompt,) = prompts
        self.seen.append((list(prompt.messages), params))
        answer = self._answers.pop(0) if self._answers else ["ok"]
        if isinstance(answer, Exception):
            raise answer
        self.requests.append(FakePending(answer))
        return self.requests[-1:]

    def replies(self, request: FakePending) -> Iterator[UserReply]:
        try:
            for index, word in enumerate(request.words):
                if isinstance(word, BaseException):
                    raise word
                is_last = index == len(request.words) - 1
                ending = (self._finish, self._error) if is_last else (None, None)
                request.replies.append(UserReply(1, word, b"", 10, index + 1, 4, *ending))
                yield request.replies[-1]
        finally:
            request.closed = True


class ScriptReader:
    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = list(lines)

    def __call__(self) -> str:
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, type):
            raise line
        return line


def play(llm: FakeLLM, *lines: str | type[BaseException], is_watched: bool = True) -> tuple[Shell, str]:
    out = StringIO()
    shell = Shell(llm, DEFAULTS, Screen(Console(file=out), is_drawn=False, is_watched=is_watched))
    shell.run(ScriptReader(*lines))
    return shell, out.getvalue()


def test_an_answer_is_streamed_and_remembered() -> None:
    llm = FakeLLM(["Hel", "lo"], ["Again"])
    _, out = play(llm, "hi", "", "more", "/exit", "never read")
    assert out == "Hello\nAgain\n"
    assert llm.seen[1][0] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "more"},
    ]
    assert all(request.closed for request in llm.requests)


def test_reset_and_system() -> None:
    llm = FakeLLM()
    play(llm, "one", "/reset", "two", "/system be brief", "three", "/system", "four")
    system = {"role": "system", "content": "be brief"}
    assert [messages for messages, _ in llm.seen] == [
        [{"role": "user", "content": "one"}],
        [{"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
        [{"role": "user", "content": "four"}],
    ]


@pytest.mark.parametrize("word", LEAVE)
def test_words_that_leave(word: str) -> None:
    llm = FakeLLM()
    _, out = play(llm, f"  {word} ", "never read")
    assert (llm.seen, out) == ([], "")
    play(llm, f"{word} code 3, what is it?")  # no command, but words of a question
    assert len(llm.seen) == (not word.startswith("/"))


def test_retry_asks_the_last_question_again() -> None:
    llm = FakeLLM(["first"], ["second"], ["third"])
    shell, out = play(llm, "one", "two\nlines", "/retry")
    assert llm.seen[2][0] == llm.seen[1][0]
    assert [turn["content"] for turn in shell.turns] == ["one", "first", "two\nlines", "third"]
    assert out == "first\nsecond\nthird\n"


def test_save_writes_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "talk.md"
    _, out = play(FakeLLM(["An answer", " in two"]), "A question", f"/save {file}", f"/save {file}", "/save /no/where")
    assert file.read_text() == "**user:** A question\n\n**assistant:** An answer in two\n"
    assert f"{file} has the conversation now" in out
    assert f"error: /save {file}: " in out and "File exists" in out
    assert "error: /save /no/where: " in out


def test_set_changes_what_is_sent() -> None:
    llm = FakeLLM()
    shell, out = play(llm, "/set temperature 0.3", "/set top_k=5", "/set seed 7", "/set max_tokens none", "hi", "/set")
    assert llm.seen[0][1] == SamplingParams(temperature=0.3, top_k=5, seed=7, max_tokens=None)
    assert "temperature is 0.3" in out
    assert "seed is 7" in out
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
        ("/set seed", "seed is none"),
        ("/qiut", "unknown command /qiut; /help"),
        ("/help", "/reset"),
        ("/retry", "there is no question to ask again"),
        ("/save", "error: /save FILE: "),
        ("/stats", "no answers yet"),
    ],
)
def test_what_commands_say(line: str, expected: str) -> None:
    shell, out = play(FakeLLM(), line)
    assert expected in out
    assert shell.params == DEFAULTS


def test_stats_count_tokens_and_cache_hits() -> None:
    _, out = play(FakeLLM(["a", "b"], ["c"]), "x", "y", "/stats")
    assert "2 answers: 20 prompt tokens (40% from the cache), 3 output tokens" in out
    assert "first token after" in out


def test_a_refused_question_is_forgotten_and_the_shell_goes_on() -> None:
    llm = FakeLLM(RequestError("the chat template refused the messages"), ["fine"])
    _, out = play(llm, "bad", "good")
    assert "error: the chat template refused" in out
    assert llm.seen[1][0] == [{"role": "user", "content": "good"}]


def test_an_answer_that_fails_says_why() -> None:
    _, out = play(FakeLLM(["a", "b"], finish=FinishReason.ERROR, error="the engine failed"), "q")
    assert out == "ab\nerror: the engine failed\n"


FULL = too_long("messages", "99", 64)


def test_a_full_context_forgets_the_oldest_turns() -> None:
    llm = FakeLLM(["a1"], ["a2"], FULL, ["a3"])
    shell, out = play(llm, "q1", "q2", "q3")
    assert llm.seen[3][0] == [
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "a2"},
        {"role": "user", "content": "q3"},
    ]
    assert [turn["content"] for turn in shell.turns] == ["q2", "a2", "q3", "a3"]
    assert "the context is full" in out
    llm = FakeLLM(FULL)
    _, out = play(llm, "far too long")
    assert out == f"error: {FULL}\n"
    assert len(llm.seen) == 1


def test_a_question_that_is_too_long_by_itself_costs_no_turns() -> None:
    llm = FakeLLM(["a1"], ["a2"], FULL, FULL, FULL, ["a3"])
    _, out = play(llm, "q1", "q2", "far too long", "q3")
    assert [message["content"] for message in llm.seen[-1][0]] == ["q1", "a1", "q2", "a2", "q3"]
    assert "forgotten" not in out


def test_a_cut_answer_says_so_at_a_terminal_only() -> None:
    _, out = play(FakeLLM(["a"], finish=FinishReason.LENGTH), "q")
    assert "cut after 1 tokens" in out
    _, out = play(FakeLLM(["a"], finish=FinishReason.LENGTH), "q", is_watched=False)
    assert out == "a\n"


def test_control_characters_of_the_model_do_not_reach_the_terminal() -> None:
    _, out = play(FakeLLM(["\x1b[2J\x07a\tb\nc\x9b"]), "q")
    assert out == "[2Ja\tb\nc\n"


def test_ctrl_c_stops_the_answer_not_the_shell() -> None:
    llm = FakeLLM(["partial", KeyboardInterrupt()], ["next"])
    _, out = play(llm, "q1", "q2")
    assert out == "partial\n(stopped)\nnext\n"
    assert llm.requests[0].closed  # closing early is what aborts the request in the scheduler
    assert llm.seen[1][0][1] == {"role": "assistant", "content": "partial"}


def test_ctrl_c_before_the_first_word_forgets_the_question() -> None:
    shell, out = play(FakeLLM([KeyboardInterrupt()]), "q1")
    assert shell.turns == []
    assert out.startswith("(stopped before the first word")


def test_ctrl_c_on_a_pipe_ends_the_program() -> None:
    with pytest.raises(KeyboardInterrupt):
        play(FakeLLM(["partial", KeyboardInterrupt()]), "q1", is_watched=False)


def test_ctrl_c_on_a_pipe_that_says_nothing_ends_the_program() -> None:
    with pytest.raises(KeyboardInterrupt):
        play(FakeLLM(), KeyboardInterrupt, "hi", is_watched=False)


def test_ctrl_c_at_the_prompt_is_a_hint() -> None:
    _, out = play(FakeLLM(), KeyboardInterrupt, "hi")
    assert out == "(Ctrl-D or /exit leaves)\nok\n"


def test_ctrl_c_pressed_twice_does_not_end_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    end, presses = Screen.end, [True]

    def pressed(screen: Screen) -> None:
        end(screen)
        if presses:
            presses.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "end", pressed)
    llm = FakeLLM(["partial", KeyboardInterrupt()], ["next"])
    play(llm, "q1", "q2")
    assert [turn["content"] for turn in llm.seen[1][0]] == ["q1", "partial", "q2"]


def test_a_broken_engine_ends_the_shell() -> None:
    with pytest.raises(EngineError):
        play(FakeLLM([EngineError("the device is gone")]), "hi")


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


@pytest.mark.parametrize("place", [lambda path: path, lambda path: path / "file" / "below"])
def test_history_is_private_and_optional(place: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = history_file({"XDG_STATE_HOME": str(place(tmp_path))})
    assert path is None or path.stat().st_mode & 0o777 == 0o600
    assert (path is None) == (place(tmp_path) != tmp_path)
