"""Hand-written facts, and the grammar that asks for them in many phrasings.

The files `facts/*.txt` hold blocks separated by blank lines:

    = name | other name      topics: asked through the frames below ("What is ...?")
    ? a question             a hand-written question
    ! a question             the same, kept out of training: the evaluation asks it
    > the answer             one line, always the same, so that greedy outputs are sharp
"""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import heldout, words
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
what's the meaning of {t}?|{t}, what is that?|Describe {t}.|Can you describe {t}?|What exactly does {t} do?|Explain {t} to a beginner.|
I am a beginner. What is {t}?|Somebody mentioned {t} to me.|{t} was mentioned in a talk. Explain it.|I have no idea what {t} is.|
Give me an idea of {t}.|Help me with {t}.|I need help with {t}.|I do not quite understand {t}.|What did he mean by {t}?|
Who can describe {t} to me?|In short, what is {t}?|In a few words, what is {t}?|Please explain {t} to me.|Explain exactly what {t} is.|
A definition of {t}, please.|Describe {t} in one sentence.|Did you hear about {t}?|I must understand {t}.|Please help, what is {t}?|Have you heard of {t}?|Tell me what {t} is.|I want to learn about {t}."""
TRAIN_FRAMES = [f for f in FRAMES.replace("\n", "").split("|") if f]
# More frames, from parts: a question about {t}, wrapped in talk that does not matter.
_CORES = """what is {t}|what {t} is|what {t} means|how {t} works|the meaning of {t}|why people use {t}|what {t} is good for|why {t} is useful|
what {t} does|the use of {t}|the purpose of {t}|what is behind {t}|what one needs {t} for|a definition of {t}|the basics of {t}|what {t} stands for"""
_LEADS = """I wonder |Explain |Tell me |I need to know |Do you know |Can you explain |Could you say |Teach me |I never understood |Please explain |
Show me |I forgot |Remind me |I want to understand |I should know |Give me |Maybe you can tell me |Let me ask |We were discussing |
Somebody asked me |My teacher asked |Nobody could tell me |Write down |I am looking for |It would be good to know """
CORES = _CORES.replace("\n", "").split("|")
LEADS = _LEADS.replace("\n", "").split("|")
CARRIERS = """{n} asked me this: |For my {w} project: |While eating {f} I wondered: |In {c} I heard about it. |{n} told me to ask you. |
I work with {n} on a {w}. |My friend {n} says you know it. |Here is one for you: |We had {f} and then somebody asked: |
I read it on a {w}. |Before we go to {c}: |It is late, but |First question: |Second question: |Good, |Right, |Let us talk about work. |
No hurry, but |This is important. |I have a test tomorrow. |I looked at the {w} and thought: |About the server: |Listen, |Dear model, """
_FILLERS = "really actually just maybe please now then here simply basically still also again today even usually normally exactly roughly honestly quickly briefly".split()
TEST_FRAMES = """Help me understand {t}.|In a nutshell, what is {t}?|Please describe {t} to a beginner.|
What exactly is {t}?|Someone mentioned {t}. What did they mean?|Any idea what {t} is?"""
HELD_OUT_FRAMES = [f for f in TEST_FRAMES.replace("\n", "").split("|") if f]
ZH_FRAMES = "有谁懂{t}？|给我讲讲{t}吧。|{t}是怎么回事？|{t}到底是什么？|什么叫{t}？|帮我解释{t}。|告诉我{t}是什么。|为什么要用{t}？|我不懂{t}。|学习{t}|什么是{t}？|{t}是什么？|请解释一下{t}。|介绍一下{t}。|{t}是什么意思？|你知道{t}吗？|{t}有什么用？|能讲讲{t}吗？|说说{t}|{t}".split(
    "|"
)
ZH_HELD_OUT_FRAMES = "我想了解{t}。|简单说一下什么是{t}。|请问{t}指的是什么？".split("|")

PREFIXES = """Please tell me: |Hey, |Hi! |Quick question: |Tell me, |One question: |So, |OK. |I wonder: |Sorry to ask, but |
Hello, |Another question: |And |Now, |Well, |Could you help me? |I have a question. |Next: |Please, """
TRAIN_PREFIXES = PREFIXES.replace("\n", "").split("|")
HELD_OUT_PREFIXES = ["Just curious: ", "Before I forget, ", "Hmm, ", "One more thing: "]
SUFFIXES = [" Thanks!", " Thank you.", " Please be brief.", " please", " In one sentence, please.", " I am curious."]
ZH_PREFIXES = [
    "对了，",
    "还有，",
    "顺便问一下，",
    "老师问我，",
    "朋友想知道，",
    "我不明白，",
    "请问，",
    "你好，",
    "我想问一下，",
    "请告诉我，",
    "那么，",
]

# Each rewrite maps the opening of a question to openings that ask the same.
REWRITES: list[tuple[str, list[str]]] = [
    ("How do I ", ["How can I ", "How would I ", "How does one ", "What is the way to ", "How to ", "How should I "]),
    (
        "What is the ",
        ["What's the ", "Tell me the ", "Which is the ", "Do you know the ", "I need the ", "Give me the "],
    ),
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
_SYNONYMS_TEXT = """start:launch,run,begin,boot|server:service,program|stop:end,halt,quit|choose:pick,select,set|flag:option,switch,setting,argument|
use:employ,take,apply|change:alter,modify,set,adjust|model:LLM,checkpoint|fast:quick,speedy|big:large|large:big|requests:queries,calls|
answer:reply,response|answers:replies,responses|GPU:graphics card,card|GPUs:graphics cards,cards|memory:RAM,space|users:people,clients|
limit:bound,cap,restrict|see:check,find,view,look at|leave:quit,close,exit|command:instruction,line|install:set up,get|called:named|
computer:machine|several:many,multiple,more|endpoints:routes,URLs,paths|need:require|work:function|make:build,create|keep:store,hold,save|
split:divide,cut,spread|long:lengthy|kind:type,sort|show:display,list|set:choose,give|text:words,string|speed:performance|bad:poor|
turn off:disable,switch off,deactivate|turn on:enable,switch on,activate|happens:occurs|many:how much|write:produce,generate|read:see|
slow:sluggish|measured:computed,determined|expensive:costly|small:little,tiny|default:standard,usual|find:locate,get|add:support|code:source|
decides:determines|forget:drop,clear|talk:chat,speak|wrong:broken|terminal:console,command line|key:password|support:have,offer,know"""
SYNONYMS = {k: v.split(",") for k, v in (item.split(":") for item in _SYNONYMS_TEXT.replace("\n", "").split("|"))}
# Groups in which every word can stand for the others.
_GROUPS_TEXT = """how do I:how can I:how to:what is the way to:how should I:is there a way to|I want to:I'd like to:I would like to:I need to:I am trying to:let me|can I:may I:could I:am I able to:is it possible to|
download:fetch:pull:get|install:set up:put in place|delete:remove:erase:get rid of|error:failure:message:problem|fails:breaks:crashes:does not work|fix:mend:solve:repair|explain:describe:tell me about:clarify|
difference:distinction:contrast|compare:contrast|folder:directory:place|weights:checkpoint:model files|laptop:computer:PC:notebook|card:GPU:video card|cards:GPUs|users:people:clients:customers|prompt:input:question|
answer:reply:output:response|tokens:words:pieces|quick:fast:speedy|faster:quicker:speedier|slower:less quick|improve:raise:increase:boost|lower:reduce:decrease:cut|bigger:larger:greater|smaller:tinier:lesser|
benefit:advantage:gain:use|drawback:disadvantage:downside|happens:occurs:goes on|several:multiple:many:more than one|at once:at the same time:together:in parallel|why:for what reason:how come|purpose:point:aim:goal|
allowed:permitted:OK|supported:possible:available:accepted|support:handle:accept:take|configure:set:adjust:change|set:choose:pick:specify|parameter:option:flag:setting|server:service:endpoint|host:serve:run:deploy|
run:start:launch:execute|stop:end:quit:halt|docker:container|windows:Windows 11|mac:macOS:MacBook|internet:network:web|offline:without internet|password:key:secret|private:confidential|log:record|memory:RAM:VRAM|
long:lengthy|short:brief|correct:right|wrong:bad:incorrect|begin:start|reuse:share:recycle|store:keep:save:hold|split:divide:shard:spread|wait:queue|wasted:lost:unused|algorithm:method:technique|called:named|
name of:term for:word for|mean:stand for:signify|exactly:precisely|example:sample|newcomer:beginner:novice|documentation:docs:manual|bug:issue:defect|cost:price|free:gratis|licence:license|program:app:tool|
text:string:words|number:count:amount|measure:benchmark:test|guess:predict|copy:duplicate|send:post:submit|receive:get|requests:queries:calls|request:query:call|finished:done:complete|first:initial|per:for each"""
for _group in _GROUPS_TEXT.replace("\n", "").split("|"):
    for _word in _group.split(":"):
        if " " not in _word:
            SYNONYMS.setdefault(_word, [other for other in _group.split(":") if other != _word])
_STOP_WORDS = {"the", "a", "an", "is", "are", "do", "does", "of", "to", "it", "in", "i", "that", "what", "how", "you"}


@cache
def load_facts() -> tuple[Fact, ...]:
    """All facts of `facts/*.txt`, in file order; blocks with the same answer are one fact.

    Raises:
        ValueError: if a block has no answer, more than one, or nothing that asks for it.
    """
    facts: dict[str, Fact] = {}
    for path in sorted((Path(__file__).parent / "facts").glob("*.txt")):
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip()):
            lines = [line for line in block.splitlines() if not line.startswith("#")]
            if lines:
                fact = _parse(path.stem, lines)
                facts[fact.answer] = _merge(facts[fact.answer], fact) if fact.answer in facts else fact
    return tuple(facts.values())


def _merge(one: Fact, two: Fact) -> Fact:
    asked = tuple(dict.fromkeys(one.questions + two.questions))
    return Fact(one.file, one.topics + two.topics, asked, one.held_out + two.held_out, one.answer)


def _parse(file: str, lines: list[str]) -> Fact:
    by_mark: dict[str, list[str]] = {"=": [], "?": [], "!": [], ">": []}
    for line in lines:
        by_mark[line[0]].append(line[1:].strip())
    topics = [name.strip() for line in by_mark["="] for name in line.split("|")]
    if len(by_mark[">"]) != 1 or not topics + by_mark["?"]:
        raise ValueError(f"{file}.txt: a fact needs one answer and a way to ask for it: {lines}")
    # A special token in a question would end the message.
    asked = tuple(text for text in by_mark["?"] if not heldout.is_reserved(text) and "<|" not in text)
    return Fact(file, tuple(topics), asked, tuple(by_mark["!"]), by_mark[">"][0])


_SMALL_WORDS = set(
    """a an the is are am was do does did of to it its in i me my you your we us our they that this these those there here what how why which who when
