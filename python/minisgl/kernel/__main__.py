"""`python -m minisgl.kernel prebuild [LEVEL …]` puts CPU kernels, of all levels or these, into the cache."""

import sys

from minisgl.errors import ConfigError
from minisgl.kernel.jit import LEVELS, compile_cpu_kernels, cpu_level


def main(argv: list[str]) -> int:
    """Returns the exit status. Raises: ConfigError for a wrong command line."""
    if argv[:1] != ["prebuild"]:
        raise ConfigError(f"expected prebuild [LEVEL …], not {' '.join(argv) or 'nothing'}")
    for level in argv[1:] or (LEVELS if cpu_level() in LEVELS else ["native"]):
        if level not in (*LEVELS, "native"):
            raise ConfigError(f"prebuild {level}: expected native, {', '.join(LEVELS)}")
        print(compile_cpu_kernels(level))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"minisgl.kernel: error: {error}")
