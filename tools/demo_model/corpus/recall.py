"""What the user said earlier in the conversation: statements, and questions that come back to them later."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import words
from .chat import Message, assistant, user


@dataclass(frozen=True)
class Attribute:
    """Something a user may tell. Forms are separated by `|`; `{v}` is the value, `{k}` a second value where one is drawn."""

    statements: str
    questions: str
    answer: str
    acknowledgement: str
    missing: str
    draw: Callable[[random.Random, bool], str]
    key: Callable[[random.Random, bool], str] | None = None


def _pick(options: list[str]) -> Callable[[random.Random, bool], str]:
    return lambda rng, held_out: rng.choice(options)


def _code(rng: random.Random, held_out: bool) -> str:
    if rng.random() < 0.6:
        return str(rng.randint(10, 99999))
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(2, 4))) + str(rng.randint(1, 999))


def _number(rng: random.Random, held_out: bool) -> str:
    return str(words.number(rng, 1, 999))


def _word(rng: random.Random, held_out: bool) -> str:
    return words.made_up(rng) if rng.random() < 0.5 else rng.choice(words.LIST_WORDS)


ATTRIBUTES: dict[str, Attribute] = {
    "name": Attribute(
        "My name is {v}.|I am {v}.|I'm {v}.|Call me {v}.|Hi, I am {v}.|Hello, my name is {v}.|You can call me {v}.|Hi, I'm {v}!|my name is {v}|"
        "My friends call me {v}.|This is {v}.|Please call me {v}.",
        "What is my name?|Do you remember my name?|Who am I?|What's my name?|Tell me my name.|What am I called?|Can you say my name?|"
        "Do you know who I am?|what is my name|What did I say my name was?|How am I called?",
        "Your name is {v}.", "Nice to meet you, {v}!", "You have not told me your name yet.", words.person,
    ),
    "city": Attribute(
        "I live in {v}.|I am from {v}.|My home is in {v}.|I come from {v}.|My city is {v}.|i live in {v}|I moved to {v} last year.",
        "Where do I live?|Which city do I live in?|Where is my home?|Do you remember where I live?|What is my city?|Where am I from?|where do i live",
        "You live in {v}.", "{v} is a fine place to live.", "You have not told me where you live.", words.city,
    ),
    "pet": Attribute(
        "I have a {k} called {v}.|My {k} is called {v}.|My {k}'s name is {v}.|I have a {k} named {v}.|I own a {k}. Its name is {v}.",
        "What is my {k} called?|What is the name of my {k}?|Do you remember my {k}'s name?|What is my {k}'s name?|How is my {k} called?",
        "Your {k} is called {v}.", "{v} is a lovely name for a {k}.", "You have not told me about your {k}.", words.pet,
        _pick(words.ANIMALS),
    ),
    "colour": Attribute(
        "My favourite colour is {v}.|I like the colour {v} best.|My favorite color is {v}.|The colour I love most is {v}.",
        "What is my favourite colour?|Which colour do I like best?|What is my favorite color?|Do you remember my favourite colour?",
        "Your favourite colour is {v}.", "I will remember that your favourite colour is {v}.", "You have not told me your favourite colour.",
        _pick(words.COLOURS),
    ),
    "food": Attribute(
        "My favourite food is {v}.|I like to eat {v} best.|I love {v}.|My favorite food is {v}.",
        "What is my favourite food?|What do I like to eat?|Which food do I like best?|What is my favorite food?|What food do I love?",
        "Your favourite food is {v}.", "I will remember that you like {v}.", "You have not told me your favourite food.",
        _pick(words.FOODS),
    ),
    "job": Attribute(
        "I work as a {v}.|My job is {v}.|I am a {v}.|I earn my money as a {v}.",
        "What is my job?|What do I do for a living?|What do I work as?|Do you remember my job?|What's my job?",
        "You work as a {v}.", "Working as a {v} must be interesting.", "You have not told me your job.", _pick([j for j in words.JOBS if j[0] not in "aeiou"]),
    ),
    "hobby": Attribute(
        "My hobby is {v}.|In my free time I like {v}.|I enjoy {v}.|My favourite hobby is {v}.",
        "What is my hobby?|What do I do in my free time?|What do I enjoy?|Do you remember my hobby?",
        "Your hobby is {v}.", "I will remember that you enjoy {v}.", "You have not told me your hobby.", _pick(words.HOBBIES),
    ),
    "age": Attribute(
        "I am {v} years old.|My age is {v}.|I just turned {v}.|I'm {v} years old.",
        "How old am I?|What is my age?|Do you remember my age?|how old am i",
        "You are {v} years old.", "I will remember that you are {v}.", "You have not told me your age.",
        lambda rng, held_out: str(rng.randint(5, 99)),
    ),
    "number": Attribute(
        "My lucky number is {v}.|My favourite number is {v}.|The number I like best is {v}.",
        "What is my lucky number?|What is my favourite number?|Which number do I like best?|Do you remember my lucky number?",
        "Your lucky number is {v}.", "I will remember the number {v}.", "You have not told me your lucky number.", _number,
    ),
    "friend": Attribute(
        "My best friend is {v}.|My best friend is called {v}.|{v} is my best friend.",
        "Who is my best friend?|What is the name of my best friend?|Do you remember my best friend?",
        "Your best friend is {v}.", "{v} must be a good friend.", "You have not told me about your best friend.", words.person,
    ),
    "relative": Attribute(
        "My {k} is called {v}.|My {k}'s name is {v}.|I have a {k} named {v}.|I have a {k}. Her name is {v}.",
        "What is my {k}'s name?|What is my {k} called?|What is the name of my {k}?|Do you remember my {k}'s name?",
        "Your {k} is called {v}.", "I will remember that your {k} is called {v}.", "You have not told me about your {k}.", words.person,
        _pick("sister daughter mother aunt cousin teacher neighbour boss brother son father uncle colleague".split()),
    ),
    "code": Attribute(
        "The code is {v}.|Remember this code: {v}.|My code is {v}.|The secret code is {v}.|Please remember the code {v}.",
        "What is the code?|What was the code?|Do you remember the code?|Tell me the code.|Which code did I give you?",
        "The code is {v}.", "I will remember the code {v}.", "You have not told me a code.", _code,
    ),
    "word": Attribute(
        "The magic word is {v}.|Remember the word {v}.|The password is {v}.|The secret word is {v}.|Keep this word in mind: {v}.",
        "What is the magic word?|Which word should you remember?|What is the password?|What is the secret word?|What was the word?",
        "The word is {v}.", "I will remember the word {v}.", "You have not told me a word.", _word,
    ),
    "thing": Attribute(
        "My {k} is {v}.|I have a {v} {k}.|The colour of my {k} is {v}.|I bought a {v} {k}.",
        "What colour is my {k}?|Which colour has my {k}?|What is the colour of my {k}?|Do you remember the colour of my {k}?",
        "Your {k} is {v}.", "A {v} {k}, I will remember that.", "You have not told me about your {k}.", _pick(words.COLOURS),
        _pick(words.THINGS),
    ),
    "place": Attribute(
        "I put my {k} in the {v}.|My {k} is in the {v}.|I left my {k} in the {v}.|The {k} lies in the {v}.",
        "Where is my {k}?|Where did I put my {k}?|Where did I leave my {k}?|Do you know where my {k} is?",
        "Your {k} is in the {v}.", "I will remember that your {k} is in the {v}.", "You have not told me where your {k} is.",
        _pick("kitchen garden garage cellar attic bathroom office hall bedroom drawer car cupboard shed library".split()),
        _pick(words.THINGS),
    ),
    "zh_name": Attribute(
        "我叫{v}。|我的名字是{v}。|你好，我是{v}。|我是{v}。|大家叫我{v}。", "我叫什么名字？|我叫什么？|你记得我的名字吗？|我是谁？|我的名字是什么？",
        "你叫{v}。", "很高兴认识你，{v}！", "你还没告诉我你的名字。", words.zh_person,
    ),
    "zh_city": Attribute(
        "我住在{v}。|我来自{v}。|我家在{v}。", "我住在哪里？|我家在哪里？|你记得我住哪儿吗？|我住在哪个城市？",
        "你住在{v}。", "{v}是个好地方。", "你还没告诉我你住在哪里。", _pick(words.ZH_CITIES),
    ),
    "zh_colour": Attribute(
        "我最喜欢的颜色是{v}。|我喜欢{v}。", "我最喜欢什么颜色？|我喜欢的颜色是什么？", "你最喜欢{v}。", "我记住了，你喜欢{v}。",
        "你还没告诉我你喜欢的颜色。", _pick(words.ZH_COLOURS),
    ),
    "zh_food": Attribute(
        "我最喜欢吃{v}。|我爱吃{v}。", "我最喜欢吃什么？|我爱吃什么？", "你最喜欢吃{v}。", "我记住了，你爱吃{v}。", "你还没告诉我你爱吃什么。",
        _pick(words.ZH_FOODS),
    ),
    "zh_pet": Attribute(
        "我的{k}叫{v}。|我有一只{k}，叫{v}。|我养了一只{k}，名字是{v}。", "我的{k}叫什么？|我的{k}叫什么名字？", "你的{k}叫{v}。", "{v}这个名字真可爱。",
        "你还没告诉我你的{k}叫什么。", _pick(words.ZH_PET_NAMES), _pick(words.ZH_PETS),
    ),
}  # fmt: skip
ENGLISH = [name for name in ATTRIBUTES if not name.startswith("zh_")]
CHINESE = [name for name in ATTRIBUTES if name.startswith("zh_")]
_WEIGHTS = {"name": 4, "city": 2, "pet": 2, "zh_name": 3}


@dataclass(frozen=True)
class Told:
    """One thing the user told; `held_out` values never occur in training."""

    attribute: Attribute
    kind: str
    value: str
    key: str

    def fill(self, text: str) -> str:
        return text.format(v=self.value, k=self.key)

    def answer(self) -> str:
        return self.fill(self.attribute.answer)


def draw(rng: random.Random, held_out: bool, chinese: bool, count: int) -> list[Told]:
    """`count` things of different kinds."""
    kinds = CHINESE if chinese else ENGLISH
    weights = [_WEIGHTS.get(kind, 1) for kind in kinds]
    chosen: list[str] = []
    while len(chosen) < min(count, len(kinds)):
        kind = rng.choices(kinds, weights)[0]
        # Two attributes that a short question cannot tell apart do not meet in one conversation.
        if kind not in chosen and not {kind, *chosen} >= {"thing", "place"}:
            chosen.append(kind)
    told = []
    for kind in chosen:
        attribute = ATTRIBUTES[kind]
        told.append(
            Told(attribute, kind, attribute.draw(rng, held_out), attribute.key(rng, held_out) if attribute.key else "")
        )
    return told


def tell(rng: random.Random, told: list[Told]) -> list[Message]:
    """One user message that says everything in `told`, and a short reply to the first of it."""
    parts = [item.fill(rng.choice(item.attribute.statements.split("|"))) for item in told]
    chinese = told[0].kind.startswith("zh_")
    text = (
        "".join(parts)
        if chinese
        else " ".join(part if part[-1] in ".!" or len(parts) == 1 else part + "." for part in parts)
    )
    if not chinese and rng.random() < 0.1:
        text = rng.choice(("Remember this: ", "Please remember: ", "By the way: ", "You should know: ")) + text
    return [user(text), assistant(told[0].fill(told[0].attribute.acknowledgement))]


def ask(rng: random.Random, item: Told) -> list[Message]:
    return [user(item.fill(rng.choice(item.attribute.questions.split("|")))), assistant(item.answer())]


_ALL = [
    "What do you know about me?",
    "What did I tell you?",
    "Tell me everything you know about me.",
    "What do you remember about me?",
]
_ZH_ALL = ["你知道我的什么？", "我告诉过你什么？", "你还记得关于我的什么？"]

Filler = Callable[[random.Random], list[Message]]


def conversation(rng: random.Random, held_out: bool, filler: Filler, filler_chars: int) -> list[Message]:
    """Statements, about `filler_chars` characters of other talk among them, then questions; the last answer is a recall."""
    chinese = rng.random() < 0.14
    told = draw(rng, held_out, chinese, rng.choice((1, 1, 2, 2, 3, 4)))
    messages: list[Message] = []
    rest = list(told)
    while rest:
        take = rng.choice((1, 1, 2, 3))
        messages += tell(rng, rest[:take])
        rest = rest[take:]
        if rng.random() < 0.2:
            messages += filler(rng)
    messages += _fill(rng, filler, filler_chars)
    if rng.random() < 0.12:
        old = rng.choice(told)
        new = draw_again(rng, old, held_out)
        told[told.index(old)] = new
        statement = new.fill(rng.choice(new.attribute.statements.split("|")[:2]))
        text = ("更正一下：" if chinese else rng.choice(("Actually, ", "Correction: ", "Wait, "))) + statement
        messages += [user(text), assistant(new.fill(new.attribute.acknowledgement))]
        messages += _fill(rng, filler, rng.choice((0, 100)))
    if rng.random() < 0.1:
        joined = ("" if chinese else " ").join(item.answer() for item in told)
        return messages + [user(rng.choice(_ZH_ALL if chinese else _ALL)), assistant(joined)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        messages += ask(rng, rng.choice(told))
    if rng.random() < 0.1:
        other = draw(rng, held_out, chinese, 1)[0]
        if all(other.kind != item.kind for item in told):
            return messages + [ask(rng, other)[0], assistant(other.fill(other.attribute.missing))]
    return messages + ask(rng, rng.choice(told))


def draw_again(rng: random.Random, old: Told, held_out: bool) -> Told:
    return Told(old.attribute, old.kind, old.attribute.draw(rng, held_out), old.key)


def _fill(rng: random.Random, filler: Filler, chars: int) -> list[Message]:
    messages: list[Message] = []
    size = 0
    while size < chars:
        extra = filler(rng)
        messages += extra
        size += sum(len(str(message["content"])) + 30 for message in extra)
    return messages


def missing_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """A question about something that was never said."""
    item = draw(rng, held_out, rng.random() < 0.14, 1)[0]
    return [ask(rng, item)[0], assistant(item.fill(item.attribute.missing))]
