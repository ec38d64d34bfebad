"""Replicas of a server behind a router that knows prefixes. `serving`, `owner`, `ingress` and `replica` import Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve import Application


def app(options: Mapping[str, object]) -> Application:
    """What `serve run` and a Serve configuration file import. options: `replicas`, `max_replicas` and `router`, and the
    server's own, by the flags' names. Raises: ConfigError naming the one that is wrong."""
    from minisgl.cluster.serving import build

    return build(options)