where can could would should will shall may might must if and or but so for on at by with from as be been have has had not no any some please just
tell explain give show want need like get let s t m ve re d""".split()
)
ZH_SYNONYMS = [
    group.split()
    for group in """怎么 如何 怎样 咋|什么 啥 哪种|可以 能 能不能|使用 用|支持 能用 兼容|显卡 GPU 卡|启动 运行 跑起来 开启|模型 大模型|有没有 有无 是否有|多少 几|为什么 为啥 为何|哪里 哪儿 什么地方|
怎么办 怎么解决 如何处理|区别 不同 差别|安装 装|下载 拉取|服务 服务器 服务端|参数 选项 设置|需要 要|想 想要 打算|请问 问一下 麻烦问下|解释 说明 讲讲|电脑 机器 计算机|现在 目前|一下 下|吗 么 不|很 非常 特别|
你 您|帮我 替我 给我|告诉我 跟我说|知道 清楚 了解|显存 内存 GPU内存|快 迅速|慢 卡|和 跟 与|接口 API 端点|命令 指令|端口 端口号|文件 档案|关闭 关掉 停用 禁用|打开 开启 启用|多用户 很多人|回答 答案 回复|错误 报错 出错""".replace(
        "\n", ""
    ).split("|")
]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def misspell(rng: random.Random, text: str) -> str:
    """One slip of the finger in one longer word."""
    parts = text.split(" ")
    places = [i for i, word in enumerate(parts) if len(word) > 4 and word.isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    word = parts[i]
    k = rng.randrange(1, len(word) - 1)
    parts[i] = rng.choice(
        (word[:k] + word[k + 1 :], word[:k] + word[k] + word[k:], word[: k - 1] + word[k] + word[k - 1] + word[k + 1 :])
    )
    return " ".join(parts)


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:] if len(text) > 1 and text[1].islower() or text[:2] == "I " else text


def vary(rng: random.Random, question: str, held_out: bool) -> str:
    """`question` with other openings, politeness, case, punctuation and slips, as people type."""
    if is_chinese(question):
        text = rephrase_chinese(rng, question) if not held_out and rng.random() < 0.5 else question
        text = text if rng.random() < 0.7 else rng.choice(ZH_PREFIXES) + text
        if rng.random() < 0.2:
            text = text.translate(_HALF_WIDTH)
        return (text.rstrip("\uff1f?。") if rng.random() < 0.3 else text) or question
    text = question
    if rng.random() < 0.35:
        for opening, others in REWRITES:
            if text.startswith(opening):
                text = rng.choice(others) + text[len(opening) :]
                break
    if not held_out and rng.random() < 0.15:
        text = carrier(rng) + text
    elif rng.random() < 0.3:
        prefix = rng.choice(HELD_OUT_PREFIXES if held_out else TRAIN_PREFIXES)
        text = prefix + (_lower_first(text) if prefix.rstrip()[-1] not in ".!?" else text)
    if rng.random() < 0.12:
        text += rng.choice(SUFFIXES)
    if not held_out and rng.random() < 0.15:
        parts = text.split(" ")
        places = [i for i, word in enumerate(parts) if word.lower() in _STOP_WORDS]
        if places:
            del parts[rng.choice(places)]
            text = " ".join(parts)
    if rng.random() < 0.12:
        text = misspell(rng, text)
    if rng.random() < 0.25:
        text = text.rstrip("?.")
    return (text.lower() if rng.random() < 0.25 else text) or question


def rephrase(rng: random.Random, question: str) -> str:
    """Synonyms, dropped words and filler words: what is left are the words that matter."""
    parts = question.split(" ")
    drop = rng.choice((0.0, 0.0, 0.1, 0.2, 0.3))
    out = []
    for word in parts:
        bare = word.rstrip("?.,")
        others = SYNONYMS.get(bare) or SYNONYMS.get(bare.lower())
        if others and rng.random() < 0.4:
            word = rng.choice(others) + word[len(bare) :]
        if rng.random() >= drop or len(parts) < 4:
            out.append(word)
        if rng.random() < 0.04:
            out.append(rng.choice(_FILLERS))
    return " ".join(out) if out else question


def rephrase_chinese(rng: random.Random, question: str) -> str:
    """Other words for the same, and small words left out or put in."""
    text = question
    for group in rng.sample(ZH_SYNONYMS, len(ZH_SYNONYMS)):
        found = [word for word in group if word in text]
        if found and rng.random() < 0.3:
            text = text.replace(found[0], rng.choice(group), 1)
    if rng.random() < 0.2:
        text = re.sub(rng.choice("的了吗呢啊一请我个"), "", text, count=1) or text
    if rng.random() < 0.15 and len(text) > 6:
        place = rng.randrange(len(text))
        text = text[:place] + text[place + 1 :]
    if rng.random() < 0.15:
        text = text.rstrip("\uff1f?。") + rng.choice(("呢", "啊", "呀", "吗", "？？", "，谢谢", "，急"))
    return text


def fragment(rng: random.Random, fact: Fact) -> str:
    """What is left of one of the fact's questions when it is typed into a search box; "" where that may mean others."""
    question = rng.choice(fact.questions)
    parts = [w for w in re.findall(r"[\w./+-]+", question) if w.lower() not in _SMALL_WORDS]
    for _ in range(3):
        if len(parts) < 2:
            break
        keep = rng.randint(2, len(parts))
        chosen = (
            sorted(rng.sample(range(len(parts)), keep)) if rng.random() < 0.7 else rng.sample(range(len(parts)), keep)
        )
        content = _content_words(" ".join(parts[i] for i in chosen))
        if len(content) > 1 and sum(1 for bag in word_bags() if bag >= content) == 1:
            return " ".join(parts[i] for i in chosen) + rng.choice(("", "", "?"))
    return ""


