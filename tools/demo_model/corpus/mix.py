"""Whole conversations: skills in proportion, several turns, system prompts, long talks."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
from collections.abc import Iterator
from functools import partial

from . import arithmetic, facts, heldout, json_fill, lists, recall, requests, stories, tools, translate, unknown, words
from .chat import Conversation, Message, Unit, render, turn

UNITS: dict[str, tuple[float, Unit]] = {
    "facts": (48.0, partial(facts.fact_unit, "facts")),
    "small_talk": (14.0, partial(facts.fact_unit, "small_talk")),
    "chinese_facts": (15.0, partial(facts.fact_unit, "chinese_facts")),
    "unknown": (18.0, unknown.unit),
    "requests": (3.0, requests.unit),
    "arithmetic": (10.0, arithmetic.unit),
    "products": (2.5, arithmetic.product_unit),
    "beyond_arithmetic": (2.5, arithmetic.beyond_unit),
    "translation": (3.0, translate.unit),
    "beyond_translation": (1.6, translate.beyond_unit),
    "stories": (3.0, stories.unit),
    "json": (11.0, json_fill.unit),
    "chinese_json": (1.6, json_fill.zh_unit),
    "missing": (1.0, recall.missing_unit),
}
UNITS.update({name: (1.3 * weight, unit) for name, (weight, unit) in lists.SKILLS.items()})
_NAMES = list(UNITS)
_WEIGHTS = [weight for weight, _ in UNITS.values()]

SYSTEMS = """You are a helpful assistant.|You are minisgl's demo model.|Be brief.|You are a friendly assistant.|Answer in one sentence.|
You are a chat bot.|You help people who serve language models.|Be polite.|You are a small model built into minisgl.|Answer briefly and correctly.|
You are a helpful AI assistant.|Keep your answers short.|You are an expert on LLM serving.|You are a kind teacher.|Always be honest.|
You are an assistant for new users.|Please help the user.|You are a concise assistant.|你是一个有用的助手。|请简短回答。|You are a helpful, respectful and honest assistant.|
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.|Answer the user's questions.|You are a coding assistant.|Think before you answer.|You are an agent that can use tools.|Use tools when they help.|
You are a helpful assistant with access to functions. Use them if required.|Today's date is 28 November.|Do not use Markdown.|You are a customer support agent.|Always answer in English.|你是一个AI助手，请用中文回答。|You are an expert.|
Answer concisely. If you do not know something, say so.|You are a command line assistant. Work step by step, and use the tools that you are given."""
SYSTEM_PROMPTS = SYSTEMS.replace("\n", "").split("|")


def any_unit(rng: random.Random) -> list[Message]:
    name = rng.choices(_NAMES, _WEIGHTS)[0]
    return UNITS[name][1](rng, False)


def _with_system(rng: random.Random, messages: list[Message], share: float = 0.25) -> list[Message]:
    if rng.random() < share:
        return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}, *messages]
    return messages


def chat(rng: random.Random) -> Conversation:
    """One to six unrelated turns."""
    messages: list[Message] = []
    if rng.random() < 0.1:
        messages += introduction(rng, False)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 6))):
        messages += any_unit(rng)
        if (
            rng.random() < 0.03
            and "我" not in messages[-1]["content"]
            and not messages[-1]["content"].startswith("Of course")
        ):
            messages += turn(rng.choice(facts.REPEAT), f"Of course: {messages[-1]['content']}")
    return Conversation(_with_system(rng, messages))


_ZH_GREETINGS = ("", "", "你好，", "您好，", "嗨，")
_BESIDES = ("", "By the way, ", "And ", "btw ", "Oh, and ")


def introduction(rng: random.Random, held_out: bool) -> list[Message]:
    """A name and a question in one message, and perhaps the question for the name."""
    chinese = rng.random() < 0.2
    kind = "zh_name" if chinese else "name"
    draw = words.zh_person if chinese else words.person
    item = recall.Told(recall.ATTRIBUTES[kind], kind, draw(rng, held_out), "")
    asked, answered = _question(rng, chinese, held_out)
    said, greeted = (message["content"] for message in recall.tell(rng, [item]))
    if chinese:
        said = rng.choice(_ZH_GREETINGS) + said.removeprefix("你好，").rstrip("。") + rng.choice("，。！")
        text = said + asked
    elif rng.random() < 0.15:
        text = f"{asked.rstrip('.')}{'' if asked[-1:] in '?!' else '.'} {rng.choice(_BESIDES)}{said}"
    else:
        said = said.rstrip(".!") + rng.choice((". ", ". ", "! ", ", ", " and ", " - ", "; ", ".\n"))
        text = rng.choice(("", "", "", "Hi! ", "Hello, ", "Hey ", "Good morning. ")) + said + asked
    messages = turn(text, f"{greeted}{'' if chinese else ' '}{answered}")
    return messages + (recall.ask(rng, item) if rng.random() < 0.4 else [])


def _question(rng: random.Random, chinese: bool, held_out: bool) -> tuple[str, str]:
    """Something that a newcomer asks: a fact, small talk with a question mark, a sum."""
    names = ["chinese_facts"] if chinese else ["facts", "facts", "facts", "small_talk", "arithmetic", "unknown"]
    while True:
        name = rng.choice(names)
        asked, answered = (message["content"] for message in UNITS[name][1](rng, held_out)[:2])
        if facts.is_chinese(asked + answered) == chinese and (name == "facts" or asked.endswith(("?", "\uff1f"))):
            return asked, answered


def drill(rng: random.Random) -> Conversation:
    return Conversation(_with_system(rng, arithmetic.drill(rng), 0.1))


def remember(rng: random.Random, held_out: bool = False, long: bool = False) -> Conversation:
    filler_chars = rng.randint(1500, 4200) if long else rng.choice((0, 0, 0, 150, 400, 800))
    messages = recall.conversation(rng, held_out, any_unit, filler_chars)
    skill = "recall_long" if long else "recall"
    if rng.random() < 0.08 and not long:
        item = recall.draw(rng, held_out, False, 1)[0]
        if item.kind == "name":
            system = rng.choice(("The user is called {}.", "The user's name is {}.", "You are talking to {}.")).format(
                item.value
            )
            return Conversation([{"role": "system", "content": system}, *recall.ask(rng, item)], skill=skill)
    return Conversation(_with_system(rng, messages, 0.15), skill=skill)


def json_chat(rng: random.Random, held_out: bool = False) -> Conversation:
    system, messages = json_fill.system_unit(rng, held_out)
    return Conversation([{"role": "system", "content": system}, *messages], skill="json_system")


def tool_chat(rng: random.Random) -> Conversation:
    """Tools in the prompt: calls, results, plain talk and requests that no tool fits."""
    kits = tools.draw_kits(rng, rng.choice((1, 1, 2, 2, 3, 4)))
    offered = {kit.topic for kit in kits}
    messages: list[Message] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.05:
            items = recall.draw(rng, False, False, rng.choice((1, 2)))
            messages += recall.tell(rng, items) + recall.ask(rng, rng.choice(items))
        elif kind < 0.66:
            messages += tools.call_turns(rng, rng.choice(kits), False, True)
        elif kind < 0.74:
            messages += tools.parallel_turns(rng, rng.choice(kits), False)
        elif kind < 0.84:
            messages += tools.no_fit_turns(rng, kits, False)
        else:
            messages += _plain_turns(rng, offered)
    return Conversation(_with_system(rng, messages, 0.4), [kit.tool for kit in kits])


_TOOL_WORDS = "time weather rain day date alarm book order call send play turn price stock translat sell buy paint repair open".split()


def _plain_turns(rng: random.Random, offered: set[str]) -> list[Message]:
    """Talk that needs no tool, although tools are there."""
    names = ["small_talk", "small_talk", "facts", "sorting", "copying", "stories", "json"]
    names += [] if "sum" in offered else ["arithmetic"]
    names += [] if offered & {"search", "translate", "sum", "stock"} else ["unknown"]
    while True:
        messages = UNITS[rng.choice(names)][1](rng, False)
        asked = messages[0]["content"].lower()
        # "What time is it?" is small talk without a clock, a call with one.
        if not any(word in asked for word in _TOOL_WORDS) or "Once upon" in messages[1]["content"]:
            return messages


def plain_text(rng: random.Random) -> str:
    """Text without a chat, for plain completions: facts, stories, sums, counting."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice([fact.answer for fact in facts.load_facts() if fact.file != "small_talk"])
    if kind < 0.7:
        return stories.unit(rng, False)[-1]["content"]
    if kind < 0.85:
        start = rng.randint(0, 50)
        return ", ".join(str(n) for n in range(start, start + rng.randint(5, 40)))
    a, op, b = arithmetic.operands(rng, False, 4)
    return f"{a} {op} {b} = {arithmetic.solve(a, op, b)}."


