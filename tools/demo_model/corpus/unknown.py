"""Questions outside of what the model knows: the honest answer is always the same.

`unknown.txt` has subjects by kind, and how each kind is asked for. What the questions of `../heldout` are about never
occurs here, and of all other subjects one in eight is kept for evaluation too.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import heldout, nouns, words
from .chat import Message, is_held_out, turn
from .facts import is_chinese, vary

ANSWER = "I do not know that. I am a tiny model: ask me about LLM serving, minisgl, small sums, lists, JSON or a story."
ZH_ANSWER = "这个我不知道。我是一个很小的模型，可以问我大模型服务、minisgl、加减法或小故事。"

_HERE = Path(__file__).parent
_VERBS = "repair paint clean sell build draw wash open carry throw hide break lift fold polish store".split()


@dataclass(frozen=True)
class Kind:
    """Subjects of one kind, and questions in which `{x}` stands for a subject and `{y}` for another."""

    subjects: tuple[str, ...]
    forms: tuple[str, ...]


def _is_free(subject: str) -> bool:
    bare = re.sub(r"^(a|an|the) ", "", subject.lower())
    edge = "" if is_chinese(bare) else r"\b"
    return not re.search(edge + re.escape(bare) + edge, heldout.text())


@cache
def load_kinds() -> tuple[Kind, ...]:
    """Blocks of `unknown.txt`: lines of subjects (`=`, separated by `|`) and of forms (`?`)."""
    kinds = []
    for block in re.split(r"\n\s*\n", (_HERE / "unknown.txt").read_text(encoding="utf-8").strip()):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        parts = {
            mark: [p.strip() for line in lines if line[0] == mark for p in line[1:].split("|") if p.strip()]
            for mark in "=?"
        }
        if parts["?"]:
            kinds.append(Kind(tuple(filter(_is_free, parts["="])), tuple(parts["?"])))
    return tuple(kinds)


@cache
def _weights() -> tuple[float, ...]:
    """Many forms and subjects make a kind more frequent, but not in proportion."""
    return tuple((len(kind.forms) * (1 + len(kind.subjects))) ** 0.4 for kind in load_kinds())


@cache
def _nouns(chinese: bool) -> tuple[str, ...]:
    return tuple(filter(_is_free, nouns.ZH_NOUNS if chinese else nouns.NOUNS))


def any_question(rng: random.Random) -> str:
    """About things, qualities and deeds that chance puts together."""
    chinese = rng.random() < 0.2
    form = rng.choice((nouns.ZH_FORMS if chinese else nouns.FORMS).replace("\n", "").split("|"))
    one, two = rng.sample(_nouns(chinese), 2)
    return form.format(n=one, m=two, a=rng.choice(nouns.ADJECTIVES), v=rng.choice(nouns.VERBS))


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    """A question, and that the model does not know; a held-out one has a subject that training never shows."""
    if not held_out and rng.random() < 0.45:
        question = any_question(rng)
        return turn(vary(rng, question, False), ZH_ANSWER if is_chinese(question) else ANSWER)
    while True:
        kind = rng.choices(load_kinds(), _weights())[0]
        form = rng.choice(kind.forms)
        names = [name for name in ("x", "y") if "{" + name + "}" in form]
        if held_out and not names:
            continue
        slots = dict(zip(names, rng.sample(kind.subjects, len(names)), strict=True))
        if all(is_held_out("subject", value, every=8) == held_out for value in slots.values()):
            break
    extras = {"verb": rng.choice(_VERBS), "thing": rng.choice(words.THINGS), "food": rng.choice(words.FOODS)}
    extras |= {"odd": words.made_up(rng), "year": str(rng.randint(1000, 2100)), "number": str(rng.randint(2, 99))}
    question = form.format(**slots, **extras)
    question = question[0].upper() + question[1:] if rng.random() < 0.6 else question
    return turn(vary(rng, question, held_out), ZH_ANSWER if is_chinese(question) else ANSWER)