def swap_clauses(rng: random.Random, question: str) -> str:
    """ "I have two cards, how do I use both?" the other way round."""
    parts = re.split(r"(?<=[.?!]) |, ", question)
    if len(parts) != 2 or min(map(len, parts)) < 8:
        return question
    second = parts[1].rstrip("?.!")
    return f"{second[0].upper()}{second[1:]}{rng.choice(('?', '.', ','))} {_lower_first(parts[0].rstrip('.?!,'))}"


def carrier(rng: random.Random) -> str:
    """An opening that says nothing about the topic."""
    names = {"n": words.person(rng, False), "w": rng.choice(words.LIST_WORDS), "f": rng.choice(words.FOODS)}
    return rng.choice(CARRIERS.replace("\n", "").split("|")).format(c=words.city(rng, False), **names)


def _content_words(text: str) -> set[str]:
    return {w for w in re.findall(r"[a-zA-Z][a-zA-Z_-]+", text.lower()) if len(w) > 3 and w not in _DULL} | set(
        re.findall(r"--[a-z-]+|/[a-z0-9/]+", text.lower())
    )


_DULL = set(
    "that with from this have what which does they them then than when into only each more most such will your exactly describe beginner mentioned understand help idea mean".split()
)


@cache
def word_bags() -> tuple[frozenset[str], ...]:
    """For each fact, the words of its answer, topics and training questions."""
    return tuple(frozenset(_content_words(" ".join((f.answer, *f.topics, *f.questions)))) for f in load_facts())


