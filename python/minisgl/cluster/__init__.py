"""Replicas of a server behind a router that knows prefixes. `serving`, `owner`, `ingress` and `replica` import Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minisgl.cluster.router import POLICIES
from minisgl.config.args import args_from_options, integer
from minisgl.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve import Application


def app(options: Mapping[str, object]) -> Application:
    """What `serve run` and a Serve configuration file import. options: `replicas`, `max_replicas` and `router`, and the
    server's own, by the flags' names. Raises: ConfigError naming the one that is wrong."""
    from minisgl.cluster.serving import Plan, application, server_options

    server = {name: value for name, value in options.items() if name not in ("replicas", "max_replicas", "router")}
    args, replicas, policy = args_from_options(server), options.get("replicas", 1), options.get("router", POLICIES[0])
    try:
        replicas, most = (integer(1, 4096)(number) for number in (replicas, options.get("max_replicas", replicas)))
    except ValueError as error:
        raise ConfigError(f"options replicas, max_replicas: expected {error}") from None
    if policy not in POLICIES:
        raise ConfigError(f"option router={policy}: expected one of {', '.join(POLICIES)}")
    return application(Plan(server_options(args), replicas, max(replicas, most), policy))
