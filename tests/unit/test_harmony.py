"""gpt-oss's channels: read as OpenAI's own library reads them, cut anywhere, and in every dialect of the API."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from openai_harmony import HarmonyEncoding, HarmonyEncodingName, Message, Role, load_harmony_encoding
from tokenizers import AddedToken, Tokenizer

from minisgl.config.chat import HARMONY, read_ends, visible_tokens
from minisgl.core import FinishReason, Grammar, SamplingParams
from minisgl.grammar.source import VocabularyConfig
from minisgl.grammar.store import GrammarStore
from minisgl.message.messages import ChatPrompt, UserReply
from minisgl.parser.harmony import MAX_HEADER, HarmonyParser
from minisgl.parser.parts import Part
from minisgl.server.answers.messages import MessagesRenderer
from minisgl.server.answers.openai import ChatRenderer
from minisgl.server.answers.renderer import new_assembler, with_grammar
from minisgl.server.answers.responses import ResponsesRenderer
from minisgl.server.bodies.chat import GenerationRequest
from minisgl.server.bodies.content import ToolUse
from minisgl.server.bodies.responses import parse_responses
from minisgl.tokenizer.tokenize import HFTextCodec
from minisgl.utils.fields import Fields
from tests.tokenizers_fixture import make_byte_level

FUNCTIONS = ("get_weather", "get_time", "math.add")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HarmonyEncoding]:
    """OpenAI's library, with the vocabulary that another package brings."""
    folder = tmp_path_factory.mktemp("o200k")
    packed = Path(str(distribution("bpe-openai").locate_file("bpe_openai/data/o200k_base.tiktoken.gz")))
    (folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


Told = list[tuple[str, str]]


def told(*texts: str, in_answer: bool = False) -> Told:
    """What comes, in order: ("reasoning" | "text" | name of a function, text)."""
    parser = HarmonyParser(FUNCTIONS, in_answer=in_answer)
    parts = [part for text in texts for part in parser.push(text)] + parser.finish()
    gathered: Told = []
    for part in parts:
        if part.name is not None or not gathered or (part.kind != "call" and part.kind != gathered[-1][0]):
            gathered.append((part.name or part.kind, ""))
        gathered[-1] = (gathered[-1][0], gathered[-1][1] + part.text)
    return gathered


def add(expected: Told, kind: str, text: str) -> None:
    """One more message: between two of one kind there is an empty line."""
    if expected and expected[-1][0] == kind and kind not in FUNCTIONS:
        text = f"{expected.pop()[1]}\n\n{text}"
    expected.append((kind, text))


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: "<|" not in text)
ARGUMENTS = st.dictionaries(WORDS, WORDS | st.integers() | st.lists(WORDS, max_size=2), max_size=2).map(json.dumps)
MESSAGES = st.lists(
    st.tuples(st.just("reasoning"), st.sampled_from(["analysis"]), WORDS)
    | st.tuples(st.just("text"), st.sampled_from(["final", "commentary"]), WORDS)
    | st.tuples(st.sampled_from(FUNCTIONS), st.sampled_from(["commentary", "analysis"]), ARGUMENTS),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(MESSAGES, st.lists(st.integers(0, 400), max_size=8), st.booleans())
def test_what_the_library_writes_is_read_as_it_is_meant(
    stock: HarmonyEncoding, messages: list[tuple[str, str, str]], cuts: list[int], constrained: bool
) -> None:
    tokens: list[int] = []
    for kind, channel, text in messages:
        message = Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)
        if kind in FUNCTIONS:
            message = message.with_recipient(f"functions.{kind}")
            message = message.with_content_type("<|constrain|>json" if constrained else "json")
        tokens += stock.render(message)
    output = stock.decode_utf8(tokens).removeprefix("<|start|>assistant")  # with which the prompt ends
    expected: Told = []
    for kind, _, text in messages:
        add(expected, kind, text)
    bounds = [0, *sorted(min(cut, len(output)) for cut in cuts), len(output)]
    assert told(output) == expected
    assert told(*output) == expected
    assert told(*(output[start:end] for start, end in pairwise(bounds))) == expected


