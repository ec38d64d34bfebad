"""Sums and differences of numbers of up to four digits, products up to 12 x 12, and an honest refusal of the rest.

One pair of operands in twenty is kept for evaluation, of products one pair in ten for each way of asking.
"""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random

from .chat import Message, is_held_out, turn
from .facts import is_chinese

REFUSAL = "That is beyond me: I add and subtract two numbers of up to four digits, and multiply up to 12 x 12."
ZH_REFUSAL = "这个我不会算：我只会四位数以内两个数的加减法，和12以内的乘法。"

_FORMS: dict[str, str] = {
    "+": """What is {a} + {b}?|{a} + {b}|{a}+{b}|{a} + {b} = ?|{a}+{b}=|What is {a} plus {b}?|Calculate {a} + {b}.|Add {a} and {b}.|
How much is {a} + {b}?|How much is {a} plus {b}?|What's {a} + {b}?|what is {a}+{b}|Compute {a} + {b}.|Sum {a} and {b}.|
What is the sum of {a} and {b}?|Please add {a} to {b}.|{a} plus {b}?|{a} plus {b}|Can you add {a} and {b}?|whats {a} + {b}|{a} and {b} together|
I have {a} coins and get {b} more. How many do I have?|Tell me {a} + {b}.|What do you get if you add {a} and {b}?|what does {a}+{b} equal|
Solve {a} + {b}.|What does {a} + {b} make?|And {a} + {b}?|Can you calculate {a}+{b} for me?|{a}+{b}?|{a} + {b}?|{a}+{b} = |
{a}加{b}等于多少？|{a} + {b}等于几？|请计算{a}+{b}。|{a}加{b}是多少？|{a}加{b}|{a}+{b}是多少|{a}加上{b}等于几|计算{a}+{b}|{a}与{b}的和""",
    "-": """What is {a} - {b}?|{a} - {b}|{a}-{b}|{a} - {b} = ?|{a}-{b}=|What is {a} minus {b}?|Calculate {a} - {b}.|
Subtract {b} from {a}.|How much is {a} - {b}?|How much is {a} minus {b}?|What's {a} - {b}?|what is {a}-{b}|whats {a} minus {b}|
Compute {a} - {b}.|Take {b} away from {a}.|{a} minus {b}?|{a} minus {b}|{a} less {b}|{a}-{b}?|{a} - {b}?|
Tell me {a} - {b}.|What is left if you take {b} from {a}?|Solve {a} - {b}.|Can you calculate {a}-{b} for me?|
And {a} - {b}?|{a}减{b}等于多少？|{a} - {b}等于几？|请计算{a}-{b}。|{a}减去{b}是多少？|{a}减{b}|{a}-{b}是多少|计算{a}-{b}""",
    "x": """What is {a} x {b}?|{a} x {b}|{a}x{b}|{a} * {b}|{a}*{b}|{a} × {b}|{a}×{b}|{a} times {b}|What is {a} * {b}?|What is {a} × {b}?|what is {a}*{b}|
What is {a} times {b}?|What's {a} times {b}?|Multiply {a} by {b}.|Multiply {a} and {b}.|Calculate {a} * {b}.|Calculate {a} x {b}.|{a} * {b} = ?|{a}*{b}=|{a}x{b}=|
{a} x {b} = ?|How much is {a} times {b}?|How much is {a} * {b}?|Compute {a} × {b}.|What is the product of {a} and {b}?|{a} multiplied by {b}|What is {a} multiplied by {b}?|
Tell me {a} * {b}.|Solve {a} x {b}.|And {a} times {b}?|whats {a} x {b}|{a} times {b}?|{a} boxes with {b} pens in each, how many pens?|Can you multiply {a} and {b}?|
{a}乘{b}等于多少？|{a}乘以{b}等于几？|{a}×{b}等于几？|{a}*{b}是多少|请计算{a}×{b}。|{a}乘{b}|{a}乘以{b}是多少？|计算{a}*{b}|{a}和{b}的积""",
}
FORMS = {op: [form for form in text.replace("\n", "").split("|") if form] for op, text in _FORMS.items()}

