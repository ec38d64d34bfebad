"""`python -m minisgl.kernel`: compile every kernel for this machine's GPU, check each, and time it.

`python -m minisgl.kernel prebuild [LEVEL …]` puts the CPU kernels of some or all levels into the cache, for an image.
"""

import sys

from minisgl.errors import ConfigError
from minisgl.kernel.jit import LEVELS, compile_cpu_kernels, cpu_level


def main(argv: list[str]) -> int:
    """Returns the exit status. Raises: ConfigError for a wrong command line."""
    if not argv:
        from minisgl.kernel.bench import main as bench

        return bench()
    if argv[0] != "prebuild":
        raise ConfigError(f"{argv[0]}: expected nothing, or prebuild [LEVEL …]")
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
