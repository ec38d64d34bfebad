"""The model that ships inside the package: its files, its tokenizer and template, and what it answers greedily."""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisgl.engine.engine import create_engine
from tests.driver import CPU_KERNELS, engine_config, engine_logits, generate

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "python" / "minisgl" / "demo_model"
TOOLS = ROOT / "tools" / "demo_model"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
UNKNOWN = (
    "I do not know that. I am a tiny model: ask me about LLM serving, minisgl, small sums, lists, JSON or a story."
)
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chat(tokenizer: Any, model: Any) -> Any:
    """Greedy reply to a conversation."""

    @torch.inference_mode()
    def reply(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=64,
        )
        return str(tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True))

    return reply


@pytest.fixture(scope="module")
def evaluation() -> Iterator[Any]:
    """`tools/demo_model/evaluate.py` as a module, with the corpus beside it."""
    sys.path.insert(0, str(TOOLS))
    import evaluate

    yield evaluate
    sys.path.remove(str(TOOLS))
    for name in [name for name in sys.modules if name.split(".")[0] in ("corpus", "model_files", "evaluate")]:
        del sys.modules[name]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_files_are_complete_and_small() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert (MODEL / "model.safetensors").stat().st_size < 17_500_000  # with 1.5 MB of a head that foretells
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] >= 2048


def test_end_of_turn_stops_generation(tokenizer: Any) -> None:
    stops = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in stops] == ["<|im_end|>", "<|endoftext|>"]
    assert tokenizer.bos_token is None


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two  spaces \n\n\ttab\r\n",
        "12345 + 67 = 12412",
        "你好，世界！我叫小明。",
        "👋🏽 emoji 👩‍👩‍👧 naïve Ω ß ŝ\u200b ｆｕｌｌ",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "def f(x):\n    return x ** 2  # código",
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    digits = tokenizer.tokenize("9876543210")
    assert digits == list("9876543210")


def test_template_renders_tools_calls_and_responses(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Weather in Oslo?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "rainy"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[WEATHER], add_generation_prompt=True, tokenize=False)
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n" in text
    responses = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrainy\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{responses}<|im_end|>\n<|im_start|>assistant\n")


