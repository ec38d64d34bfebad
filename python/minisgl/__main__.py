"""The command `minisgl`, as `cli/texts/commands.yaml` has it. Imports are made when needed: help is there at once."""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from minisgl.errors import ConfigError, MiniSGLError

# Of the larger commands; the others are together. What is imported stands here: no name from outside ever is.
_MODULES = {
    "bench": lambda: import_module("minisgl.benchmark"),
    "cluster": lambda: import_module("minisgl.cluster.commands"),
    "doctor": lambda: import_module("minisgl.doctor"),
    "quantize": lambda: import_module("minisgl.quantize"),
    "simulate": lambda: import_module("minisgl.simulate"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 when it failed, 2 when it could not be done as asked."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # it was closed, and would become a socket of ours
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # child processes look for no module in the working directory
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except MiniSGLError as error:
        from minisgl.utils.log import Writer

        logging.shutdown()  # the log comes first
        Writer().handle(logging.makeLogRecord({"msg": f"minisgl: error: {error}"}))
        logging.shutdown()
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `minisgl … | head`: who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 141


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["help"] and argv[1:]:
        argv = [argv[1], "--help"]
    name, *words = argv if argv and not argv[0].startswith("-") else ["", *argv]
    if name in ("", "serve", "chat"):
        return _serve(name, words)
    module = _MODULES[name]() if name in _MODULES else import_module("minisgl.cli.commands")
    return int(module.main(words if name in _MODULES else argv))


def _serve(name: str, words: list[str]) -> int:
    from minisgl.config.args import parse_args
    from minisgl.utils.log import setup_logging

    if name and words and not words[0].startswith("-"):
        words = ["--model", *words]
    args = parse_args([*words, *["--shell"] * (name == "chat")], prog=f"minisgl {name}".strip())
    os.environ["LOG_FORMAT"] = args.log_format  # of the workers, too
    if not args.shell:
        from minisgl.server.launch import serve as run
    else:
        os.environ.setdefault("LOG_LEVEL", "WARNING")  # the workers' too: their lines would be among the answers
        from minisgl.cli.shell import run
    setup_logging("shell" if args.shell else "server")
    return run(args)


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working directory, by `python -m`: nobody's torch.py there is run
        sys.path.append(os.path.dirname(os.path.dirname(__file__)))
    sys.exit(main())
