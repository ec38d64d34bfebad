"""Counting, sorting, reversing, copying and looking up in short lists."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
from collections.abc import Callable

from . import words
from .chat import Message, is_held_out, turn
from .words import ACCENTED, EMOJI, LIST_WORDS, NAMES, ZH_FOODS, made_up, rare_character

_WORDS = LIST_WORDS + [name.lower() for name in NAMES[:60]]


def _join(items: list[str]) -> str:
    return ", ".join(items)


def _items(rng: random.Random, held_out: bool, low: int = 3, high: int = 7) -> list[str]:
    """Distinct words or distinct numbers; one list in twenty is kept for evaluation."""
    while True:
        count = rng.randint(low, high)
        if rng.random() < 0.5:
            top = rng.choice((9, 20, 50, 99, 99))
            items = [str(n) for n in rng.sample(range(1, top + 1), count)]
        else:
            items = rng.sample(_WORDS, count)
            if rng.random() < 0.2:
                items = list(dict.fromkeys(words.made_up(rng) for _ in range(count)))
        if is_held_out("list", *items) == held_out:
            return items


def _sort_key(item: str) -> tuple[int, str]:
    return (int(item), "") if item.isdigit() else (0, item)


def sort_unit(rng: random.Random, held_out: bool) -> list[Message]:
    items = _items(rng, held_out)
    numeric = items[0].isdigit()
    descending = rng.random() < 0.3
    listed = _join(items)
    if numeric and rng.random() < 0.12:
        text = rng.choice(
            ("从大到小排序：{x}", "请从大到小排列：{x}")
            if descending
            else ("从小到大排序：{x}", "请把这些数从小到大排列：{x}")
        )
    elif descending:
        forms = ["Sort in descending order: {x}", "Sort {x} from largest to smallest.", "Sort these numbers, largest first: {x}",
                 "Order from high to low: {x}"]  # fmt: skip
        text = rng.choice(forms if numeric else ["Sort in reverse alphabetical order: {x}", "Sort from Z to A: {x}"])
    else:
        forms = ["Sort: {x}", "Sort {x}.", "Sort the list {x}", "Please sort {x}.", "Sort in ascending order: {x}", "Put in order: {x}",
                 "Can you sort {x}?", "sort {x}", "Order this list: {x}", "Sort these: {x}"]  # fmt: skip
        forms += (
            ["Sort these numbers: {x}", "Sort from smallest to largest: {x}", "Sort the numbers {x}."]
            if numeric
            else [
                "Sort alphabetically: {x}",
                "Sort these words: {x}",
                "Put these words in alphabetical order: {x}",
                "Sort from A to Z: {x}",
            ]
        )
        text = rng.choice(forms)
    return turn(text.format(x=listed), _join(sorted(items, key=_sort_key, reverse=descending)))


def reverse_unit(rng: random.Random, held_out: bool) -> list[Message]:
    items = _items(rng, held_out)
    form = rng.choice(
        (
            "Reverse the list: {x}",
            "Reverse: {x}",
            "Write this list backwards: {x}",
            "Reverse {x}.",
            "Turn this list around: {x}",
        )
    )
    return turn(form.format(x=_join(items)), _join(items[::-1]))


def count_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """Count up, down, or in steps."""
    while True:
        start, length, step = rng.randint(0, 90), rng.randint(3, 15), rng.choice((1, 1, 1, 1, 2, 5, 10))
        if rng.random() < 0.4:
            start, step = 1, 1
            length = rng.randint(3, 25)
        if is_held_out("count", start, length, step) == held_out:
            break
    numbers = [start + step * i for i in range(length)]
    first, last = numbers[0], numbers[-1]
    listed = _join([str(n) for n in numbers])
    if step > 1:
        form = rng.choice(
            (
                "Count from {a} to {b} in steps of {s}.",
                "Count by {s} from {a} to {b}.",
                "Count in {s}s from {a} to {b}.",
            )
        )
        return turn(form.format(a=first, b=last, s=step), listed)
    if rng.random() < 0.25:
        form = rng.choice(
            (
                "Count down from {b} to {a}.",
                "Count backwards from {b} to {a}.",
                "Count from {b} down to {a}.",
                "从{b}倒数到{a}。",
            )
        )
        return turn(form.format(a=first, b=last), _join([str(n) for n in numbers[::-1]]))
    forms = ["Count from {a} to {b}.", "count from {a} to {b}", "Please count from {a} to {b}.", "Can you count from {a} to {b}?",
             "List the numbers from {a} to {b}.", "从{a}数到{b}。", "请从{a}数到{b}"]  # fmt: skip
    if start == 1:
        forms += ["Count to {b}.", "Can you count to {b}?", "count to {b}", "Please count up to {b}.", "数到{b}"]
    return turn(rng.choice(forms).format(a=first, b=last), listed)


def _sentence(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return " ".join(made_up(rng) for _ in range(rng.randint(1, 5)))
    if kind < 0.5:
        return "".join(
            rng.choice("abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ0123456789") for _ in range(rng.randint(3, 10))
        )
    if kind < 0.6:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 10)))
    if kind < 0.66:
        return "".join(rng.sample(ZH_FOODS, rng.randint(1, 3)))
    if kind < 0.74:
        return "".join(rare_character(rng) for _ in range(rng.randint(1, 6)))
    if kind < 0.78:
        return rng.choice(EMOJI) + " " + " ".join(rng.sample(ACCENTED, 2))
    parts = [rng.choice(_WORDS) for _ in range(rng.randint(2, 8))]
    return " ".join(["the", *parts]) if rng.random() < 0.5 else " ".join(parts)


def copy_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """Repeat a text or a list exactly."""
    while True:
        text = _join(_items(rng, held_out)) if rng.random() < 0.35 else _sentence(rng)
        if is_held_out("copy", text, every=10) == held_out:
            break
        if held_out:
            continue
    form = rng.choice(("Repeat after me: {x}", "Copy this: {x}", "Say: {x}", "Repeat: {x}", "Write exactly this: {x}", "Echo: {x}",
                       "Please repeat: {x}", "Copy the list: {x}", "Say exactly this: {x}", "跟我说：{x}", "请重复：{x}"))  # fmt: skip
    return turn(form.format(x=text), text)


def lookup_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """Number of items, first, last, largest, smallest, membership."""
    items = _items(rng, held_out)
    listed = _join(items)
    options: list[tuple[str, str]] = [
        (
            rng.choice(
                ("How many items are in this list: {x}?", "How many things do I list: {x}?", "Count the items: {x}")
            ),
            str(len(items)),
        ),
        (rng.choice(("What is the first item of {x}?", "Which comes first in this list: {x}?")), items[0]),
        (rng.choice(("What is the last item of {x}?", "Which comes last in this list: {x}?")), items[-1]),
        ("What is the second item of {x}?", items[1]),
    ]
    if items[0].isdigit():
        options += [
            (
                rng.choice(
                    ("What is the largest number of {x}?", "Which is the biggest of {x}?", "Find the maximum of {x}.")
                ),
                max(items, key=int),
            ),
            (
                rng.choice(
                    ("What is the smallest number of {x}?", "Which is the least of {x}?", "Find the minimum of {x}.")
                ),
                min(items, key=int),
            ),
        ]
    else:
        other = rng.choice([w for w in rng.sample(_WORDS, 12) if w not in items])
        word = rng.choice([rng.choice(items), other])
        options.append((f"Is {word} in this list: {{x}}?", "Yes." if word in items else "No."))
    question, answer = rng.choice(options)
    return turn(question.format(x=listed), answer)


SKILLS: dict[str, tuple[float, Callable[[random.Random, bool], list[Message]]]] = {
    "sorting": (5.0, sort_unit),
    "reversing": (1.0, reverse_unit),
    "counting": (1.6, count_unit),
    "copying": (2.0, copy_unit),
    "lists": (2.6, lookup_unit),
}