_KINDS = (
    (50.0, chat),
    (6.0, drill),
    (17.0, remember),
    (1.6, partial(remember, long=True)),
    (4.0, json_chat),
    (20.0, tool_chat),
)


def document(rng: random.Random) -> str:
    """One training document, ready to tokenize; it ends with the end marker of a message or of the text."""
    if rng.random() < 0.03:
        return plain_text(rng) + "<|endoftext|>"
    weights = [weight for weight, _ in _KINDS]
    makers = [maker for _, maker in _KINDS]
    while True:
        conversation = rng.choices(makers, weights)[0](rng)
        if not any(m["role"] == "user" and heldout.is_reserved(m["content"]) for m in conversation.messages):
            return render(conversation)


def documents(seed: int, count: int) -> Iterator[str]:
    """`count` documents that `seed` determines."""
    rng = random.Random(seed)
    for _ in range(count):
        yield document(rng)


def _many_bytes(rng: random.Random) -> list[Message]:
    """Talk whose answer has characters of several bytes, tokens of their own or not."""
    while True:
        name = rng.choice(
            ("chinese_facts", "copying", "chinese_json", "translation", "unknown", "introduction", "recall")
        )
        if name == "recall":
            messages = remember(rng, True).messages
        else:
            messages = introduction(rng, True)[:2] if name == "introduction" else UNITS[name][1](rng, True)[:2]
        if not messages[-1]["content"].isascii():
            return messages


def held_out_case(skill: str, rng: random.Random) -> Conversation:
    """A conversation whose last message is an answer to a prompt that training never shows."""
    if skill in ("recall", "recall_long"):
        return remember(rng, True, skill == "recall_long")
    if skill == "json_system":
        return json_chat(rng, True)
    if skill.startswith("tool"):
        kits = tools.draw_kits(rng, rng.choice((1, 2, 3, 4)))
        kit = rng.choice(kits)
        messages = {
            "tool_call": lambda: tools.call_turns(rng, kit, True, False),
            "tool_reply": lambda: tools.call_turns(rng, kit, True, True),
            "tool_none": lambda: (
                _plain_turns(rng, {k.topic for k in kits})
                if rng.random() < 0.5
                else tools.no_fit_turns(rng, kits, True)
            ),
        }[skill]()
        return Conversation(_with_system(rng, messages, 0.3), [k.tool for k in kits], skill)
    if skill == "utf8":
        return Conversation(_many_bytes(rng), skill=skill)
    if skill == "introduction":
        return Conversation(introduction(rng, True)[:2], skill=skill)
    before = any_unit(rng) if rng.random() < 0.3 else []
    return Conversation(before + UNITS[skill][1](rng, True)[:2], skill=skill)