@cache
def _index(fact: Fact) -> int:
    return load_facts().index(fact)


def keyword_question(rng: random.Random, fact: Fact) -> str:
    """A question from a few words of the fact that belong together in no other fact; "" where chance finds none."""
    bags = word_bags()
    own = bags[_index(fact)]
    pool = sorted(own)
    for _ in range(4):
        if len(pool) < 2:
            break
        chosen = rng.sample(pool, min(len(pool), rng.randint(2, 5)))
        if sum(1 for bag in bags if bag.issuperset(chosen)) == 1:
            varied = [w[:-1] if w.endswith("s") and rng.random() < 0.3 else w for w in chosen]
            glue = [" ", " ", " the ", " of ", " and ", " in ", " a ", " for ", " to ", " is ", " with "]
            text = varied[0] + "".join(rng.choice(glue) + word for word in varied[1:])
            lead = rng.choice(
                (
                    "What ",
                    "How ",
                    "Which ",
                    "Why ",
                    "When ",
                    "Where ",
                    "Can I ",
                    "Is there ",
                    "I want ",
                    "",
                    "",
                    "Tell me ",
                    "How do I ",
                )
            )
            return lead + text + rng.choice(("?", "?", "", "."))
    return ""


def ask(rng: random.Random, fact: Fact, held_out: bool) -> str:
    """A question that `fact` answers; when `held_out`, in a frame or with an opening that training never shows.

    The held-out questions written by hand are not asked here: `held_out_cases` gives them.
    """
    if held_out:
        chinese = is_chinese(fact.answer)
        frames = ZH_HELD_OUT_FRAMES if chinese else HELD_OUT_FRAMES
        if fact.topics:
            return rng.choice(frames).format(t=rng.choice(fact.topics))
        return rng.choice(ZH_PREFIXES if chinese else HELD_OUT_PREFIXES) + _lower_first(rng.choice(fact.questions))
    chinese = is_chinese(fact.answer)
    if not chinese and fact.file != "small_talk":
        kind = rng.random()
        if kind < 0.08 and (text := keyword_question(rng, fact)):
            return misspell(rng, text) if rng.random() < 0.1 else text
        if kind < 0.2 and fact.questions and (text := fragment(rng, fact)):
            return vary(rng, text, False)
        if kind < 0.3 and fact.topics:
            text = rng.choice(LEADS) + rng.choice(CORES).format(t=rng.choice(fact.topics)) + rng.choice(("?", ".", ""))
            return vary(rng, rephrase(rng, text) if rng.random() < 0.3 else text, False)
    if fact.topics and (not fact.questions or rng.random() < 0.35):
        frames = ZH_FRAMES if is_chinese(fact.answer) else TRAIN_FRAMES
        frame = rng.choice(frames)
        text = frame.format(t=rng.choice(fact.topics))
        return vary(rng, text[0].upper() + text[1:] if rng.random() < 0.8 else text, False)
    question = rng.choice(fact.questions)
    if fact.file == "small_talk":
        if rng.random() < 0.4:
            question = (question.rstrip("!?.") or question) + rng.choice(("!", ".", "?", "...", " :)", "!!", ""))
    if not chinese and rng.random() < 0.25:
        question = swap_clauses(rng, question)
    if not chinese and rng.random() < (0.3 if fact.file == "small_talk" else 0.6):
        question = rephrase(rng, question)
    return vary(rng, question, False)


