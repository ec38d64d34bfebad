"""Options: where they come from, which wins, and how errors read."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from minisgl import config
from minisgl.config.args import ServerArgs, args_from_options, make_parser, parse_args
from minisgl.config.draft import longest_draft
from minisgl.env import VARIABLES
from minisgl.errors import ConfigError


def test_defaults() -> None:
    args = parse_args([], {})
    assert args == ServerArgs()
    assert (args.host, args.port, args.model_path, args.cache_type) == ("127.0.0.1", 1919, None, "radix")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--model", "m"], "model_path", "m"),
        (["--model-path=m"], "model_path", "m"),
        (["--tp", "2"], "tensor_parallel_size", 2),
        (["--tp-size", "2"], "tensor_parallel_size", 2),
        (["--max-extend-length", "7"], "max_prefill_length", 7),
        (["--max-seq-len-override", "99"], "max_seq_len", 99),
        (["--cache", "naive"], "cache_type", "naive"),
        (["--attn", "sdpa,sdpa"], "attention_backend", "sdpa,sdpa"),
        (["--tokenizer-count", "3"], "num_tokenizer", 3),
        (["--shell-mode"], "shell", True),
        (["--disable-overlap"], "disable_overlap", True),
        (["--dtype", "auto"], "dtype", None),
        (["--page-size", "auto"], "page_size", None),
        (["--graph", "0"], "cuda_graph_max_bs", 0),
        (["--cuda-graph-max-bs", "64"], "cuda_graph_max_bs", 64),
        (["--disable-pynccl"], "disable_pynccl", True),
        (["--moe-backend", "triton"], "moe_backend", "triton"),
        (["--device", "cuda"], "device", "cuda"),
        (["--revision", "v1.0"], "revision", "v1.0"),
        (["--chat-template", "x.jinja"], "chat_template", "x.jinja"),
        (["--config-override", '{"a": {"b": null}}'], "config_override", {"a": {"b": None}}),
    ],
)
def test_flags_and_aliases(argv: list[str], name: str, value: object) -> None:
    assert getattr(parse_args(argv, {}), name) == value


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nhost: file\npage-size: 4\ncache: naive\n")
    argv = ["--config", str(file), "--port", "3"]
    args = parse_args(argv, {"MINISGL_PORT": "2", "MINISGL_HOST": "environment"})
    assert (args.port, args.host, args.page_size, args.cache_type) == (3, "environment", 4, "naive")


def test_booleans_in_the_environment() -> None:
    assert parse_args([], {"MINISGL_DUMMY_WEIGHT": "1"}).dummy_weight
    assert not parse_args([], {"MINISGL_DUMMY_WEIGHT": "0"}).dummy_weight
    assert parse_args([], {"MINISGL_DISABLE_OVERLAP_SCHEDULING": "1"}).disable_overlap
    assert parse_args([], {"MINISGL_DISABLE_PYNCCL": "yes"}).disable_pynccl


@pytest.mark.parametrize(
    ("variable", "raw", "name", "value"),
    [
        ("MINISGL_MODEL", "m", "model_path", "m"),
        ("MINISGL_MODEL_PATH", "m", "model_path", "m"),
        ("MINISGL_TP", "2", "tensor_parallel_size", 2),
        ("MINISGL_TP_SIZE", "2", "tensor_parallel_size", 2),
        ("MINISGL_ATTN", "sdpa", "attention_backend", "sdpa"),
        ("MINISGL_CACHE", "naive", "cache_type", "naive"),
        ("MINISGL_GRAPH", "0", "cuda_graph_max_bs", 0),
        ("MINISGL_MAX_EXTEND_LENGTH", "7", "max_prefill_length", 7),
        ("MINISGL_SHELL_MODE", "1", "shell", True),
        ("MINISGL_DISABLE_OVERLAP_SCHEDULING", "1", "disable_overlap", True),
        ("MINISGL_TP", "", "tensor_parallel_size", 1),
    ],
)
def test_variables_have_the_flags_aliases(
    caplog: pytest.LogCaptureFixture, variable: str, raw: str, name: str, value: object
) -> None:
    assert getattr(parse_args([], {variable: raw}), name) == value
    assert not caplog.records


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("MINISGL_PROT", "MINISGL_PORT"),
        ("MINISGL_MODLE", "MINISGL_MODEL"),
        ("MINISGL_CACHEDIR", "MINISGL_CACHE_DIR"),
        ("MINISGL_QUIETLY", ""),
        ("MINISGL_", ""),
    ],
)
def test_an_unknown_variable_is_warned_about(caplog: pytest.LogCaptureFixture, variable: str, hint: str) -> None:
    assert parse_args([], {variable: "secret", "MINISGLX": "1", "PORT": "2"}) == ServerArgs()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{variable} in the environment is unknown")
    assert f"did you mean {hint}?" in record.getMessage() if hint else True
    assert "secret" not in record.getMessage()


def test_each_variable_that_is_read_is_known_and_documented() -> None:
    """No list may forget one: neither that of `env.py` nor that of docs/operations.md."""
    package = Path(config.__file__).parents[1]
    text = "".join(file.read_text() for file in package.rglob("*.py"))
    read = set(re.findall(r"""(?:environ\b[^"\n]*|env_[a-z]+\()"(MINISGL_\w+)""", text))
    assert len(read) >= 10
    assert read <= VARIABLES | {f"MINISGL_{name.upper()}" for name in ServerArgs.__dataclass_fields__}
    table = (package.parents[1] / "docs" / "operations.md").read_text().partition("## Environment variables")[2]
    for variable in VARIABLES - {"MINISGL_TEST_CPU_TARGET"}:
        assert variable in table or variable.startswith("MINISGL_SHELL_"), variable


@pytest.mark.parametrize("other", ["MINISGL_MODEL_PATH", "MINISGL_MODEL"])
def test_two_names_of_one_option_must_agree(tmp_path: Path, other: str) -> None:
    variables = {"MINISGL_MODEL": "a", "MINISGL_MODEL_PATH": "a"}
    assert parse_args([], variables).model_path == "a"
    with pytest.raises(ConfigError, match="MINISGL_MODEL_PATH and MINISGL_MODEL mean the same, and differ"):
        parse_args([], variables | {other: "b"})
    with pytest.raises(ConfigError, match="option tp and tp_size mean the same"):
        args_from_options({"tp": 2, "tp_size": 3})
    file = tmp_path / "config.yaml"
    file.write_text("api-key: first\napi_key: second\n")
    with pytest.raises(ConfigError, match=r"config.yaml: api-key and api_key mean the same") as caught:
        parse_args(["--config", str(file)], {})
    assert "first" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prot", "1"], ["--prot", "--port"]),
        (["--port", "x"], ["--port x", "0 to 65535"]),
        (["--port", "70000"], ["--port 70000"]),
        (["--dtype", "int8"], ["--dtype int8", "bfloat16"]),
        (["--tp", "0"], ["--tp 0", "1 to 64"]),
        (["--memory-ratio", "1.5"], ["--memory-ratio 1.5"]),
        (["--max-prefill-length", "-1"], ["--max-prefill-length -1", "auto"]),
        (["--schedule-policy", "random"], ["--schedule-policy random", "fcfs"]),
        (["--cache-type", "lru"], ["--cache-type lru"]),
        (["--device", "tpu"], ["--device tpu", "cuda"]),
        (["--moe-backend", "x"], ["--moe-backend x", "triton"]),
        (["--graph", "-1"], ["--graph -1", "auto", "at least 0"]),
        *(
            (["--config-override", text], ["--config-override", "a JSON object"])
            for text in ("{", "[]", "3", "a=b", "")
        ),
        (["--page-size"], ["--page-size"]),
        (["--model", ""], ["--model"]),
        (["stray"], ["stray"]),
        (["--config", "/does/not/exist.yaml"], ["--config", "No such file"]),
    ],
)
def test_errors_are_one_line_that_names_the_flag(argv: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv, {})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_errors_name_the_variable_or_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MINISGL_PORT=x: expected"):
        parse_args([], {"MINISGL_PORT": "x"})
    file = tmp_path / "config.yaml"
    wrong = [("port: x", "port='x'"), ("prot: 1", "did you mean port"), ("- 1", "mapping"), ("a: [", "")]
    for content, words in [*wrong, ("[" * 9999, "")]:
        file.write_text(content)
        with pytest.raises(ConfigError) as caught:
            parse_args(["--config", str(file)], {})
        assert str(file) in str(caught.value)
        assert words in str(caught.value)


def test_help_ends_the_program_with_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in ServerArgs.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


def test_help_and_readme_name_each_default_length_of_drafts() -> None:
    kinds = "ngram", "mtp", "model", "eagle", "dflash"
    each = {longest_draft(kind, None, is_free) for kind in kinds for is_free in (False, True)}
    each.add(longest_draft("ngram", None, is_free=False, states=(1,)))
    (text,) = (action.help for action in make_parser()._actions if action.dest == "speculate_tokens")
    readme = Path(__file__).parents[2] / "README.md"
    (row,) = (line for line in readme.read_text().splitlines() if line.startswith("| `--speculate-tokens` |"))
    for told in text, row:
        assert {int(number) for number in re.findall(r"\b\d+\b", str(told))} == each


def test_keyword_options() -> None:
    args = args_from_options({"dtype": "float32", "page_size": 16, "tp": 2, "dummy_weight": True})
    assert (args.dtype, args.page_size, args.tensor_parallel_size, args.dummy_weight) == ("float32", 16, 2, True)
    with pytest.raises(ConfigError, match=r"pagesize is unknown .did you mean page_size"):
        args_from_options({"pagesize": 1})
    with pytest.raises(ConfigError, match="page_size='big'"):
        args_from_options({"page_size": "big"})


def test_llm_shows_its_options_in_its_signature() -> None:
    from minisgl.llm import LLM

    parameters = inspect.signature(LLM).parameters
    assert next(iter(parameters)) == "model"
    assert set(parameters) == {"model", *ServerArgs.__dataclass_fields__}
    assert parameters["page_size"].default is None and parameters["cache_type"].default == "radix"
