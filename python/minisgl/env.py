"""`MINISGL_*` environment variables that are not command-line flags. Read when asked for, never at import."""

import os
from contextlib import suppress
from pathlib import Path

from minisgl.errors import ConfigError

PREFIX = "MINISGL_"
_NAMES = """
    CONFIG CACHE_DIR DISABLE_CPU_KERNELS PEER_MEMORY MAX_BODY_BYTES SSE_KEEPALIVE ACCESS_LOG
    START_TIMEOUT HEALTH_TIMEOUT READ_TIMEOUT WRITE_TIMEOUT INTEGRITY_FATAL
    SHELL_MAX_TOKENS SHELL_TEMPERATURE SHELL_TOP_P SHELL_TOP_K SHELL_MIN_P SHELL_SEED
    TEST_DEVICE TEST_CPU_TARGET SOAK_SECONDS SOAK_SEED"""
VARIABLES = frozenset(PREFIX + name for name in _NAMES.split())


def cache_dir() -> Path:
    """Where compiled kernels are kept: `MINISGL_CACHE_DIR`, or the user's cache. Raises: ConfigError without any."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("MINISGL_CACHE_DIR") or Path(base, "minisgl"), "kernels")
    if folder.parts[0] == "~":
        raise ConfigError("there is no home directory for compiled kernels: set MINISGL_CACHE_DIR")
    return folder


def boolean(value: object) -> bool:
    """True or false, or a word for it. Raises: ValueError with what is expected."""
    word = str(value).lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


def env_bool(name: str, default: bool = False) -> bool:
    """The variable as a boolean; unset or empty is the default. Raises: ConfigError naming the variable."""
    try:
        return boolean(os.environ.get(name) or default)
    except ValueError as error:
        raise ConfigError(f"{name}={os.environ[name]!r}: expected {error}") from None


def env_number(name: str, default: float, *, low: float, high: float) -> float:
    """The variable as a number in [low, high]. Raises: ConfigError naming the variable otherwise."""
    if not (value := os.environ.get(name)):
        return default
    with suppress(ValueError):
        if low <= (number := float(value)) <= high:
            return number
    raise ConfigError(f"{name}={value!r}: expected a number from {low:g} to {high:g}")
