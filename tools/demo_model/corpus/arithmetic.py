"""Addition and subtraction of numbers of up to three digits; one operand pair in twenty is kept for evaluation."""

# Sentence forms and word lists are easier to read and to compare on one line.
# ruff: noqa: E501

import random

from .chat import Message, is_held_out, turn

_FORMS: dict[str, str] = {
    "+": """What is {a} + {b}?|{a} + {b}|{a}+{b}|{a} + {b} = ?|{a}+{b}=|What is {a} plus {b}?|Calculate {a} + {b}.|Add {a} and {b}.|
How much is {a} + {b}?|How much is {a} plus {b}?|What's {a} + {b}?|what is {a}+{b}|Compute {a} + {b}.|Sum {a} and {b}.|
What is the sum of {a} and {b}?|Please add {a} to {b}.|{a} plus {b}?|Can you add {a} and {b}?|
I have {a} coins and get {b} more. How many do I have?|Tell me {a} + {b}.|What do you get if you add {a} and {b}?|
Solve {a} + {b}.|What does {a} + {b} make?|And {a} + {b}?|{a}加{b}等于多少？|{a} + {b}等于几？|请计算{a}+{b}。|{a}加{b}是多少？""",
    "-": """What is {a} - {b}?|{a} - {b}|{a}-{b}|{a} - {b} = ?|{a}-{b}=|What is {a} minus {b}?|Calculate {a} - {b}.|
Subtract {b} from {a}.|How much is {a} - {b}?|How much is {a} minus {b}?|What's {a} - {b}?|what is {a}-{b}|
Compute {a} - {b}.|Take {b} away from {a}.|What is the difference between {a} and {b}?|{a} minus {b}?|
I have {a} coins and lose {b}. How many are left?|Tell me {a} - {b}.|What is left if you take {b} from {a}?|Solve {a} - {b}.|
And {a} - {b}?|{a}减{b}等于多少？|{a} - {b}等于几？|请计算{a}-{b}。|{a}减去{b}是多少？""",
}
FORMS = {op: [form for form in text.replace("\n", "").split("|") if form] for op, text in _FORMS.items()}


def operands(rng: random.Random, held_out: bool) -> tuple[int, str, int]:
    """`(a, op, b)` with a result of at least zero."""
    while True:
        op = rng.choice("+-")
        top_a, top_b = rng.choice(((999, 999), (999, 999), (999, 99), (99, 99), (99, 999), (20, 20)))
        a, b = rng.randint(0, top_a), rng.randint(0, top_b)
        if op == "-" and a < b:
            a, b = b, a
        if is_held_out("sum", a, op, b) == held_out and not (held_out and max(a, b) < 10):
            return a, op, b


def solve(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b


def unit(rng: random.Random, held_out: bool) -> list[Message]:
    a, op, b = operands(rng, held_out)
    question = rng.choice(FORMS[op]).format(a=a, b=b)
    if any("\u4e00" <= char for char in question):
        return turn(question.replace(" ", ""), f"{a} {op} {b} = {solve(a, op, b)}。")
    return turn(question, f"{a} {op} {b} = {solve(a, op, b)}.")


def drill(rng: random.Random) -> list[Message]:
    """Many short sums in a row: the cheapest way to show many operand pairs."""
    messages: list[Message] = []
    for _ in range(rng.randint(6, 24)):
        a, op, b = operands(rng, False)
        form = rng.choice(("{a} {op} {b}", "{a}{op}{b}", "What is {a} {op} {b}?", "{a} {op} {b} = ?"))
        messages += turn(form.format(a=a, op=op, b=b), f"{a} {op} {b} = {solve(a, op, b)}.")
    return messages
