"""`minisgl bench serve` loads a running server, `minisgl bench offline` the engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from minisgl.errors import ConfigError

USAGE = """usage: minisgl bench {serve,offline} [options]

  serve    send requests to an OpenAI-compatible server and measure throughput and latency
  offline  generate in this process, without HTTP, and measure throughput

minisgl bench serve --help and minisgl bench offline --help list the options."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status: 0, 1 when every request failed, 2 for what cannot be run."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in ("serve", "offline"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        if command == "serve":
            from minisgl.benchmark import serve

            return serve.main(rest)
        from minisgl.benchmark import offline

        return offline.main(rest)
    except ConfigError as error:
        print(f"minisgl bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