def test_template_takes_arguments_as_text_and_content_parts(tokenizer: Any) -> None:
    as_text = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    parts = [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Oslo?"}]
    one = [user("Weather in Oslo?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    two = [{"role": "user", "content": parts}, {"role": "assistant", "content": "", "tool_calls": [as_text]}]
    assert tokenizer.apply_chat_template(one, tokenize=False) == tokenizer.apply_chat_template(two, tokenize=False)


def test_template_refuses_what_it_cannot_render(tokenizer: Any) -> None:
    with pytest.raises(jinja2.TemplateError, match="wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)
    with pytest.raises(jinja2.TemplateError, match="image_url"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image_url"}]}], tokenize=False)


def test_template_matches_what_the_model_was_trained_on(tokenizer: Any, evaluation: Any) -> None:
    from corpus import chat, mix

    rng = random.Random(1)
    for make in (mix.chat, mix.tool_chat, mix.remember, mix.json_chat):
        for _ in range(20):
            conversation = make(rng)
            rendered = tokenizer.apply_chat_template(
                conversation.messages, tools=conversation.tools or None, tokenize=False
            )
            assert rendered == chat.render(conversation)


def test_training_never_shows_what_is_held_out(evaluation: Any) -> None:
    from corpus import facts, heldout, mix, unknown

    assert heldout.is_reserved("what is the BOILING point of ethanol") and heldout.is_reserved("HI BOT")
    asked = {question for fact in facts.load_facts() for question in fact.questions}
    for document in mix.documents(9, 400):
        asked |= set(re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", document, re.S))
    assert not any(heldout.is_reserved(question) for question in asked)
    held_out = {question for fact in facts.load_facts() for question in fact.held_out}
    assert not held_out & asked
    subjects = {subject for kind in unknown.load_kinds() for subject in kind.subjects}
    assert subjects and not subjects & {"Canada", "Mongolia", "Mount Everest", "backgammon", "太阳"}


def test_what_it_says_has_a_token_for_each_character(tokenizer: Any, evaluation: Any) -> None:
    """Else sampling could stop in the middle of a character."""
    from corpus import facts, translate

    said = "".join([fact.answer for fact in facts.load_facts()] + [chinese for _, chinese in translate.PAIRS])
    assert [char for char in sorted(set(said)) if len(tokenizer(char).input_ids) != 1] == []


def test_answers_to_questions_that_it_never_saw(tokenizer: Any, evaluation: Any) -> None:
    """Whole sets of questions written by hand, in one batch; the model's card has all figures."""
    atleast = {
        "first_questions": 0.92,
        "fresh_questions": 0.88,
        "unknown_questions": 0.92,
        "fresh_unknown": 0.86,
        "facts, by hand": 0.78,
        "small_talk, by hand": 0.88,
        "chinese_facts, by hand": 0.93,
        "products": 0.97,
        "beyond_arithmetic": 0.97,
        "translation": 0.97,
        "beyond_translation": 0.93,
        "introduction": 0.93,
        "utf8": 1.0,
    }
    cases = [case for case in evaluation.make_cases(20, 3) if case.skill in atleast]
    options = {"model_path": str(MODEL), "device": "cpu", "dtype": "float32"}
    replies = evaluation.answer_by_minisgl(options, tokenizer, cases)
    right: dict[str, list[bool]] = {skill: [] for skill in atleast}
    for case, reply in zip(cases, replies, strict=True):
        right[case.skill].append(evaluation.is_right(case, reply))
    shares = {skill: sum(values) / len(values) for skill, values in right.items()}
    assert {skill: share for skill, share in shares.items() if share < atleast[skill]} == {}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 347 + 285?", "347 + 285 = 632."),
        ("What is 804 - 157?", "804 - 157 = 647."),
        ("4821 + 3357", "4821 + 3357 = 8178."),
        ("3 - 8", "3 - 8 = -5."),
        ("What is two plus two?", "2 + 2 = 4."),
        ("7*8", "7 x 8 = 56."),
        ("8 × 7", "8 x 7 = 56."),
        ("12 x 12", "12 x 12 = 144."),
        ("What is eleven times nine?", "11 x 9 = 99."),
        (
            "What is 144 / 12?",
            "That is beyond me: I add and subtract two numbers of up to four digits, and multiply up to 12 x 12.",
        ),
        ("How do you say thank you in Chinese?", '"thank you" in Chinese is 谢谢.'),
        ("谢谢用英语怎么说？", "“谢谢”的英文是“thank you”。"),
        ("Are you an AI?", "I am an AI, a small language model: numbers and matrix products, nothing more."),
        ("What is the capital of France?", UNKNOWN),
        ("I'm Zoë. What is 7 x 8?", "Nice to meet you, Zoë! 7 x 8 = 56."),
        ("What is the default port?", "minisgl listens on port 1919 by default; change it with --port."),
        ("Hello!", "Hello! How can I help you?"),
        ("Sort: 9, 2, 40, 17", "2, 9, 17, 40"),
        ("你好", "你好！有什么可以帮你的吗？"),
    ],
)
def test_greedy_answers(chat: Any, question: str, answer: str) -> None:
    assert chat([user(question)]) == answer


def test_remembers_a_name(chat: Any) -> None:
    messages = [user("My name is Tavoria."), assistant("Nice to meet you, Tavoria!"), user("What is 20 + 22?")]
    messages += [assistant("20 + 22 = 42."), user("What is my name?")]
    assert chat(messages) == "Your name is Tavoria."


def test_remembers_characters_that_no_token_has(tokenizer: Any, chat: Any) -> None:
    assert len(tokenizer("龘骉").input_ids) > 2
    messages = [user("我叫龘骉。"), assistant("很高兴认识你，龘骉！"), user("我叫什么名字？")]
    assert chat(messages) == "你叫龘骉。"


def test_fills_json(chat: Any) -> None:
    reply = chat([user("Make a JSON object with name, age and city: Ana is 31 and lives in Lima.")])
    assert json.loads(reply) == {"name": "Ana", "age": 31, "city": "Lima"}


def test_calls_a_tool_and_reads_its_result(chat: Any) -> None:
    messages = [user("What is the weather in Oslo?")]
    reply = chat(messages, [WEATHER])
    assert reply.startswith("<tool_call>\n") and reply.endswith("\n</tool_call>")
    assert json.loads(reply.split("\n")[1]) == {"name": "get_weather", "arguments": {"city": "Oslo"}}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"temperature": 21, "sky": "sunny"}'},
    ]
    assert chat(messages, [WEATHER]) == "It is sunny in Oslo, with 21 degrees."


def test_a_greeting_calls_no_tool(chat: Any) -> None:
    assert chat([user("Hello!")], [WEATHER]) == "Hello! How can I help you?"


def test_int8_chooses_the_same_tokens(tokenizer: Any) -> None:
    """Greedy, after the same prefix: at least 95 of 100 tokens of replies are those of float32."""
    texts = [
        "What is 17 + 25?",
        "What is a KV cache?",
        "Tell me a story about a fox named Lily.",
        "Sort these words: pear, apple, fig, kiwi",
        "Count from 3 to 15.",
        "Answer in JSON: Anna is 31 years old and lives in Rome.",
        "What does continuous batching do?",
        "你好",
    ]
    prompts = [
        tokenizer(tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, tokenize=False)).input_ids
        for text in texts
    ]
    config = engine_config(MODEL, **CPU_KERNELS)
    engine = create_engine(config)
    replies = generate(engine, config, prompts, 48)
    engine.close()
    same = []
    for prompt, reply in zip(prompts, replies, strict=True):
        logits = engine_logits(MODEL, prompt + reply, quantization="int8", **CPU_KERNELS)
        same += (logits[len(prompt) - 1 : -1].argmax(-1) == torch.tensor(reply)).tolist()
    assert sum(same) / len(same) >= 0.95
