"""Logging, configured once per process: level from `LOG_LEVEL`, each line marked with the process's role."""

from __future__ import annotations

import logging
import os
import sys

from minisgl.errors import ConfigError


def setup_logging(role: str) -> None:
    """Log to stderr as `role` ("server", "TP0", "tokenizer-0" …). Raises: ConfigError for an unknown LOG_LEVEL."""
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError(f"LOG_LEVEL={level!r}: expected DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role} %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger("minisgl")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)
