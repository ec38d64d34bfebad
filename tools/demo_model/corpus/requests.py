"""Requests for what the model cannot make, in as many forms as people give them: programs, texts, poems."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random
from functools import cache

from . import nouns, words
from .chat import Message, is_held_out, turn
from .facts import is_chinese, load_facts, vary

_CODE = """Write a {l} {k} that {d}.|write {l} code to {d2}|Can you write a {k} in {l}?|{l} {k} that {d}|How do I {d2} in {l}?|Show me {l} code that {d}.|Give me a {k} in {l} that {d}.|Implement {g} in {l}.|implement {g}|code for {g}|
Please write a {k} that {d}.|I need a {l} {k}.|Debug this {l} code|Why does my {l} {k} fail?|Fix my {l} code.|Convert this {l} {k} to {l2}.|Write unit tests for my {k}.|What is wrong with this {l} {k}?|make a {k} that {d}|Program {g} for me.|
Help me write a {k}.|Help me with my {l} code|Create a {l} {k} which {d}|def solve(x):|print("hello") in {l}|SELECT * FROM users, what does it do?|refactor this {k}|explain this {l} code|用{l}写一个程序|用{l}写{zg}|帮我写一段{l}代码吧|写一个{zg}的程序|{l}代码怎么写|{l}怎么实现{zg}"""
_TEXT = """Write {w} to {p}.|Write {w} about {t}.|Write {w} to {p} about {t}.|Write me {w}.|Can you write {w}?|Please draft {w} for {p}.|I need {w} for {p}.|Help me write {w}.|compose {w} about {t}|Make {w} about {t}.|Improve {w}.|Proofread {w} for me.|
Correct my {w2}.|Fix the grammar of my {w2}.|Check the spelling in my {w2}.|Rewrite my {w2}.|Summarize this {w2}.|Summarise the {w2} below.|Give me a summary of this {w2}.|Shorten my {w2}.|make my {w2} sound friendlier|Translate my {w2} into good English and improve it.|
Paraphrase this {w2}.|turn this into a {w2}|edit my {w2}|Generate a {w2} about {t}.|continue my {w2}|write five ideas for my {w2}|write a {w2} of 500 words|写{zw}|帮我写{zw}|帮我改{zw}|总结一下这{zw}|给我写{zw}，要三百字|润色{zw}"""
_POEM = """Write a poem about {t}.|Write me a poem about {t}.|Write a haiku about {t}.|a poem about {t}|Make a poem for {p}.|Compose a verse about {t}.|Can you write a poem about {t}?|I want a poem about {t}.|poem: {t}|a short poem about {t}, please|Write a love poem for {p}.|
write a sonnet about {t}|a limerick about {t}|rhymes about {t}|Give me a haiku on {t}.|写一首关于{zt}的诗|写首{zt}的诗|以{zt}为题作诗|来一首{zt}的诗|给我写一首{zt}诗"""
_LANGUAGES = "Python JavaScript Java C C++ Rust Go Ruby PHP Swift Kotlin SQL Bash HTML CSS TypeScript R MATLAB Perl C# python javascript java".split()
_DOES = """adds two numbers|sorts a list|reverses a list|prints hello|reads a file|finds the largest number|counts words|checks for primes|downloads a page|computes factorials|plays a game|removes duplicates|parses JSON|sends an email|connects to a database|draws a circle|
converts dates|renames files|splits a text|merges two lists|calls an API|shows a clock|generates passwords|solves a maze|opens a window|scrapes a site|inverts a binary tree"""
_GOALS = "quicksort|binary search|a calculator|fizzbuzz|a web server|a to-do list|tic tac toe|a login form|a chat bot|a linked list|the Fibonacci numbers|bubble sort|a website|a snake game|a REST API|a regex|an Excel macro|a bot|an app|a stack|a neural network|matrix multiplication"
_TEXTS = "an email|a letter|an essay|a report|a speech|a text message|an invitation|a complaint|an article|a review|a toast|an apology|a cover letter|a CV|an advert|a tweet|a blog post|a press release|a thank you note|a resignation|an abstract|a reference|a song|a script|a novel"
_OWN = "text|essay|email|letter|report|article|paragraph|document|CV|sentence|thesis|page|paper|book|speech|chapter|message|homework|meeting notes|post"
_PEOPLE = "my boss|my teacher|my landlord|a customer|my friend|my mother|the bank|my doctor|a colleague|the city council|my wife|my team|a company|my girlfriend|my neighbour|the school|my professor|my dad"
_ZH_TEXTS = "一封信|一篇作文|一份报告|一段文字|一篇论文|一封邮件|一个通知|一份简历|一篇文章|一段祝福|一份计划书|一个文案|一篇日记|一份检讨|一篇读后感"
_ZH_THEMES = "秋天|大海|月亮|母亲|故乡|爱情|雪|友谊|山|花|夏天|冬天|雨|星空|离别|思念|茶|风|老师|祖国"
_ZH_GOALS = "冒泡排序|计算器|贪吃蛇|爬虫|登录页面|二分查找|网站|小游戏|快速排序|斐波那契数列"


def _forms(text: str) -> list[str]:
    return [form for form in text.replace("\n", "").split("|") if form]


def base(verb: str) -> str:
    """ "adds two numbers" to "add two numbers"."""
    first, _, rest = verb.partition(" ")
    return f"{first.removesuffix('s')} {rest}"


def _request(rng: random.Random, form: str) -> str:
    does = rng.choice(_forms(_DOES))
    theme = rng.choice(
        (
            rng.choice(nouns.NOUNS),
            f"the {rng.choice(nouns.NOUNS)}",
            f"a {rng.choice(nouns.ADJECTIVES)} {rng.choice(nouns.NOUNS)}",
            rng.choice(words.ANIMALS),
            rng.choice(words.HOBBIES),
        )
    )
    return form.format(
        l=rng.choice(_LANGUAGES), l2=rng.choice(_LANGUAGES), k=rng.choice("function script program class method loop query".split()), d=does, d2=base(does),
        g=rng.choice(_forms(_GOALS)), w=rng.choice(_forms(_TEXTS)), w2=rng.choice(_forms(_OWN)), p=rng.choice(_forms(_PEOPLE)), t=theme,
        zw=rng.choice(_forms(_ZH_TEXTS)), zt=rng.choice(_forms(_ZH_THEMES)), zg=rng.choice(_forms(_ZH_GOALS)),
    )  # fmt: skip


@cache
def _answer(part: str) -> str:
    (found,) = (fact.answer for fact in load_facts() if part in fact.answer)
    return found


# For each kind, what its English and its Chinese answers hold.
_KINDS = (
    (_forms(_CODE), "too small to write code", "不会写代码"),
    (_forms(_TEXT), "too small to write or edit", "不会写文章"),
    (_forms(_POEM), "Tokens fall like rain", "词元如细雨"),
)


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    """A request and what the model says to all of its kind; one request in ten is kept for evaluation."""
    while True:
        forms, answer, zh_answer = rng.choice(_KINDS)
        form = rng.choice(forms)
        question = _request(rng, form)
        if ("{" in form and is_held_out("request", question, every=10)) == held_out:
            return turn(vary(rng, question, held_out), _answer(zh_answer if is_chinese(question) else answer))
