"""A server whose engine is a formula: everything but the model is real. Run: python -m tests.fake_server MODEL [k=v …]

Keys: port, num_tokenizer, delay (seconds per step), max_seq_len, max_running,
die (name of a worker that fails at start-up), answer (a file with the text of every answer, read for each),
tools and reasoning (names of parsers), and of the real server the options for access, for watching over workers,
and for what may wait.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from minisgl.config.args import args_from_options, parse_args
from minisgl.config.chat import visible_tokens
from minisgl.config.model import AttentionSpec, DenseMLP, LayerSpec, ModelConfig, PagedKV, RopeConfig
from minisgl.config.resolve import access_config
from minisgl.config.runtime import EngineConfig, SchedulerConfig, ServerConfig, TokenizerConfig
from minisgl.errors import ConfigError, MiniSGLError
from minisgl.message.sockets import Endpoints
from minisgl.processes.control import Launcher, Worker, WorkerSpec
from minisgl.server.launch import bind_port, run_server
from minisgl.utils.log import setup_logging
from tests.fake_server import EOS, VOCAB
from tests.fake_server.workers import broken, fake_scheduler

ACCESS = ("api_key", "admin_key", "allowed_hosts", "host", "ssl_certfile", "ssl_keyfile", "cors_origin")
WATCHING = ("restart_workers", "heartbeat_timeout", "step_timeout")
LOAD = ("fairness", "max_queued_requests", "max_queued_tokens", "request_timeout")


def config_for(model_path: str, port: int, num_tokenizer: int, max_seq_len: int, max_running: int) -> ServerConfig:
    layer = LayerSpec(AttentionSpec(PagedKV(1, 8, 8)), DenseMLP(8))
    model = ModelConfig("Fake", VOCAB, 8, 1, 8, 1e-6, max_seq_len, (layer,), (RopeConfig(1e4),))
    page_size = -(-max_seq_len // 8192)
    scheduler = SchedulerConfig(
        max_running, 8192, max_seq_len, 8192, page_size, eos_token_ids=(EOS,), check_integrity=1, integrity_fatal=True
    )
    engine = EngineConfig(
        model_path, model, "float32", "cpu", 1, "", 8192, page_size, 256, 8192, max_seq_len, "sdpa", "sdpa", 1, True
    )
    tokenizer = TokenizerConfig(model_path, max_seq_len, VOCAB)
    return ServerConfig(
        engine=engine,
        scheduler=scheduler,
        tokenizer=tokenizer,
        num_tokenizer=num_tokenizer,
        served_model_name="fake-model",
        port=port,
        default_sampling={"top_k": 50},
    )


def main(argv: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in argv[1:])
    setup_logging("server")
    config = config_for(
        argv[0],
        int(options.get("port", 0)),
        int(options.get("num_tokenizer", 0)),
        int(options.get("max_seq_len", 512)),
        int(options.get("max_running", 256)),
    )
    given = {name: options[name] for name in ACCESS if name in options}
    args = args_from_options(given)
    config = replace(config, access=access_config(args), host=args.host)
    tools, reasoning = options.get("tools"), options.get("reasoning")
    tokenizer = replace(config.tokenizer, visible_tokens=visible_tokens(tools, reasoning))
    config = replace(config, tokenizer=tokenizer, tool_call_parser=tools, reasoning_parser=reasoning)
    checked = options.get("model_name_check") != "off"
    config = replace(config, strict_requests="strict_requests" in options, model_name_check=checked)
    args = args_from_options({name: options[name] for name in (*WATCHING, *LOAD) if name in options})
    config = replace(config, scheduler=replace(config.scheduler, step_timeout=args.step_timeout))
    config = replace(config, fairness=args.fairness, request_timeout=args.request_timeout)
    queued = {"max_queued_requests": args.max_queued_requests, "max_queued_tokens": args.max_queued_tokens}
    config = replace(config, **queued)
    config = replace(config, restart_workers=args.restart_workers, heartbeat_timeout=args.heartbeat_timeout)
    config = replace(config, drain_timeout=parse_args([]).drain_timeout)
    delay = float(options.get("delay", 0.0))

    class FakeLauncher(Launcher):
        """Starts something else in the place of schedulers, and of what shall die."""

        def start(self, spec: WorkerSpec, life: int, is_lasting: bool) -> Worker:
            if spec.group == "scheduler":
                endpoints = next(given for given in spec.args if isinstance(given, Endpoints))
                fake = (config, endpoints, delay, options.get("answer", ""))
                spec = replace(spec, body=fake_scheduler, args=fake)
            if spec.name == options.get("die"):
                spec = replace(spec, body=broken, args=())
            return super().start(spec, life, is_lasting)

    try:
        with bind_port(config.host, config.port) as listener:
            return run_server(config, listener, FakeLauncher())
    except MiniSGLError as error:
        print(f"minisgl: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
