"""`MINISGL_*` environment variables that are not command-line flags. Read when asked for, never at import."""

from __future__ import annotations

import os

from minisgl.errors import ConfigError

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}


def env_bool(name: str, default: bool = False) -> bool:
    """The variable as a boolean. Raises: ConfigError for anything but 1/0, true/false, yes/no, on/off."""
    value = os.environ.get(name)
    if value is None:
        return default
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise ConfigError(f"{name}={value!r}: expected a boolean such as 1 or 0")


def env_number(name: str, default: float, *, low: float, high: float) -> float:
    """The variable as a number in [low, high]. Raises: ConfigError naming the variable otherwise."""
    value = os.environ.get(name)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r}: expected a number") from None
    if not low <= number <= high:
        raise ConfigError(f"{name}={value!r}: expected a number from {low:g} to {high:g}")
    return number
