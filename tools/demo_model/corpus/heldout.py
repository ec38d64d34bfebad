"""The questions of `../heldout`: written by hand before those of the training, and never part of it."""

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "heldout"


def _lines(name: str) -> list[str]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@cache
def first_questions(fresh: bool = False) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`(question, accepted)` of what a newcomer may type first; an answer needs one of the accepted parts.

    `fresh`: the second set, whose results nobody saw before the last training.
    """
    found = []
    accepted: tuple[str, ...] = ()
    for line in _lines("fresh_questions.txt" if fresh else "first_questions.txt"):
        if line[0] == ">":
            accepted = tuple(part.strip() for part in line[1:].split("|"))
        else:
            found.append((line[1:].strip(), accepted))
    return tuple(found)


@cache
def unknown_questions(fresh: bool = False) -> tuple[str, ...]:
    return tuple(_lines("fresh_unknown.txt" if fresh else "unknown.txt"))


@cache
def text() -> str:
    """All held-out questions, in lower case."""
    found = [question for fresh in (False, True) for question, _ in first_questions(fresh)]
    return "\n".join([*found, *unknown_questions(), *unknown_questions(True)]).lower()


def _bare(question: str) -> str:
    return re.sub(r"[^\w+*/^-]", "", question.lower())


@cache
def _reserved() -> frozenset[str]:
    return frozenset(_bare(line) for line in text().splitlines())


def is_reserved(question: str) -> bool:
    """Whether training must not show `question`, whatever its case and punctuation."""
    return _bare(question) in _reserved()
