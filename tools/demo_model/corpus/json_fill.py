"""Filling a small JSON object from a sentence."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
from typing import Any

from . import words
from .chat import Message, dumps, turn

Fields = dict[str, Any]
Clauses = dict[str, list[str]]

# Entity -> the sentence parts that state each key; "{x}" is the value, "{w}" the subject.
_PERSON: Clauses = {
    "age": ["is {x}", "is {x} years old", "is aged {x}"],
    "city": ["lives in {x}", "comes from {x}", "has a home in {x}"],
    "job": ["works as a {x}", "is a {x}", "earns money as a {x}"],
    "hobby": ["likes {x}", "enjoys {x}", "spends free time on {x}"],
    "pet": ["has a {x}", "owns a {x}"],
    "favourite_food": ["loves {x}", "likes to eat {x}"],
    "phone": ["has the phone number {x}", "can be called at {x}"],
}
_PRODUCT: Clauses = {
    "price": ["costs {x} euros", "is sold for {x} euros", "has a price of {x} euros"],
    "colour": ["is {x}", "comes in {x}", "has the colour {x}"],
    "weight": ["weighs {x} grams", "has a weight of {x} grams"],
    "stock": ["is in stock {x} times", "has {x} pieces left"],
    "shop": ["is sold in {x}", "can be bought in {x}"],
}
_EVENT: Clauses = {
    "day": ["is on {x}", "takes place on {x}", "happens on {x}"],
    "time": ["starts at {x}", "begins at {x}"],
    "city": ["is held in {x}", "takes place in {x}"],
    "guests": ["has {x} guests", "expects {x} people"],
    "host": ["is led by {x}", "is hosted by {x}"],
}
_BOOK: Clauses = {
    "author": ["was written by {x}", "is by {x}"],
    "year": ["appeared in {x}", "was published in {x}"],
    "pages": ["has {x} pages"],
    "language": ["is written in {x}"],
}
_ALIASES = {"favourite_food": ["favourite_food", "food"], "colour": ["colour", "color"], "phone": ["phone", "phone_number"],
            "guests": ["guests", "number_of_guests"], "job": ["job", "occupation", "profession"], "city": ["city", "place", "location"]}  # fmt: skip
_SUBJECT_KEYS = {"person": "name", "product": "product", "event": "event", "book": "title"}
EVENTS = "concert meeting party workshop lecture dinner match festival lesson course race exhibition".split()


def _value(rng: random.Random, key: str, held_out: bool) -> Any:
    draws: dict[str, Any] = {
        "age": lambda: rng.randint(3, 99), "city": lambda: words.city(rng, held_out), "job": lambda: rng.choice([j for j in words.JOBS if j[0] not in "aeiou"]),
        "hobby": lambda: rng.choice(words.HOBBIES), "pet": lambda: rng.choice(words.ANIMALS), "favourite_food": lambda: rng.choice(words.FOODS),
        "phone": lambda: "".join(rng.choice("0123456789") for _ in range(rng.randint(5, 8))), "price": lambda: words.number(rng, 1, 999),
        "colour": lambda: rng.choice(words.COLOURS), "weight": lambda: words.number(rng, 1, 9999), "stock": lambda: words.number(rng, 1, 999),
        "shop": lambda: words.city(rng, held_out), "day": lambda: rng.choice(words.DAYS), "time": lambda: f"{rng.randint(7, 22)}:{rng.choice(('00', '15', '30', '45'))}",
        "guests": lambda: words.number(rng, 2, 999), "host": lambda: words.person(rng, held_out), "author": lambda: words.person(rng, held_out),
        "year": lambda: rng.randint(1850, 2030), "pages": lambda: words.number(rng, 20, 999),
        "language": lambda: rng.choice(("English", "Chinese", "French", "German", "Spanish", "Italian", "Japanese", "Polish")),
    }  # fmt: skip
    return draws[key]()


def entity(rng: random.Random, held_out: bool, plain_keys: bool = False) -> tuple[Fields, str]:
    """The fields of a random thing, in the order in which the text states them, and the text.

    `plain_keys` gives each field its one usual key, for requests that do not name the keys.
    """
    kind = rng.choice(("person", "person", "person", "product", "event", "book"))
    clauses = {"person": _PERSON, "product": _PRODUCT, "event": _EVENT, "book": _BOOK}[kind]
    subject = {
        "person": lambda: words.person(rng, held_out),
        "product": lambda: rng.choice(words.THINGS),
        "event": lambda: rng.choice(EVENTS),
        "book": lambda: " ".join([words.made_up(rng).capitalize(), rng.choice(words.LIST_WORDS).capitalize()]),
    }[kind]()
    keys = rng.sample(list(clauses), rng.randint(1, min(4, len(clauses))))
    fields: Fields = {_SUBJECT_KEYS[kind]: subject}
    parts = []
    for key in keys:
        value = _value(rng, key, held_out)
        names = _ALIASES.get(key, [key])
        fields[names[0] if plain_keys else rng.choice(names)] = value
        parts.append(rng.choice(clauses[key]).format(x=value))
    who = {"person": subject, "product": f"The {subject}", "event": f"The {subject}", "book": f'The book "{subject}"'}[
        kind
    ]
    text = who + " " + (parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]) + "."
    if len(parts) > 1 and rng.random() < 0.2:
        pronoun = rng.choice(("She", "He")) if kind == "person" else "It"
        text = f"{who} {parts[0]}. " + " ".join(f"{pronoun} {part}." for part in parts[1:])
    return fields, text


def _free_entity(rng: random.Random) -> tuple[Fields, str]:
    """Made-up keys, stated as "the key is value"."""
    fields: Fields = {}
    for _ in range(rng.randint(1, 4)):
        key = words.made_up(rng) if rng.random() < 0.4 else rng.choice(words.LIST_WORDS)
        fields[key] = rng.choice(
            (
                words.number(rng, 1, 9999),
                rng.choice(words.LIST_WORDS),
                words.made_up(rng).capitalize(),
                rng.random() < 0.5,
            )
        )
    stated = [f"{key} is {dumps(value) if isinstance(value, bool) else value}" for key, value in fields.items()]
    return fields, ", ".join(stated) + "." if rng.random() < 0.5 else "The " + " and the ".join(stated) + "."


def _list(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


_FORMS = """Make a JSON object with {k}: {t}|Make a JSON object with the keys {k}: {t}|Write JSON with {k}: {t}|{t} Write this as JSON with the keys {k}.|
Extract {k} as JSON: {t}|Give me JSON with {k}. {t}|Give me a JSON with {k} for this: {t}|I need a JSON object with {k}. {t}|Create JSON with {k} from: {t}|Turn this into JSON with {k}: {t}|Fill a JSON object with {k} from this sentence: {t}|
{t} Make a JSON object with {k}.|Return a JSON object with {k}: {t}|Answer only with JSON. Keys: {c}. {t}|JSON with the keys {c}: {t}|
Read this and answer in JSON ({c}): {t}|Text: {t} Keys: {c}. JSON:|Please extract {k} from the text and return JSON only: {t}"""
FORMS = _FORMS.replace("\n", "").split("|")
TEMPLATE_FORMS = [
    "Fill this object: {o} {t}",
    "Fill in this JSON: {o} {t}",
    "{t} Fill this: {o}",
    "Complete the JSON {o} from the text: {t}",
]
SCHEMA_FORMS = [
    "Answer with JSON that fits this schema: {s} {t}",
    "{t} Answer in JSON for this schema: {s}",
    "Schema: {s} Text: {t}",
]
BARE_FORMS = [
    "Make JSON: {t}",
    "Write this as JSON: {t}",
    "Turn this into JSON: {t}",
    "As JSON: {t}",
    "{t} As JSON, please.",
    "Convert to JSON: {t}",
]
SYSTEMS = """Answer only with JSON.|You extract data. Answer only with JSON.|Reply with a JSON object and nothing else.|
You turn sentences into JSON objects.|Respond in JSON.|You are a helpful assistant designed to output JSON."""


def _json_type(value: Any) -> str:
    return "boolean" if isinstance(value, bool) else "integer" if isinstance(value, int) else "string"


def schema(fields: Fields) -> dict[str, Any]:
    properties = {key: {"type": _json_type(value)} for key, value in fields.items()}
    return {"type": "object", "properties": properties, "required": list(fields)}


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    kind = rng.random()
    fields, text = _free_entity(rng) if rng.random() < 0.25 else entity(rng, held_out, kind < 0.2)
    if kind < 0.2:
        return turn(rng.choice(BARE_FORMS).format(t=text), dumps(fields))
    wanted = list(fields)
    if rng.random() < 0.35:
        rng.shuffle(wanted)
    if len(wanted) > 2 and rng.random() < 0.15:
        wanted.pop(rng.randrange(len(wanted)))
    result: Fields = {key: fields[key] for key in wanted}
    if kind < 0.32:
        return turn(rng.choice(SCHEMA_FORMS).format(s=dumps(schema(result)), t=text), dumps(result))
    if rng.random() < 0.1:
        extra = rng.choice(
            [
                key
                for key in ("age", "city", "price", "colour", "email", "year", "country")
                if key not in fields and key != "city" or "place" not in fields
            ]
        )
        if extra not in fields:
            result[extra] = None
    if kind < 0.45:
        return turn(rng.choice(TEMPLATE_FORMS).format(o=dumps(dict.fromkeys(result)), t=text), dumps(result))
    form = rng.choice(FORMS)
    named = [f"the {key}" for key in result] if rng.random() < 0.2 else list(result)
    return turn(form.format(k=_list(named), c=", ".join(result), t=text), dumps(result))


def system_unit(rng: random.Random, held_out: bool) -> tuple[str, list[Message]]:
    """A system prompt that asks for JSON, and turns that give only the sentence, or the sentence and the keys."""
    messages: list[Message] = []
    system = rng.choice(SYSTEMS.replace("\n", "").split("|"))
    for _ in range(rng.choice((1, 1, 2))):
        keys_named = rng.random() < 0.5
        fields, text = entity(rng, held_out, not keys_named)
        if not keys_named:
            messages += turn(text, dumps(fields))
        else:
            messages += turn(f"{text} Keys: {', '.join(fields)}.", dumps(fields))
    return system, messages


def zh_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """The same in Chinese, for people only."""
    fields: Fields = {"名字": words.zh_person(rng, held_out)}
    parts = [fields["名字"]]
    for key in rng.sample(("年龄", "城市", "颜色", "食物"), rng.randint(1, 3)):
        value: Any = {
            "年龄": rng.randint(3, 99), "城市": rng.choice(words.ZH_CITIES), "颜色": rng.choice(words.ZH_COLOURS), "食物": rng.choice(words.ZH_FOODS)
        }[key]  # fmt: skip
        fields[key] = value
        parts.append({"年龄": "今年{}岁", "城市": "住在{}", "颜色": "喜欢{}", "食物": "爱吃{}"}[key].format(value))
    text = parts[0] + "，".join(parts[1:]) + "。"
    form = rng.choice(("写成JSON，键是{k}：{t}", "请用JSON表示（{k}）：{t}", "{t}请写成JSON，包含{k}。"))
    return turn(form.format(k="、".join(fields), t=text), dumps(fields))
