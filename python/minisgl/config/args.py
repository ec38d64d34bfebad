"""What the user asked for: one table of options, read from the command line, the environment and a YAML file.

The order is flag, environment (`MINISGL_<FLAG>`, for aliases too), file (`--config`), default. None stands for "auto".
"""

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import yaml

from minisgl.config.chat import REASONING_PARSERS, TOOL_PARSERS
from minisgl.config.pooling import TASKS
from minisgl.env import PREFIX, VARIABLES, boolean
from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)
Parser = Callable[[Any], Any]


def parser_of(expected: str, fits: Callable[[Any], object], convert: Parser = lambda value: value) -> Parser:
    """A parser of what can be converted, and then fits. It raises ValueError with what it expects."""

    def parse(value: Any) -> Any:
        with suppress(TypeError, ValueError, OverflowError, RecursionError):
            converted = convert(value)
            if fits(converted):
                return converted
        raise ValueError(expected)

    return parse


def _matching(pattern: str, expected: str) -> Parser:
    return parser_of(expected, lambda text: re.fullmatch(pattern, text, re.ASCII | re.DOTALL))


_text = _matching(".+", "a non-empty text")
_key = _matching("[!-~]+", "printable ASCII characters without spaces")  # what fits an HTTP header
_origin = _matching(r"\*|https?://[^/\s]+", "origins such as https://example.org, or *")
_share = parser_of("a number above 0 and at most 1", lambda number: 1e-9 <= number <= 1, float)
_zmq = _matching(r"(tcp|ipc)://\S+", "ZeroMQ endpoints such as tcp://*:5557")
_host = _matching(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*", "names such as llm.example.org, *.example.org, or *, without a port")


def integer(low: int, high: float = math.inf) -> Parser:
    """A parser of whole numbers. It raises ValueError with what it expects."""
    expected = f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    return parser_of(expected, lambda number: low <= number <= high, lambda value: int(str(value)))


def argument(parse: Parser) -> Parser:
    """The parser as argparse wants it, for `type`."""

    def checked(text: Any) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {error}") from None

    return checked


def _seconds(low: float) -> Parser:
    return parser_of(f"a number of seconds from {low:g} to 1e+06", lambda number: low <= number <= 1e6, float)


def several(inner: Parser) -> Parser:
    """A list: comma-separated, or a list in the YAML file. A flag of this kind may also be repeated."""

    def parse(value: Any) -> tuple[Any, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not items:
            raise ValueError("one value, or several with commas between them")
        return tuple(inner(item.strip() if isinstance(item, str) else item) for item in items)

    return parse


json_object = parser_of(
    'a JSON object of names and values, such as {"max_position_embeddings": 8192}',
    lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    lambda value: json.loads(value) if isinstance(value, str) else value,
)


def _option(parse: Parser, default: Any, *aliases: str, secret: bool = False, words: Any = None) -> Any:
    """secret: no message shows its value. words: those that --help shows. What it is for, `options.yaml` says."""
    metadata = {"parse": parse, "aliases": aliases, "words": () if default is False else words}
    return field(default=default, metadata=metadata, repr=not secret)


def _choice(choices: Sequence[str], default: str | None, *aliases: str) -> Any:
    parse = parser_of(f"one of {', '.join(choices)}", choices.__contains__)
    return _option(parse, default, *aliases, words=choices if default else ("auto", *choices))


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the server takes as the user says it."""

    host: str = _option(_text, "127.0.0.1")
    port: int = _option(integer(0, 65535), 1919)
    num_tokenizer: int = _option(integer(0, 64), 0, "--tokenizer-count")
    fairness: bool = _option(boolean, True, words=("on", "off"))
    max_queued_requests: int = _option(integer(1), 4096)
    max_queued_tokens: int = _option(integer(1024), 2**24)
    request_timeout: float = _option(_seconds(0), 0.0)
    strict_requests: bool = _option(boolean, False)
    model_name_check: bool = _option(boolean, True, words=("on", "off"))
    restart_workers: int = _option(integer(0), 3)
    heartbeat_timeout: float = _option(_seconds(2), 60.0)
    drain_timeout: float = _option(_seconds(0), 10.0)
    slow_motion: bool = _option(boolean, False)
    trace_prompts: bool = _option(boolean, False)
    log_requests: bool = _option(boolean, False)
    otlp_endpoint: str | None = _option(_matching(r"https?://[^/\s]\S*", "a URL such as http://127.0.0.1:4318"), None)
    log_format: str = _choice(("text", "json"), "text")
    kv_events_endpoint: tuple[str, ...] = _option(several(_zmq), ())


@dataclass(frozen=True, slots=True)
class ServerArgs(ServerOptions):
    """Options of the server, the shell and `LLM`, checked one by one but not yet against the model and the machine."""

    model_path: str | None = _option(_text, None, "--model")
    model_source: str = _choice(("huggingface", "modelscope"), "huggingface")
    revision: str | None = _option(_text, None)
    served_model_name: str | None = _option(_text, None)
    chat_template: str | None = _option(_text, None)
    config_override: Mapping[str, Any] | None = _option(json_object, None)
    task: str | None = _choice(TASKS, None)
    dtype: str | None = _choice(("float16", "bfloat16", "float32"), None)
    quantization: str | None = _choice(("int8", "int4", "fp8"), None)
    kv_cache_dtype: str | None = _choice(("float16", "bfloat16", "float32", "int8", "fp8"), None)
    cpu_threads: int | None = _option(integer(1, 1024), None)
    device: str | None = _choice(("cpu", "cuda"), None)
    tensor_parallel_size: int = _option(integer(1, 64), 1, "--tp-size", "--tp")
    api_key: tuple[str, ...] = _option(several(_key), (), secret=True)
    admin_key: tuple[str, ...] = _option(several(_key), (), secret=True)
    allowed_hosts: tuple[str, ...] = _option(several(_host), ())
    ssl_certfile: str | None = _option(_text, None)
    ssl_keyfile: str | None = _option(_text, None)
    cors_origin: tuple[str, ...] = _option(several(_origin), ())
    max_running_requests: int = _option(integer(1, 65536), 256)
    max_prefill_length: int | None = _option(integer(1), None, "--max-extend-length")
    max_seq_len: int | None = _option(integer(2), None, "--max-seq-len-override")
    memory_ratio: float = _option(_share, 0.9)
    num_pages: int | None = _option(integer(1), None)
    page_size: int | None = _option(integer(1, 4096), None)
    cache_type: str = _choice(("radix", "naive"), "radix", "--cache")
    num_state_snapshots: int | None = _option(integer(1), None)
    attention_backend: str | None = _option(_text, None, "--attn")
    moe_backend: str | None = _choice(("triton", "torch"), None)
    cuda_graph_max_bs: int | None = _option(integer(0), None, "--graph")
    disable_pynccl: bool = _option(boolean, False)
    schedule_policy: str = _choice(("fcfs", "lpm", "priority"), "fcfs")
    disable_overlap: bool = _option(boolean, False)
    speculate: str | None = _choice(("off", "ngram", "mtp"), None)
    draft_model: str | None = _option(_text, None)
    speculate_tokens: int | None = _option(integer(1, 64), None)
    dummy_weight: bool = _option(boolean, False)
    tool_call_parser: str | None = _choice((*TOOL_PARSERS, "none"), None)
    reasoning_parser: str | None = _choice((*REASONING_PARSERS, "none"), None)
    step_timeout: float = _option(_seconds(1), 60.0)
    check_integrity: int | None = _option(integer(0), None)
    shell: bool = _option(boolean, False, "--shell-mode")


_FIELDS = {f.name: f for f in dataclasses.fields(ServerArgs)}
_FLAGS = {name: ["--" + name.replace("_", "-"), *option.metadata["aliases"]] for name, option in _FIELDS.items()}
FLAG_WORDS = {flag: _FIELDS[name].metadata["words"] for name, flags in _FLAGS.items() for flag in flags}
_NAMES = {flag[2:].replace("-", "_"): name for name, flags in _FLAGS.items() for flag in flags}  # may be called so


def parse_args(argv: Sequence[str], environ: Mapping[str, str] = os.environ, prog: str = "minisgl") -> ServerArgs:
    """The options from all sources. Raises: ConfigError naming the flag, variable or file key that is wrong.

    `--help` and `--version` print and raise SystemExit."""
    given = vars(make_parser(prog).parse_args(argv))
    config_file = given.pop("config", None) or environ.get("MINISGL_CONFIG")
    values = _from_file(config_file) if config_file else {}
    names = {PREFIX + name.upper(): field for name, field in _NAMES.items()}
    names["MINISGL_DISABLE_OVERLAP_SCHEDULING"] = "disable_overlap"
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in VARIABLES | names.keys():  # perhaps another program's
            hint = suggestion(variable, [*VARIABLES, *names])
            logger.warning("%s in the environment is unknown, and ignored%s", variable, hint)
    values |= _from_mapping({name: environ[name] for name in names if environ.get(name)}, "", names)
    for name, raw in given.items():
        value = ",".join(raw).split(",") if isinstance(raw, list) else raw
        words = [word.partition("=")[0] for word in argv]
        flag = next(word for word in reversed(words) if word in _FLAGS[name])  # as it was spelled
        values[name] = _parse(name, value, f"{flag} {value}")
    return ServerArgs(**values)


def args_from_options(options: Mapping[str, Any]) -> ServerArgs:
    """The arguments from keyword options, by the flags' names. Raises: ConfigError naming the option that is wrong."""
    return ServerArgs(**_from_mapping(options, "option "))


def _from_file(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"--config {path}: {' '.join(str(reason).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a mapping of options to values")
    return _from_mapping(content, f"{path}: ")


def _from_mapping(options: Mapping[Any, Any], where: str, names: Mapping[str, str] = _NAMES) -> dict[str, Any]:
    """Names are those of fields and flags, with or without dashes. where: what messages put before them."""
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in options.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            raise ConfigError(f"{where}{key} is unknown{suggestion(str(key), names)}")
        parsed = _parse(name, value, f"{where}{key}={repr(value) if where else value}")
        if values.setdefault(name, parsed) != parsed:
            raise ConfigError(f"{where}{spelled[name]} and {key} mean the same, and differ; leave one of them out")
        spelled[name] = str(key)
    return values


def _parse(name: str, value: Any, source: str) -> Any:
    """Where the default is decided by `resolve`, or on, `auto` is allowed, and means that."""
    option = _FIELDS[name]
    may_be_auto = option.default is None or option.default is True
    if may_be_auto and value in (None, "auto"):
        return option.default
    try:
        return option.metadata["parse"](value)
    except ValueError as error:
        source = source if option.repr else _FLAGS[name][0]
        raise ConfigError(f"{source}: expected {'auto, or ' * may_be_auto}{error}") from None


def suggestion(word: str, known: Iterable[str]) -> str:
    return "".join(f" (did you mean {close}?)" for close in difflib.get_close_matches(word, list(known), n=1))


class ArgumentParser(argparse.ArgumentParser):
    """Tells a wrong command line in one line, by a ConfigError."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = f"unknown argument {unknown}{suggestion(unknown.split()[0], self._option_string_actions)}"
        raise ConfigError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def make_parser(prog: str = "minisgl") -> ArgumentParser:
    """The parser of the server's flags."""
    from minisgl import __version__

    texts = msgspec.yaml.decode(Path(__file__).with_name("options.yaml").read_bytes())
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} {'[MODEL] ' if ' ' in prog else ''}[options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        **texts.pop("about"),
    )
    parser.add_argument("--version", action="version", version=f"minisgl {__version__}")
    parser.add_argument("--config", metavar="FILE", help="YAML file with options")
    for title, helps in texts.items():
        group = parser.add_argument_group(title)
        for name, text in helps.items():
            group.add_argument(*_FLAGS[name], dest=name, **_shown(_FIELDS[name], text))
    return parser


def _shown(option: dataclasses.Field[Any], text: str) -> dict[str, Any]:
    if option.default is False:
        return {"action": "store_true", "help": text}
    default = "auto" if option.default is None else "on" if option.default is True else option.default
    words = ",".join(option.metadata["words"] or ())
    shown = {"metavar": f"{{{words}}}" if words else option.name.rpartition("_")[2].upper()}
    if option.default == ():
        return {**shown, "action": "append", "help": text}
    return {**shown, "help": text if "(default:" in text else f"{text} (default: {default})"}