OUTPUTS = [
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
    "<|channel|>analysis<|message|>f?<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{}<|call|>",
    '<|channel|>commentary to=functions.math.add <|constrain|>json<|message|>{"a": "ü🙂"}<|call|>',
    ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
    "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>There.<|return|>",
]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_are_read_as_the_library_reads_them(stock: HarmonyEncoding, output: str) -> None:
    tokens = stock.encode(output, allowed_special="all")
    expected: Told = []
    for message in stock.parse_messages_from_completion_tokens(tokens, Role.ASSISTANT):
        text = "".join(getattr(content, "text", "") for content in message.content)
        kind = (message.recipient or "").removeprefix("functions.")
        add(expected, kind or ("reasoning" if message.channel == "analysis" else "text"), text)
    assert told(output) == told(*output) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*visible_tokens(HARMONY), "assistant", " to=", "functions.get_time", "analysis", "final", "{", "}"]
        )
        | st.sampled_from(['"', "\\", " ", "\n", "<|", "to", "word", "x" * MAX_HEADER]),
        max_size=12,
    ),
    st.lists(st.integers(0, 80), max_size=8),
)
def test_the_result_does_not_depend_on_the_cuts(fragments: list[str], cuts: list[int]) -> None:
    text = "".join(fragments)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for in_answer in (False, True):
        whole = told(text, in_answer=in_answer)
        assert told(*text, in_answer=in_answer) == whole
        pieces = [text[start:end] for start, end in pairwise(bounds)]
        assert told(*pieces, in_answer=in_answer) == whole


def test_each_piece_comes_as_soon_as_it_is_there() -> None:
    parser = HarmonyParser(FUNCTIONS)
    assert parser.push("<|channel|>analysis<|mess") == []
    assert parser.push("age|>one ") == [Part("reasoning", "one")]
    assert parser.push("two<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather ") == [
        Part("reasoning", " two")
    ]
    assert parser.push("<|constrain|>json<|message|>") == [Part("call", "", "get_weather")]
    assert parser.push('{"city": "Pa') == [Part("call", '{"city": "Pa')]
    assert parser.push('ris"}') == [Part("call", 'ris"}')]
    assert parser.finish() == []


TOOLS = ToolUse(({"type": "function", "function": {"name": "get_weather"}},))
CONFIG: Any = SimpleNamespace(tool_call_parser=HARMONY, reasoning_parser=HARMONY)
OUTPUT = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'
)


def replies(pieces: list[str]) -> list[UserReply]:
    """The last token, `<|call|>`, ends the output, and is no text."""
    made = [UserReply(1, text, b"", 5, index + 1, 0) for index, text in enumerate(pieces)]
    return [*made, UserReply(1, "", b"", 5, len(pieces) + 1, 0, finish_reason=FinishReason.STOP)]


