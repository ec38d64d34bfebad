"""Measure each skill on held-out prompts: `python tools/demo_model/evaluate.py --model python/minisgl/demo_model`.

Greedy answers of the exported checkpoint, through transformers, on a CPU or a GPU, or with --minisgl through this
project's engine. An answer counts when it is right
as a whole: the same text, the same JSON value, the same tool call. Stories count when they are whole and have the
hero and the name that were asked for. The questions of `heldout` count when the answer has one of the parts that are
accepted there.
"""

import argparse
import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpus import arithmetic, facts, heldout, mix, stories, translate, unknown
from corpus.chat import Conversation, Message, Tool, render_calls, user
from model_files import DEFAULT_MODEL_DIR
from transformers import AutoModelForCausalLM, AutoTokenizer

SKILLS = {
    "first_questions": "What a newcomer asks first, written by hand",
    "unknown_questions": "Says that it does not know, 100 subjects written by hand",
    "fresh_questions": "What a newcomer asks first, a second set not seen before the last training",
    "fresh_unknown": "Says that it does not know, a second set likewise",
    "arithmetic": "Addition and subtraction, 1 to 4 digits, unseen operand pairs",
    "products": "Multiplication up to 12 x 12, unseen ways of asking",
    "beyond_arithmetic": "Refuses division, larger products, more terms …",
    "translation": "Everyday words between English and Chinese, unseen ways of asking",
    "beyond_translation": "Refuses other languages, words and sentences",
    "introduction": "A name and a question in one message, unseen names",
    "recall": "Recall of what the user said, unseen names and values",
    "recall_long": "The same after 500 to 1,500 tokens of other talk",
    "json": "JSON from a sentence",
    "json_system": "JSON when the system prompt asks for it",
    "chinese_json": "JSON from a Chinese sentence",
    "tool_call": "Tool calls, mostly of made-up tools",
    "tool_reply": "The sentence after a tool's result",
    "tool_none": "No call when no tool fits or none is needed",
    "facts": "Facts on serving and minisgl, unseen frames and openings",
    "facts, by hand": "Facts, unseen questions written by hand",
    "small_talk": "Small talk, unseen openings",
    "small_talk, by hand": "Small talk, unseen phrasings written by hand",
    "chinese_facts": "Chinese facts and small talk, unseen frames",
    "chinese_facts, by hand": "Chinese, unseen phrasings written by hand",
    "unknown": "Says that it does not know, unseen subjects",
    "sorting": "Sorting 3 to 7 words or numbers, unseen lists",
    "reversing": "Reversing 3 to 7 items",
    "counting": "Counting up, down and in steps",
    "copying": "Copying words, codes and lists",
    "lists": "First, last, largest, number of items",
    "stories": "Stories with the hero and the name asked for",
    "requests": "Declines to write code and texts, gives its poem, unseen requests",
    "utf8": "No broken character, sampled at the default temperature",
}
# Written by hand, one by one.
BY_HAND = ("first_questions", "unknown_questions", "fresh_questions", "fresh_unknown")
REFUSALS = {
    "UNKNOWN": (unknown.ANSWER, unknown.ZH_ANSWER),
    "SUMS": (arithmetic.REFUSAL, arithmetic.ZH_REFUSAL),
    "WORDS": (translate.REFUSAL, translate.ZH_REFUSAL),
}


@dataclass(frozen=True)
class Case:
    """One prompt and the answer that is expected, or parts of which an answer needs one."""

    skill: str
    messages: list[Message]
    tools: list[Tool]
    expected: str
    accepted: tuple[str, ...] = ()


def make_cases(per_skill: int, seed: int) -> list[Case]:
    """`per_skill` held-out cases of each skill, and every held-out question written by hand."""
    cases = []
    for skill in SKILLS:
        if skill.endswith("by hand") or skill in BY_HAND:
            continue
        rng = random.Random(f"{seed}/{skill}")
        for _ in range(per_skill):
            cases.append(_case(skill, mix.held_out_case(skill, rng)))
    refusals = tuple(text for texts in REFUSALS.values() for text in texts)
    for first, unknowns, fresh in zip(BY_HAND[::2], BY_HAND[1::2], (False, True), strict=True):
        for question, accepted in heldout.first_questions(fresh):
            parts = tuple(text for part in accepted for text in REFUSALS.get(part, (part,)))
            cases.append(Case(first, [user(question)], [], "x" * 160, parts))
        for question in heldout.unknown_questions(fresh):
            cases.append(Case(unknowns, [user(question)], [], "x" * 160, refusals))
    for pool, question, answer in facts.held_out_cases():
        cases.append(Case(f"{pool}, by hand", [user(question)], [], answer))
    return cases