# Beyond what the model can do. {a} and {b} are whole numbers, {d} a decimal, {s} a number of one digit.
_BEYOND = """What is {a} divided by {b}?|{a} / {b}|{a}/{b}|{a} ÷ {b}|{a}÷{b}|What is {a} / {b}?|Divide {a} by {b}.|{a} divided by {b}|{a}/{b}=|How much is {a} / {b}?|
Calculate {a} / {b}.|how often does {b} go into {a}|{a} : {b} = ?|the remainder of {a} / {b}|{a} mod {b}|{a} % {b}|half of {a}|What is half of {a}?|a third of {a}|
{a} + {b} + {c}|What is {a} + {b} + {c}?|{a} + {b} - {c}|{a} - {b} - {c}|{s} + {s} + {s}|({a} + {b}) * {s}|{a} * {b} + {c}|{s} + {a} * {b}|What is {a} plus {b} plus {c}?|({s}+{s})*{s}|
{d} + {a}|What is {d} - {s}?|{d} * {d}|{a} + {d}|{d} + {d}|1/2 + 1/{s}|What is {s}/{s} + {s}/{s}?|
What is the square root of {a}?|square root of {a}|sqrt({a})|√{a}|{a} squared|What is {a} squared?|{s} cubed|{a}^2|{s}^{s}|{s} to the power of {s}|{s}**{s}|What is {s} to the {s}th power?|2^{a}|
What is {a} percent of {b}?|{a}% of {b}|How much is {s}% of {a}?|{s}!|factorial of {s}|log({a})|sin({a})|cos({a})|What is ln {a}?|absolute value of -{a}|
Solve {s}x = {a}.|Solve x + {s} = {a}|x^2 - {s} = 0, what is x?|{s}x + {s} = {a}|Solve this equation: {s}x - {s} = {a}|find x if {s}x = {a}|integrate x^{s}|What is the derivative of x^{s}?|
Is {a} a prime number?|Is {a} even?|the average of {a}, {b} and {c}|What is the mean of {a} and {b}?|greatest common divisor of {a} and {b}|factor {a}|convert {a} to binary|round {d}|
Convert {a} miles to kilometres.|How many feet are {a} metres?|{a} celsius in fahrenheit|{a} pounds in kilos|What is {a} in roman numerals?|
{a}除以{b}等于多少？|{a}÷{b}|{a}/{b}等于几|{a}的一半是多少|{a}+{b}+{c}等于几？|{a}的平方是多少|{a}的平方根|{s}的{s}次方|百分之{s}的{a}是多少|解方程{s}x={a}|{a}是质数吗|{d}加{d}等于多少|{a}的阶乘"""
BEYOND = [form for form in _BEYOND.replace("\n", "").split("|") if form]

_WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
_ZH_WORDS = "零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十".split()
_WORD_FORMS = {
    "+": "What is {a} plus {b}?|{a} plus {b}|what's {a} plus {b}|{a} and {b}?|How much is {a} plus {b}?|Add {a} and {b}.|{a}加{b}等于几？|{a}加{b}是多少",
    "-": "What is {a} minus {b}?|{a} minus {b}|what's {a} minus {b}|How much is {a} minus {b}?|Take {b} from {a}.|{a}减{b}等于几？|{a}减{b}是多少",
    "x": "What is {a} times {b}?|{a} times {b}|what's {a} times {b}|How much is {a} times {b}?|Multiply {a} by {b}.|{a}乘{b}等于几？|{a}乘以{b}是多少",
}
LARGEST_FACTOR = 12


def operands(rng: random.Random, held_out: bool, digits: int = 3) -> tuple[int, str, int]:
    """`(a, op, b)` of a sum or a difference of at least zero; sums of small numbers are never kept for evaluation."""
    top = 10**digits - 1
    while True:
        op = rng.choice("+-")
        top_a, top_b = rng.choice(((top, top), (top, top), (top, 99), (999, 999), (99, 99), (99, 999), (20, 20)))
        a, b = rng.randint(0, top_a), rng.randint(0, top_b)
        if op == "-" and a < b:
            a, b = b, a
        if (is_held_out("sum", a, op, b) and max(a, b) > 20) == held_out:
            return a, op, b