@pytest.mark.parametrize("pieces", [[OUTPUT], list(OUTPUT)], ids=["whole", "cut"])
def test_every_dialect_has_reasoning_answer_and_calls(pieces: list[str]) -> None:
    given = replies(pieces)
    request = GenerationRequest((ChatPrompt([]),), SamplingParams(), tools=TOOLS)
    chat = ChatRenderer("m", request, lambda: new_assembler(request, CONFIG))
    chat.last[0] = given[-1]
    body = ChatCompletion.model_validate(chat.body([given]), strict=True)
    (choice,) = body.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    assert choice.message.model_extra == {"reasoning_content": "Hm."}
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function" and call.function.arguments == '{"city": "Paris"}'
    assert body.usage is not None and body.usage.completion_tokens_details is not None
    assert 0 < (body.usage.completion_tokens_details.reasoning_tokens or 0) <= given[-1].num_output_tokens
    streaming, state = ChatRenderer("m", request, lambda: new_assembler(request, CONFIG)), ChatCompletionStreamState()
    for reply in given:
        for chunk in streaming.chunk(0, reply):
            state.handle_chunk(ChatCompletionChunk.model_validate(chunk, strict=True))
    (summed,) = state.get_final_completion().choices
    assert (summed.message.content, summed.finish_reason) == ("I look.", "tool_calls")
    assert summed.message.tool_calls and summed.message.tool_calls[0].function.arguments == '{"city": "Paris"}'
    messages = MessagesRenderer("m", request, lambda: new_assembler(request, CONFIG))
    events = [event for reply in given for event in messages.chunk(0, reply)]
    messages.last[0] = given[-1]
    blocks = [
        (block["type"], block.get("thinking") or block.get("text") or block.get("input"))
        for block in messages.finished()["content"]
    ]
    assert blocks == [("thinking", "Hm."), ("text", "I look."), ("tool_use", {"city": "Paris"})]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == '{"city": "Paris"}'
    sent = json.dumps({"input": "hello", "tools": [{"type": "function", "name": "get_weather"}]}).encode()
    asked = parse_responses(sent, {})
    responses = ResponsesRenderer("m", asked, lambda: new_assembler(asked, CONFIG))
    responses.last[0] = given[-1]
    output = Response.model_validate(responses.body([given])).output
    assert [item.type for item in output] == ["reasoning", "message", "function_call"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that holds the markers for special tokens, as gpt-oss's does, and the ends that its files name."""
    path = make_byte_level(tmp_path_factory.mktemp("harmony"))
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in visible_tokens(HARMONY)])
    tokenizer.save(str(path / "tokenizer.json"))
    ends = [tokenizer.token_to_id(token) for token in ("<|return|>", "<|call|>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


def test_markers_reach_the_parser_and_ends_end_the_output(model: Path) -> None:
    codec = HFTextCodec(str(model), visible_tokens(HARMONY, HARMONY))
    text = f"{OUTPUT}<|call|>"
    ids = codec.encode(text, special=False)
    assert codec.decode(ids) == text
    assert {ids[-1], *codec.encode("<|return|>", special=False)} <= {*read_ends(model, Fields({}, ""), 1000)}


@pytest.mark.parametrize("tools", [None, TOOLS, replace(TOOLS, required=True)], ids=["answer", "either", "call"])
def test_a_grammar_is_about_the_final_channel_and_calls(model: Path, tools: ToolUse | None) -> None:
    prompt, grammar = ChatPrompt([{"role": "assistant", "content": ""}]), Grammar("json", '{"const": {"a": 1}}')
    made = with_grammar(GenerationRequest((prompt,), SamplingParams(grammar=grammar), tools=tools), CONFIG)
    goes_on = replace(made, prompts=(msgspec.structs.replace(prompt, continue_final=True),))
    goes_on = with_grammar(replace(goes_on, params=SamplingParams(grammar=grammar), tools=None), CONFIG)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ends = tuple(tokenizer.token_to_id(token) for token in ("<|return|>", "<|call|>"))
    store = GrammarStore(VocabularyConfig(str(model), tokenizer.get_vocab_size(), ends))

    def accepts(request: GenerationRequest, text: str) -> bool:
        assert request.params.grammar is not None
        matcher = store.request(request.params.grammar).result(60).matcher.deep_copy()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    thought, begin = "<|channel|>analysis<|message|>So <b>?\n<|end|>", "<|start|>assistant"
    answer, call = (
        '<|channel|>final<|message|>{"a":1}',
        OUTPUT[OUTPUT.rindex("<|channel|>commentary") :].replace('{"city": "Paris"}', "{}"),
    )
    try:
        for before in ("", thought + begin):
            assert accepts(made, before + answer) == (tools is None or not tools.required)
            assert accepts(made, before + call) == (tools is not None)
            assert not accepts(made, before + '{"a":1}') and not accepts(made, before + answer.replace("1", "2"))
        assert not accepts(made, thought)
        assert accepts(goes_on, '{"a":1}') and not accepts(goes_on, answer)
    finally:
        store.close()