def _case(skill: str, conversation: Conversation) -> Case:
    *before, last = conversation.messages
    return Case(skill, before, conversation.tools, render_calls(last))


def parse(text: str) -> Any:
    """JSON, tool calls with their JSON read, or the bare text."""
    calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.S)
    try:
        return [json.loads(item) for item in calls] if calls else json.loads(text)
    except ValueError:
        return text


def is_right(case: Case, reply: str) -> bool:
    if case.skill == "utf8":
        return "\ufffd" not in reply
    if case.accepted:
        return any(part.lower() in reply.lower() for part in case.accepted)
    if case.expected.startswith("Once upon a time"):
        return stories.check(case.messages[-1]["content"], reply)
    if "json" in case.skill or case.skill == "tool_call":
        return bool(parse(reply) == parse(case.expected))
    return reply == case.expected


def render(tokenizer: Any, cases: list[Case]) -> list[str]:
    return [
        tokenizer.apply_chat_template(c.messages, tools=c.tools or None, add_generation_prompt=True, tokenize=False)
        for c in cases
    ]


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, cases: list[Case], batch: int) -> list[str]:
    """Greedy replies, in the order of `cases`; batches are left-padded."""
    prompts = render(tokenizer, cases)
    order = sorted(range(len(cases)), key=lambda i: (cases[i].skill == "utf8", len(prompts[i]), len(cases[i].expected)))
    replies = [""] * len(cases)
    sampled = sum(case.skill == "utf8" for case in cases)
    greedy = len(cases) - sampled
    torch.manual_seed(1)
    bounds = [*range(0, greedy, batch), *range(greedy, len(cases), batch), len(cases)]
    for start, end in itertools.pairwise(bounds):
        members = order[start:end]
        inputs = tokenizer([prompts[i] for i in members], return_tensors="pt", padding=True, padding_side="left")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        longest = max(len(tokenizer(cases[i].expected).input_ids) for i in members) + 12
        greedily = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = model.generate(**inputs, max_new_tokens=longest, **({} if start >= greedy else greedily))
        for i, ids in zip(members, out[:, inputs["input_ids"].size(1) :], strict=True):
            replies[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return replies


def answer_by_minisgl(options: dict[str, Any], tokenizer: Any, cases: list[Case]) -> list[str]:
    """The same through `LLM`, which batches on its own."""
    from minisgl import LLM, SamplingParams

    prompts = render(tokenizer, cases)
    heat = {"utf8": 0.3}
    params = [SamplingParams(len(tokenizer(c.expected).input_ids) + 12, heat.get(c.skill, 0.0)) for c in cases]
    with LLM(**options) as llm:
        outputs = llm.generate([tokenizer(prompt).input_ids for prompt in prompts], params)
    return [tokenizer.decode(output.token_ids, skip_special_tokens=True) for output in outputs]


def report(cases: list[Case], replies: list[str], show_failures: int) -> str:
    """A Markdown table of the share of right answers for each skill; prints some failures before it."""
    lines = ["| skill | cases | right |", "|---|---:|---:|"]
    for skill, title in SKILLS.items():
        members = [i for i, case in enumerate(cases) if case.skill == skill]
        if not members:
            continue
        wrong = [i for i in members if not is_right(cases[i], replies[i])]
        for i in wrong[:show_failures]:
            asked = cases[i].messages[-1]["content"]
            expected = " | ".join(cases[i].accepted) or cases[i].expected
            print(f"[{skill}] {asked!r}\n    expected {expected!r}\n    got      {replies[i]!r}")
        share = 100.0 * (len(members) - len(wrong)) / len(members)
        lines.append(f"| {title} | {len(members)} | {share:.1f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL_DIR)
    parser.add_argument("--cases", type=int, default=200, help="of each skill")
    parser.add_argument("--skills", nargs="*", choices=SKILLS, default=list(SKILLS), help="only these")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--show-failures", type=int, default=0, help="of each skill")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--minisgl", action="store_true", help="through this project's engine, with --dtype")
    parser.add_argument("--quantization", choices=["int8"], help="with --minisgl")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    cases = [case for case in make_cases(args.cases, args.seed) if case.skill in args.skills]
    if args.minisgl:
        options = {"dtype": args.dtype, "quantization": args.quantization, "device": args.device}
        replies = answer_by_minisgl({"model_path": str(args.model), **options}, tokenizer, cases)
    else:
        dtype = getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
        replies = answer(model, tokenizer, cases, args.batch)
    print(report(cases, replies, args.show_failures))


if __name__ == "__main__":
    main()
