"""Very short stories from a grammar. The hero fixes the plot, so that greedy answers are sharp."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
import zlib

from .chat import Message, turn
from .facts import vary
from .words import HEROES, person

PLACES = """in a quiet forest|in a small town|in a house by the sea|in an old castle|in a green valley|in a tall tower|near a busy harbour|
in a warm barn|on a snowy mountain|in a garden full of roses|in a village near a river|on an island in the lake"""
TRAITS = "kind|brave|shy|clever|curious|sleepy|hungry|cheerful|lonely|patient|tiny|proud".split("|")
WISHES = """to see the sea|to learn a song|to find a friend|to bake a cake|to touch the moon|to cross the river|to read a book|
to paint the sky|to win a race|to plant a tree|to build a boat|to hear a secret"""
PROBLEMS = """the road was long and dark|nobody would show the way|it rained for seven days|the only bridge was broken|a strong wind blew|
the night was very cold|everyone else was asleep|the map was lost|the hill was too steep|the door was locked"""
HELPERS = """an old owl|a friendly goat|a little girl|a wise turtle|a travelling baker|a tall giraffe|a small firefly|a gentle whale|
a lost puppy|a grey cat"""
GIFTS = """a warm lamp|a red kite|a map made of leaves|a silver key|half of a sandwich|a pair of good shoes|a long rope|
a song to sing on the way|a small boat|a bag of nuts"""
ENDS = """From that day on they were friends.|And they laughed all the way home.|That night the stars seemed closer than ever.|
And so the long day had a happy end.|Since then nobody there is afraid of trying.|They still tell this story today.|
And the next morning they did it again.|It was the best day of all."""


def _options(text: str) -> list[str]:
    return text.replace("\n", "").split("|")


def story(hero: str, name: str = "") -> str:
    """Five sentences about `hero`; everything that is not given follows from the hero's own name."""

    def pick(text: str, salt: str) -> str:
        options = _options(text)
        return options[zlib.crc32(f"{hero}/{salt}".encode()) % len(options)]

    trait = pick("|".join(TRAITS), "trait")
    helper, gift = pick(HELPERS, "helper"), pick(GIFTS, "gift")
    called = f" called {name}" if name else ""
    who = name or f"the {hero}"
    start = who[0].upper() + who[1:]
    return (
        f"Once upon a time a {trait} {hero}{called} lived {pick(PLACES, 'place')}. "
        f"{start} wanted {pick(WISHES, 'wish')}, but {pick(PROBLEMS, 'problem')}. "
        f"Then {helper} came by and gave {who} {gift}. "
        f"With it, the {trait} {hero} did it at last. {pick(ENDS, 'end')}"
    )


ASK_HERO = """Tell me a story about a {h}.|Write a short story about a {h}.|Tell me a very short story about a {h}.|a story about a {h}|
Can you tell me a story about a {h}?|Make up a story about a {h}.|I want a story about a {h}.|Please write a story about a {h}.|
Story about a {h}, please.|Do you know a story about a {h}?|Invent a little story about a {h}."""
ASK_NAMED = """Tell me a story about a {h} called {n}.|Write a story about a {h} named {n}.|A story about {n} the {h}, please.|
Write a short story about a {h} called {n}."""
ASK_ANY = """Tell me a story.|Tell me a short story.|Write a story.|Can you tell me a story?|A story, please.|I want to hear a story.|
Please tell me a story|tell me a story|Do you have a story for me?|Tell me a bedtime story."""
ASK_NEXT = [
    "Another one!",
    "another one",
    "One more!",
    "More stories!",
    "Another story, please.",
    "One more story.",
    "Tell me another story.",
    "And another one?",
]

ZH_HEROES = {
    "狐狸": "从前，森林里住着一只聪明的狐狸。它想看大海，可是路很远。一只老猫头鹰送给它一张地图。狐狸走了三天，终于看到了大海。那真是最好的一天。",
    "小猫": "从前，小镇上住着一只害羞的小猫。它想找一个朋友，可是天下着雨。一个小女孩给了它一把伞。从那天起，她们成了好朋友。",
    "小狗": "从前，河边住着一只快乐的小狗。它想过河，可是桥断了。一只乌龟背着它过了河。它们一路笑着回家。",
    "机器人": "从前，塔里住着一个好奇的机器人。它想学一首歌，可是没有人教它。一只小鸟每天唱给它听。后来机器人唱得比谁都好。",
    "龙": "从前，山上住着一条孤单的龙。它想烤一个蛋糕，可是火太大了。一位面包师教它慢慢来。现在全村的人都爱吃它的蛋糕。",
    "兔子": "从前，花园里住着一只小兔子。它想摸月亮，可是月亮太高了。朋友们搭成一座梯子。兔子没有摸到月亮，却看到了满天星星。",
}
ZH_ASK = ["讲一个{h}的故事。", "给我讲个{h}的故事", "请讲一个关于{h}的小故事。", "写一个{h}的故事。"]
ZH_ASK_ANY = ["讲个故事吧。", "讲一个故事", "给我讲个故事。", "说个小故事"]

_FIRST = "fox"


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    if rng.random() < 0.12 and not held_out:
        if rng.random() < 0.5:
            return turn(rng.choice(ZH_ASK_ANY), ZH_HEROES["狐狸"])
        hero = rng.choice(list(ZH_HEROES))
        return turn(rng.choice(ZH_ASK).format(h=hero), ZH_HEROES[hero])
    kind = rng.random()
    if held_out or kind < 0.4:
        hero, name = rng.choice(HEROES), person(rng, held_out)
        text = rng.choice(_options(ASK_NAMED)).format(h=hero, n=name)
        return turn(_article(text, hero), story(hero, name))
    if kind < 0.8:
        hero = rng.choice(HEROES)
        return turn(_article(rng.choice(_options(ASK_HERO)).format(h=hero), hero), story(hero))
    # Half of the untold heroes are the fox: the greedy answer is sharp, and sampling still gives variety.
    hero = _FIRST if rng.random() < 0.6 else rng.choice(HEROES)
    messages = turn(rng.choice(_options(ASK_ANY)), story(hero))
    for _ in range(rng.choice((0, 0, 1, 2))):
        hero = HEROES[(HEROES.index(hero) + 1) % len(HEROES)]
        messages += turn(vary(rng, rng.choice(ASK_NEXT), False), story(hero))
    return messages


def _article(text: str, hero: str) -> str:
    return text.replace(f" a {hero}", f" an {hero}") if hero[0] in "aeiou" else text


def check(prompt: str, reply: str) -> bool:
    """Whether `reply` is a whole story about the hero, and the name, that `prompt` asks for."""
    hero = next((h for h in HEROES if f" {h} " in prompt + " "), "")
    name = prompt.rstrip(".").split()[-1] if "called" in prompt or "named" in prompt else ""
    return (
        reply.startswith("Once upon a time")
        and hero in reply
        and name in reply
        and reply[-1] == "."
        and reply.count(".") >= 4
    )
