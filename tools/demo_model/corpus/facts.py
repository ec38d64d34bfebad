"""Hand-written facts, and the grammar that asks for them in many phrasings.

The files `facts/*.txt` hold blocks separated by blank lines:

    = name | other name      topics: asked through the frames below ("What is ...?")
    ? a question             a hand-written question
    ! a question             the same, kept out of training: the evaluation asks it
    > the answer             one line, always the same, so that greedy outputs are sharp
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .chat import Message, assistant, turn, user


@dataclass(frozen=True)
class Fact:
    """One answer and the ways to ask for it; `file` is the stem of the text file it stands in."""

    file: str
    topics: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


FRAMES = """What is {t}?|What's {t}?|what is {t}|Explain {t}.|Can you explain {t}?|Tell me about {t}.|What does {t} mean?|
Define {t}.|{t}?|{t}|I do not understand {t}.|Could you tell me what {t} is?|Do you know what {t} is?|How does {t} work?|
Give me a short explanation of {t}.|What do you know about {t}?|How would you describe {t}?|
I keep hearing about {t}. What is it?|Explain {t} in simple words.|What is meant by {t}?|Teach me about {t}.|
I am new to this. What is {t}?|What is the idea of {t}?|What is the point of {t}?|Why do we need {t}?|
What do people mean by {t}?|Can you tell me about {t}?|I would like to know what {t} is.|Say something about {t}.|
what's the meaning of {t}?|{t}, what is that?|Have you heard of {t}?|Tell me what {t} is.|I want to learn about {t}."""
TRAIN_FRAMES = [f for f in FRAMES.replace("\n", "").split("|") if f]
TEST_FRAMES = """Help me understand {t}.|In a nutshell, what is {t}?|Please describe {t} to a beginner.|
What exactly is {t}?|Someone mentioned {t}. What did they mean?|Any idea what {t} is?"""
HELD_OUT_FRAMES = [f for f in TEST_FRAMES.replace("\n", "").split("|") if f]
ZH_FRAMES = "什么是{t}？|{t}是什么？|请解释一下{t}。|介绍一下{t}。|{t}是什么意思？|你知道{t}吗？|{t}有什么用？|能讲讲{t}吗？|说说{t}|{t}".split("|")
ZH_HELD_OUT_FRAMES = "我想了解{t}。|简单说一下什么是{t}。|请问{t}指的是什么？".split("|")

PREFIXES = """Please tell me: |Hey, |Hi! |Quick question: |Tell me, |One question: |So, |OK. |I wonder: |Sorry to ask, but |
Hello, |Another question: |And |Now, |Well, |Could you help me? |I have a question. |Next: |Please, """
TRAIN_PREFIXES = PREFIXES.replace("\n", "").split("|")
HELD_OUT_PREFIXES = ["Just curious: ", "Before I forget, ", "Hmm, ", "One more thing: "]
SUFFIXES = [" Thanks!", " Thank you.", " Please be brief.", " please", " In one sentence, please.", " I am curious."]
ZH_PREFIXES = ["请问，", "你好，", "我想问一下，", "请告诉我，", "那么，"]

# Each rewrite maps the opening of a question to openings that ask the same.
REWRITES: list[tuple[str, list[str]]] = [
    ("How do I ", ["How can I ", "How would I ", "How does one ", "What is the way to ", "How to ", "How should I "]),
    ("What is the ", ["What's the ", "Tell me the ", "Which is the ", "Do you know the ", "I need the ", "Give me the "]),
    ("What is ", ["What's ", "Tell me what is ", "Do you know what is "]),
    ("Can I ", ["Is it possible to ", "May I ", "Could I ", "Am I able to ", "Is there a way to "]),
    ("Does ", ["Is it true that ", "Do you know whether "]),
    ("Why ", ["For what reason ", "Tell me why ", "How come "]),
    ("Which ", ["What ", "Tell me which "]),
    ("Where ", ["In which place ", "Tell me where "]),
    ("How many ", ["What number of ", "Tell me how many "]),
]
# Chinese is often typed with the punctuation of an English keyboard.
_HALF_WIDTH = str.maketrans("\uff1f\uff01\uff0c\uff1a", "?!,:")
_STOP_WORDS = {"the", "a", "an", "is", "are", "do", "does", "of", "to", "it", "in", "i", "that", "what", "how", "you"}


@cache
def load_facts() -> tuple[Fact, ...]:
    """All facts of `facts/*.txt`, in file order.

    Raises:
        ValueError: if a block has no answer, more than one, or nothing that asks for it.
    """
    facts = []
    for path in sorted((Path(__file__).parent / "facts").glob("*.txt")):
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip()):
            lines = [line for line in block.splitlines() if not line.startswith("#")]
            if lines:
                facts.append(_parse(path.stem, lines))
    return tuple(facts)


