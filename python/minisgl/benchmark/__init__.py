"""`minisgl bench serve` loads a running server, `minisgl bench offline` the engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from minisgl.errors import ConfigError

USAGE = """usage: minisgl bench {serve,offline} [options]

  serve    send requests to an OpenAI-compatible server and measure throughput and latency
  offline  generate in this process, without HTTP, and measure throughput

minisgl bench serve --help and minisgl bench offline --help list the options."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status: 0, or 1 when every request failed. Raises: ConfigError."""
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "serve":
        from minisgl.benchmark.serve import main as run
    elif command == "offline":
        from minisgl.benchmark.offline import main as run
    else:
        raise ConfigError(f"bench {command or 'alone'}: expected serve or offline; see minisgl bench --help")
    return run(argv[1:])


def run_script(main: Callable[[], object]) -> None:
    """The `main` of a script in `benchmark/`: what is wrong with its flags or files is one line, and status 2."""
    try:
        main()
    except ConfigError as error:
        raise SystemExit(print(f"{sys.argv[0]}: error: {error}", file=sys.stderr) or 2) from None