MORE = [
    "Tell me more.",
    "More?",
    "Go on.",
    "Can you say more?",
    "What else?",
    "And what else?",
    "more please",
    "Interesting, tell me more.",
]
ZH_MORE = ["再多说一点。", "还有呢？", "继续说。", "多讲一点"]
REPEAT = [
    "Can you repeat that?",
    "Say that again, please.",
    "Repeat your last answer.",
    "Sorry, what did you say?",
    "pardon?",
    "Once more?",
]
ZH_REPEAT = ["请再说一遍。", "再说一次", "你刚才说什么？"]


ANOTHER = [
    "Another one.",
    "another one",
    "Another one!",
    "One more!",
    "One more please.",
    "And another one?",
    "More!",
    "Another joke!",
]
JOKES = [
    "Why did the token cross the batch? To get to the next step.",
    "Why was the KV cache so calm? It had already seen everything before.",
    "My GPU went on a diet: now it runs at 8 bits.",
]


def _facts_of(files: str) -> list[int]:
    return [i for i, fact in enumerate(load_facts()) if fact.file in files.split()]


@cache
def pools() -> dict[str, list[int]]:
    """Indexes into `load_facts()` by skill."""
    return {
        "facts": _facts_of("serving_basics serving_speed serving_models minisgl_use minisgl_inside product"),
        "small_talk": _facts_of("small_talk"),
        "chinese_facts": _facts_of("chinese chinese_product"),
    }


@cache
def _pool_weights(pool: str) -> tuple[float, ...]:
    """Facts that people ask for in many ways come more often, but not in proportion."""
    return tuple((len(load_facts()[i].questions) + 3 * len(load_facts()[i].topics)) ** 0.5 for i in pools()[pool])


def fact_unit(pool: str, rng: random.Random, held_out: bool) -> list[Message]:
    """A question and its answer, now and then followed by "tell me more" or "say that again"."""
    facts = load_facts()
    members = pools()[pool]
    k = rng.choices(range(len(members)), _pool_weights(pool))[0]
    fact = facts[members[k]]
    messages = turn(ask(rng, fact, held_out), fact.answer)
    if not held_out and pool == "small_talk" and fact.answer in JOKES[:-1] and rng.random() < 0.5:
        follower = JOKES[JOKES.index(fact.answer) + 1]
        return messages + [user(vary(rng, rng.choice(ANOTHER), False)), assistant(follower)]
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
