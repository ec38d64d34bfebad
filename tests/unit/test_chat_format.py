"""What a chat template tells of a model, and what its tokenizer lets through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from minisgl.config.chat import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    choose_parsers,
    read_chat_template,
    read_template_file,
    visible_tokens,
)
from minisgl.config.locate import DEMO_MODEL
from minisgl.errors import ConfigError
from minisgl.message.messages import ChatPrompt, DetokenizeMsg, StreamStart, pack_ids
from minisgl.parser import tools
from minisgl.tokenizer.detokenize import Detokenizer
from minisgl.tokenizer.tokenize import HFTextCodec
from tests.tokenizers_fixture import make_byte_level

# The lines of the families' published templates that tell their formats.
QWEN3 = """For each function call, return a json object with function name and arguments within <tool_call></tool_call>
{%- if '</think>' in content %}...{%- if enable_thinking is defined and enable_thinking is false %}<think>"""
LLAMA = """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
{{- "<|python_tag|>" + tool_call.name + ".call(" }}"""
DEEPSEEK = "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'}}{% if '</think>' in content %}"


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("", None, None),
        (QWEN3, "hermes", "qwen3"),
        ("<tool_call>\n<function=example_function_name>", None, None),
        ("<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\n", "qwen3_coder", None),
        (LLAMA, "llama3_json", None),
        ('"[TOOL_CALLS] [" ~ tool_calls', "mistral", None),
        ("[func_name1(params_name1=params_value1, params_name2=params_value2...)]", "pythonic", None),
        (DEEPSEEK, None, "deepseek_r1"),
        # gpt-oss, Qwen3.5, Seed-OSS, Ministral 3, Magistral.
        (
            'assistant<|channel|>analysis<|message|>" + m.thinking + "<|end|>" }} "<|channel|>commentary "',
            "harmony",
            "harmony",
        ),
        (
            "<function=example_function_name>\n<parameter=example_parameter_1> '<think>\n\n</think>",
            "qwen3_coder",
            "qwen3",
        ),
        (
            "set toolcall_begin_token = '<seed:tool_call>' set think_begin_token = '<seed:think>'",
            "seed_oss",
            "seed_oss",
        ),
        ("'[TOOL_CALLS]' + tool.name + '[ARGS]' + arguments", "mistral", None),
        ("'[THINK]' + block['thinking'] + '[/THINK]' [TOOL_CALLS]", "mistral", "magistral"),
        # OLMo 3, LFM2 and LFM2.5, Granite 3 and 4, GLM-4 and 4.5, Phi-4-mini, SmolLM3, Gemma 3, Ernie 4.5.
        ("<functions>' + tools + '</functions>' '<function_calls>' '<|im_start|>assistant\n<think>'", "olmo3", "qwen3"),
        ("List of tools: <|tool_list_start|>[", "lfm2", None),
        ("'<|im_start|>system' 'List of tools: ['", "lfm2", None),
        ("respond only with <|tool_call|> followed by a JSON list of tools", "granite", None),
        ("return a json object within <tool_call></tool_call> <|start_of_role|>", "hermes", None),
        ("'<|system|>\n# 可用工具' '<|observation|>\n'", "glm4", None),
        (
            "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key> # 可用工具 <|observation|> </think>",
            None,
            "qwen3",
        ),
        ("'<|tool|>' + message['tools'] + '<|/tool|>'", "phi4_mini", None),
        ("within <tool_call></tool_call> XML tags '<think>\n\n</think>\n' /no_think", "hermes", "qwen3"),
        ("'<start_of_turn>model\n'", None, None),
        ("'<|tool_call>call:' + function['name'] + '{' ... '<|channel>thought\n' '<|\"|>'", "gemma4", "gemma4"),
        ("'Assistant: ' + message['content'] + eos_token", None, None),
        (read_chat_template(DEMO_MODEL), "hermes", None),
    ],
)
def test_formats_are_told_by_the_template(template: str, tools: str | None, reasoning: str | None) -> None:
    assert choose_parsers(None, None, template) == (tools, reasoning)
    assert choose_parsers("none", "none", template) == (None, None)
    assert choose_parsers("pythonic", "qwen3", template) == ("pythonic", "qwen3")
    assert choose_parsers("harmony", None, template) == choose_parsers("none", "harmony", template) == ("harmony",) * 2


def test_every_name_has_a_parser() -> None:
    assert set(TOOL_PARSERS) == set(tools.TOOL_PARSERS)
    for name, reasoning in REASONING_PARSERS.items():
        when, opening, closing = reasoning.split()
        tokens = {opening.removesuffix("thought"), closing}
        assert when in ("optional", "always") and (name == "harmony" or tokens <= {*visible_tokens(name)})
    for name, parser in tools.TOOL_PARSERS.items():
        assert {marker for marker in parser.markers if not marker.isalpha()} <= {*visible_tokens(name, None)}


def test_templates_are_found_wherever_models_keep_them(tmp_path: Path) -> None:
    named: Any = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}, 5]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_chat_template(tmp_path) == "one\ntwo"
    (tmp_path / "chat_template.jinja").write_text("three")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("four")
    assert set(read_chat_template(tmp_path).split("\n")) == {"one", "two", "three", "four"}
    assert read_chat_template(tmp_path / "nowhere") == ""


def test_a_template_of_the_user_s(tmp_path: Path) -> None:
    codec = HFTextCodec(str(make_byte_level(tmp_path)), (), "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert codec.render_chat(ChatPrompt(messages=[{"role": "user", "content": "x"}])) == "[x]"
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"chat_template": "{{ 'a' }}"}))
    assert read_template_file(str(file)) == "{{ 'a' }}"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jinja", b"{% for m in messages %}", r"line 1: Unexpected end of template"),
        ("t.jinja", b"a\n{{ x y }}", r"line 2: expected token 'end of print statement'"),
        ("t.jinja", b" \n", "there is no template in it"),
        ("t.jinja", b"\xff\xfe", "codec can't decode"),
        ("t.jinja", None, "No such file"),
        (".", None, "Is a directory"),
        ("t.json", b"{", "cannot read"),
        ("t.json", b"{}", "there is no template in it"),
        ("t.json", b'{"chat_template": ["x"]}', "chat_template must be a string"),
        ("t.json", b'{"chat_template": "{% if %}"}', "line 1: Expected an expression"),
    ],
)
def test_a_template_that_is_none_is_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^--chat-template {tmp_path / name}: .*{says}") as caught:
        read_template_file(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A tokenizer that holds markers for special tokens, as Mistral's and Llama's do."""
    path = make_byte_level(tmp_path / "marked")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("[TOOL_CALLS]", "<s>")])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_markers_that_are_special_tokens_are_text(marked: Path) -> None:
    text = '<s>Hi [TOOL_CALLS]f{"ä": 1}<|im_end|>'
    plain, seeing = HFTextCodec(str(marked)), HFTextCodec(str(marked), visible_tokens("mistral"))
    ids = plain.encode(text, special=False)
    assert plain.decode(ids) == 'Hi f{"ä": 1}'
    for codec, expected in ((plain, 'Hi f{"ä": 1}'), (seeing, 'Hi [TOOL_CALLS]f{"ä": 1}')):
        assert codec.decode(ids) == expected
        detokenizer = Detokenizer(codec)
        shown = ""
        start: StreamStart | None = StreamStart(2, (), pack_ids(ids[:3]))
        for token in ids[3:]:
            reply, _ = detokenizer.detokenize(DetokenizeMsg(7, pack_ids([token]), start=start))
            assert reply is not None
            assert reply.prompt_end == (codec.decode(ids[:3]) if start else "")
            shown, start = shown + reply.text, None
        assert codec.decode(ids[:3]) + shown == expected
