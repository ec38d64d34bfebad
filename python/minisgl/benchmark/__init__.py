"""`minisgl bench serve` loads a running server, `minisgl bench offline` the engine in this process."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from minisgl.errors import ConfigError

USAGE = """usage: minisgl bench {serve,offline} [options], or minisgl bench --calibrate FILE [options of offline]

  serve        send requests to an OpenAI-compatible server and measure throughput and latency
  offline      generate in this process, without HTTP, and measure throughput
  --calibrate  time single steps in this process, and write them for minisgl simulate

minisgl bench serve --help and minisgl bench offline --help list the options."""


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status: 0, or 1 when every request failed. Raises: ConfigError."""
    if argv and argv[0] == "--calibrate":
        argv = ["offline", "--workload", "steps", "--output", *argv[1:]]
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in ("serve", "offline"):
        expected = "expected serve or offline, or --calibrate FILE; see minisgl bench --help"
        raise ConfigError(f"bench {command or 'alone'}: {expected}")
    serves = command == "serve"
    module = import_module("minisgl.benchmark.serve") if serves else import_module("minisgl.benchmark.offline")
    return int(module.main(argv[1:]))


def run_script(main: Callable[[], object]) -> None:
    """The `main` of a script in `benchmark/`: what is wrong with its flags or files is one line, and status 2."""
    try:
        main()
    except ConfigError as error:
        raise SystemExit(print(f"{sys.argv[0]}: error: {error}", file=sys.stderr) or 2) from None
