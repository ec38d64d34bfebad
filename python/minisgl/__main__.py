"""The command `minisgl`: serves over HTTP, or chats (--shell), measures (bench), examines the machine
(doctor) or makes weights smaller (quantize)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from minisgl.errors import ConfigError, MiniSGLError


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
    """Imports are made when they are needed: help and errors are there at once."""
    if argv[:1] == ["bench"]:
        from minisgl.benchmark import main as bench

        return bench(argv[1:])
    if argv[:1] == ["doctor"]:
        from minisgl.doctor import main as doctor

        return doctor(argv[1:])
    if argv[:1] == ["quantize"]:
        from minisgl.quantize import main as quantize

        return quantize(argv[1:])
    from minisgl.config.args import parse_args
    from minisgl.utils.log import setup_logging

    args = parse_args(argv)
    if args.shell:
        os.environ.setdefault("LOG_LEVEL", "WARNING")  # the workers' too: their lines would be among the answers
    setup_logging("shell" if args.shell else "server")
    if args.shell:
        from minisgl import shell

        return shell.run(args)
    from minisgl.server.launch import serve

    return serve(args)


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working directory, by `python -m`: nobody's torch.py there is run
        sys.path.append(os.path.dirname(os.path.dirname(__file__)))
    sys.exit(main())