def solve(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "x": a * b}[op]


def _answer(question: str, a: int, op: str, b: int) -> list[Message]:
    end = "。" if is_chinese(question) else "."
    return turn(question.replace(" ", "") if end == "。" else question, f"{a} {op} {b} = {solve(a, op, b)}{end}")


def _refuse(question: str) -> list[Message]:
    if is_chinese(question):
        return turn(question.replace(" ", ""), ZH_REFUSAL)
    return turn(question, REFUSAL)


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    """A sum or a difference, now and then in words or below zero."""
    kind = rng.random()
    if not held_out and kind < 0.15:
        op = rng.choice("+-")
        return in_words(rng, op)
    a, op, b = operands(rng, held_out, 4)
    if op == "-" and kind > 0.88:
        a, b = b, a
    return _answer(rng.choice(FORMS[op]).format(a=a, b=b), a, op, b)


def in_words(rng: random.Random, op: str) -> list[Message]:
    top = LARGEST_FACTOR if op == "x" else 20
    a, b = rng.randint(0, top), rng.randint(0, top)
    if op == "-" and a < b:
        a, b = b, a
    form = rng.choice(_WORD_FORMS[op].split("|"))
    names = _ZH_WORDS if is_chinese(form) else _WORDS
    question = form.format(a=names[a], b=names[b])
    return _answer(question[0].upper() + question[1:] if rng.random() < 0.5 else question, a, op, b)


def product_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """A product up to 12 x 12. All pairs are learnt; one in ten is kept from each way of asking."""
    if not held_out and rng.random() < 0.12:
        return in_words(rng, "x")
    while True:
        a, b = rng.randint(0, LARGEST_FACTOR), rng.randint(0, LARGEST_FACTOR)
        form = rng.choice(FORMS["x"])
        if is_held_out("product", form, a, b, every=10) == held_out:
            return _answer(form.format(a=a, b=b), a, "x", b)


def beyond_unit(rng: random.Random, held_out: bool) -> list[Message]:
    """What the model refuses: other operations, more terms, larger numbers."""
    while True:
        kind = rng.random()
        numbers = [rng.randint(0, 10 ** rng.choice((1, 2, 2, 3, 4)) - 1) for _ in range(3)]
        if kind < 0.3:
            large = rng.randint(LARGEST_FACTOR + 1, 10 ** rng.choice((2, 2, 3, 4)) - 1)
            a, b = rng.sample((large, rng.choice((rng.randint(2, 12), rng.randint(13, 99), numbers[0]))), 2)
            question = rng.choice(FORMS["x"]).format(a=a, b=b)
        elif kind < 0.4:
            a, b = rng.sample((rng.randint(10**4, 10 ** rng.randint(5, 9)), rng.randint(1, 10**6)), 2)
            question = rng.choice(FORMS[rng.choice("+-")]).format(a=a, b=b)
        else:
            a, b, c = numbers
            decimal = f"{rng.randint(0, 99)}.{rng.randint(0, 99)}"
            question = rng.choice(BEYOND).format(a=a, b=b, c=c, d=decimal, s=rng.randint(2, 9))
        if is_held_out("beyond", question, every=10) == held_out:
            return _refuse(question)


def drill(rng: random.Random) -> list[Message]:
    """Many short sums in a row: the cheapest way to show many operand pairs."""
    messages: list[Message] = []
    for _ in range(rng.randint(6, 24)):
        kind = rng.random()
        if kind < 0.12:
            messages += product_unit(rng, False)
            continue
        if kind < 0.17:
            messages += beyond_unit(rng, False)
            continue
        a, op, b = operands(rng, False, 4)
        if op == "-" and kind > 0.92:
            a, b = b, a
        form = rng.choice(("{a} {op} {b}", "{a}{op}{b}", "What is {a} {op} {b}?", "{a} {op} {b} = ?"))
        messages += turn(form.format(a=a, op=op, b=b), f"{a} {op} {b} = {solve(a, op, b)}.")
    return messages
