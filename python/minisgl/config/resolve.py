"""From what the user asked for to what runs: every "auto" is decided here, and nowhere else.

`resolve` is a pure function of the options, the model's shape and the machine, so each decision can be tested."""

import importlib
import socket
import ssl
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from minisgl.config import chat
from minisgl.config.args import ServerArgs, ServerOptions
from minisgl.config.device import attention_tokens, choose_device, decide_engine, step_costs
from minisgl.config.draft import with_draft
from minisgl.config.families import read_model_config, weight_files
from minisgl.config.locate import is_remote, locate_model, read_fields, split_revision, stores_head
from minisgl.config.model import ModelConfig
from minisgl.config.pooling import read_pooling
from minisgl.config.probe import Capabilities, probe
from minisgl.config.runtime import AccessConfig, SchedulerConfig, ServerConfig, TokenizerConfig
from minisgl.core import DRAWING, SamplingParams
from minisgl.errors import ConfigError, RequestError
from minisgl.utils.process import end_if_spawned


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model directory and what was read from it."""

    path: Path
    model: ModelConfig
    default_sampling: dict[str, float | int]
    chat_template: str = ""


def prepare(args: ServerArgs) -> ServerConfig:
    """Find the model, look at the machine, and resolve. Raises: ConfigError."""
    end_if_spawned()
    try:
        if args.otlp_endpoint:
            importlib.import_module("opentelemetry.exporter.otlp.proto.http")
    except ImportError:
        raise ConfigError("--otlp-endpoint needs the extra: pip install 'minisgl[otlp]'") from None
    access, machine = access_config(args), probe()
    name, revision = split_revision(args.model_path, args.revision)
    args = replace(args, model_path=name)
    template = chat.read_template_file(args.chat_template) if args.chat_template else None
    if is_remote(name) and args.device == "cuda":
        choose_device(args, machine)  # before it is fetched, which may take a while
    path = locate_model(name, args.model_source, revision)
    model = read_model_config(path, args.config_override, mtp=args.speculate in (None, "mtp"))
    has_head = model.mtp and not args.draft_model and (args.dummy_weight or stores_head(weight_files(path)))
    model = model if args.speculate == "mtp" or has_head else replace(model, mtp=())
    args, model = with_draft(args, path, model, args.draft_model and choose_device(args, machine))
    template = template or chat.read_chat_template(path)
    model = replace(model, pooling=read_pooling(args.task, path, model.tie_word_embeddings, template))
    files = ModelFiles(path, model, read_default_sampling(path), template)
    return replace(resolve(args, files, machine), access=access)


def read_default_sampling(path: Path) -> dict[str, float | int]:
    """The sampling parameters that the model's authors recommend, from `generation_config.json`.

    Without sampling (`do_sample: false`, `top_p: 0`) it is greedy, as in transformers. Raises: ConfigError for values
    that no request could have."""
    given = read_fields(path / "generation_config.json")
    values: dict[str, float | int | None] = {
        name: given.integer(name, None, -1) if kind is int else given.number(name, None)
        for name, kind in DRAWING.items()
    }
    if given.boolean("do_sample", True) is False or values["top_p"] == 0:
        values = {"temperature": 0.0}
    values["repetition_penalty"] = given.number("repetition_penalty", None)
    values["max_tokens"] = given.integer("max_new_tokens", None)
    chosen = {name: value for name, value in values.items() if value is not None}
    try:
        SamplingParams(**chosen)  # type: ignore[arg-type]
    except RequestError as error:
        raise ConfigError(f"{given.source}: {error}") from None
    return chosen


def resolve(args: ServerArgs, files: ModelFiles, machine: Capabilities) -> ServerConfig:
    """Decide everything. Raises: ConfigError naming the flag that cannot be honoured, and why."""
    model, path = files.model, str(files.path)
    tp_size, heads, kv_heads = args.tensor_parallel_size, model.num_qo_heads, model.num_kv_heads
    if heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
        both = f"{heads} attention heads and {kv_heads} KV heads"
        raise ConfigError(f"--tensor-parallel-size {tp_size}: does not divide the model's {both}")
    wanted_len = args.max_seq_len or model.max_position
    if wanted_len > model.max_position:
        raise ConfigError(f"--max-seq-len {wanted_len}: the model's context is {model.max_position} tokens")
    try:
        engine = decide_engine(args, path, model, wanted_len, machine)
    except ConfigError:
        if args.speculate is not None or not model.mtp:
            raise
        engine = decide_engine(args, path, model := replace(model, mtp=()), wanted_len, machine)
    args = replace(args, speculate=args.speculate or ("mtp" if engine.model.mtp else "off"))
    flops = 1e13 if engine.device == "cuda" else 8e9 * engine.num_threads  # per second, the least that any machine has
    scheduler = SchedulerConfig(
        **_shared(SchedulerConfig, args, engine),
        has_states=bool(model.states),
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
        overlap=not args.disable_overlap,
        step_costs=step_costs(engine),
        attention_tokens=attention_tokens(engine),
        token_seconds=2 * model.weight_bytes("int8", engine.tp_size) / flops,
    )
    tools, reasoning = chat.choose_parsers(args.tool_call_parser, args.reasoning_parser, files.chat_template)
    visible = chat.visible_tokens(tools, reasoning)
    own_template = files.chat_template if args.chat_template else None
    return ServerConfig(
        **_shared(ServerOptions, args),
        engine=engine,
        scheduler=scheduler,
        tokenizer=TokenizerConfig(path, engine.max_seq_len, model.vocab_size, visible, own_template, model.pooling),
        served_model_name=args.served_model_name or args.model_path or "minisgl-demo",
        default_sampling=files.default_sampling,
        tool_call_parser=tools,
        reasoning_parser=reasoning,
    )


def _shared(kind: Any, *sources: object) -> dict[str, Any]:
    """The fields of a dataclass that one of these has under the same name, the last that does."""
    names = [field.name for field in fields(kind)]
    return {name: getattr(source, name) for source in sources for name in names if hasattr(source, name)}


def access_config(args: ServerArgs) -> AccessConfig:
    """Raises: ConfigError naming the flag whose value cannot be used with another's."""
    if args.ssl_keyfile and not args.ssl_certfile:
        raise ConfigError("--ssl-keyfile: it needs --ssl-certfile")
    if args.ssl_certfile:
        _check_certificate(args.ssl_certfile, args.ssl_keyfile)
    if not {*args.api_key}.isdisjoint(args.admin_key):
        raise ConfigError("--admin-key: it is one of --api-key as well; clients would be operators")
    # No stranger can have these.
    names = ("localhost", "*.localhost", "*.internal", "", args.host, socket.gethostname())
    given = args.allowed_hosts or (("*",) if args.api_key else ())  # a page that has come by a false name has no key
    hosts = tuple(map(str.lower, (*names, *given)))
    return AccessConfig(args.api_key, args.admin_key, hosts, args.ssl_certfile, args.ssl_keyfile, args.cors_origin)


def _check_certificate(certfile: str, keyfile: str | None) -> None:
    try:
        for path in (certfile, keyfile or certfile):
            open(path, "rb").close()
        # The empty password: openssl would ask for one at the terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certfile, keyfile, password="")
    except ssl.SSLError as error:
        reason = f"no certificate with its private key, without a password, in PEM ({error.reason or error})"
        raise ConfigError(f"--ssl-certfile {certfile}: {reason}") from None
    except OSError as error:
        flag = "--ssl-certfile" if path == certfile else "--ssl-keyfile"
        raise ConfigError(f"{flag} {path}: {(error.strerror or str(error)).lower()}") from None
