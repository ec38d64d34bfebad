"""The course's exercises: `python -m minisgl.learn check 4` tries what a reader has written in `lesson04.py`.

The lessons are in `docs/learn/`. Each asks for a small function, which is called beside the part of minisgl that does
the same for a living, and says where the two differ.
"""


class Wrong(Exception):
    """The exercise is not solved: the message says for which input, what was expected and what came."""


def compare(call: str, expected: object, got: object) -> None:
    """Raises: Wrong if they differ."""
    if got != expected:
        raise Wrong(f"{call} is to be {expected!r}, and was {got!r}")
