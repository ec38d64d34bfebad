"""What a check hands back, and how a check asks another program."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "n/a"]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `fix` says how to mend a `warn` or a `fail`; `n/a` does not concern this machine."""

    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What another program said. `code` is None when it could not be run or did not end in time."""

    code: int | None
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def reason(self) -> str:
        """One line of why it failed: the last thing it said, or its exit status (negative: the signal)."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1][:200] if lines else f"exit status {self.code}"


def ask(command: Sequence[str], timeout: float = 60.0) -> Answer:
    """Run a program to its end, at most `timeout` seconds. Never raises for what the program does."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"no answer within {timeout:g} s")
    except OSError as error:
        return Answer(None, "", f"{command[0]}: {error.strerror}")
    return Answer(done.returncode, done.stdout, done.stderr)


def guarded(name: str, check: Callable[[], Row | list[Row]]) -> list[Row]:
    """The rows of a check; a check that crashes is a failing row of its own."""
    try:
        rows = check()
    except Exception as error:  # a diagnosis must survive whatever it finds
        return [Row(name, "fail", f"the check crashed: {type(error).__name__}: {error}", "Please report this.")]
    return rows if isinstance(rows, list) else [rows]