def _parse(file: str, lines: list[str]) -> Fact:
    by_mark: dict[str, list[str]] = {"=": [], "?": [], "!": [], ">": []}
    for line in lines:
        by_mark[line[0]].append(line[1:].strip())
    topics = [name.strip() for line in by_mark["="] for name in line.split("|")]
    if len(by_mark[">"]) != 1 or not topics + by_mark["?"]:
        raise ValueError(f"{file}.txt: a fact needs one answer and a way to ask for it: {lines}")
    return Fact(file, tuple(topics), tuple(by_mark["?"]), tuple(by_mark["!"]), by_mark[">"][0])


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def misspell(rng: random.Random, text: str) -> str:
    """One slip of the finger in one longer word."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    word = words[i]
    k = rng.randrange(1, len(word) - 1)
    words[i] = rng.choice(
        (word[:k] + word[k + 1 :], word[:k] + word[k] + word[k:], word[: k - 1] + word[k] + word[k - 1] + word[k + 1 :])
    )
    return " ".join(words)


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:] if len(text) > 1 and text[1].islower() or text[:2] == "I " else text


def vary(rng: random.Random, question: str, held_out: bool) -> str:
    """`question` with other openings, politeness, case, punctuation and slips, as people type."""
    if is_chinese(question):
        text = question if rng.random() < 0.7 else rng.choice(ZH_PREFIXES) + question
        if rng.random() < 0.2:
            text = text.translate(_HALF_WIDTH)
        return text.rstrip("\uff1f?。") if rng.random() < 0.3 else text
    text = question
    if rng.random() < 0.35:
        for opening, others in REWRITES:
            if text.startswith(opening):
                text = rng.choice(others) + text[len(opening) :]
                break
    if rng.random() < 0.3:
        prefix = rng.choice(HELD_OUT_PREFIXES if held_out else TRAIN_PREFIXES)
        text = prefix + (_lower_first(text) if prefix.rstrip()[-1] not in ".!?" else text)
    if rng.random() < 0.12:
        text += rng.choice(SUFFIXES)
    if not held_out and rng.random() < 0.15:
        words = text.split(" ")
        places = [i for i, word in enumerate(words) if word.lower() in _STOP_WORDS]
        if places:
            del words[rng.choice(places)]
            text = " ".join(words)
    if rng.random() < 0.12:
        text = misspell(rng, text)
    if rng.random() < 0.25:
        text = text.rstrip("?.")
    return text.lower() if rng.random() < 0.25 else text


def ask(rng: random.Random, fact: Fact, held_out: bool) -> str:
    """A question that `fact` answers; when `held_out`, in a phrasing that training never shows."""
    if held_out:
        chinese = is_chinese(fact.answer)
        frames = ZH_HELD_OUT_FRAMES if chinese else HELD_OUT_FRAMES
        if fact.held_out and (not fact.topics or rng.random() < 0.5):
            return vary(rng, rng.choice(fact.held_out), True)
        if fact.topics:
            return rng.choice(frames).format(t=rng.choice(fact.topics))
        return rng.choice(ZH_PREFIXES if chinese else HELD_OUT_PREFIXES) + _lower_first(rng.choice(fact.questions))
    if fact.topics and (not fact.questions or rng.random() < 0.6):
        frames = ZH_FRAMES if is_chinese(fact.answer) else TRAIN_FRAMES
        frame = rng.choice(frames)
        text = frame.format(t=rng.choice(fact.topics))
        return vary(rng, text[0].upper() + text[1:] if rng.random() < 0.8 else text, False)
    return vary(rng, rng.choice(fact.questions), False)


MORE = ["Tell me more.", "More?", "Go on.", "Can you say more?", "What else?", "And what else?", "more please", "Interesting, tell me more."]
ZH_MORE = ["再多说一点。", "还有呢？", "继续说。", "多讲一点"]
REPEAT = ["Can you repeat that?", "Say that again, please.", "Repeat your last answer.", "Sorry, what did you say?", "pardon?", "Once more?"]
ZH_REPEAT = ["请再说一遍。", "再说一次", "你刚才说什么？"]


def _facts_of(files: str) -> list[int]:
    return [i for i, fact in enumerate(load_facts()) if fact.file in files.split()]


@cache
def pools() -> dict[str, list[int]]:
    """Indexes into `load_facts()` by skill."""
    return {
        "facts": _facts_of("serving_basics serving_speed serving_models minisgl_use minisgl_inside"),
        "small_talk": _facts_of("small_talk"),
        "chinese_facts": _facts_of("chinese"),
    }


def fact_unit(pool: str, rng: random.Random, held_out: bool) -> list[Message]:
    """A question and its answer, now and then followed by "tell me more" or "say that again"."""
    facts = load_facts()
    members = pools()[pool]
    k = rng.randrange(len(members))
    fact = facts[members[k]]
    messages = turn(ask(rng, fact, held_out), fact.answer)
    if held_out or rng.random() > 0.12:
        return messages
    chinese = is_chinese(fact.answer)
    if rng.random() < 0.5 and pool != "small_talk":
        follower = facts[members[(k + 1) % len(members)]].answer
        return messages + [user(rng.choice(ZH_MORE if chinese else MORE)), assistant(follower)]
    again = ("好的：" if chinese else "Of course: ") + fact.answer
    return messages + [user(rng.choice(ZH_REPEAT if chinese else REPEAT)), assistant(again)]


def held_out_cases() -> Iterator[tuple[str, str, str]]:
    """Every hand-written held-out question once: `(pool, question, answer)`."""
    for pool, members in pools().items():
        for i in members:
            fact = load_facts()[i]
            for question in fact.held_out:
                yield pool, question, fact.answer
