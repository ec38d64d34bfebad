"""The application as Ray Serve runs it: replicas, the ingress in front of them, and who decides which and how many."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.util.placement_group import placement_group, remove_placement_group

import minisgl
from minisgl.cluster.ingress import Ingress
from minisgl.cluster.replica import Replica, node_address
from minisgl.cluster.router import POLICIES, wanted_replicas
from minisgl.config.args import ServerArgs, args_from_options
from minisgl.errors import ConfigError

APP = "minisgl"
_UNBOUNDED = 100_000  # requests at one replica at a time: the server itself says when it has enough
_ROOM_SECONDS = 10.0  # for what others have just given back
_END_SECONDS = 30.0  # for a replica, beyond the drain timeout
_LEAST_CPUS = 0.1  # of a replica
_FILES = {"model_path", "chat_template", "ssl_certfile", "ssl_keyfile"}


def autoscaling(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """By what all replicas tell (`Replica.record_autoscaling_stats`)."""
    told = context.aggregated_metrics or {}
    return wanted_replicas(*(sum(told.get(name, {}).values()) for name in ("queued_tokens", "kv_use"))), {}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a cluster is to be. options: of each server, by the flags' names. host: the address that servers have, "":
    their node's. listener: see `Ingress`."""

    options: Mapping[str, Any]
    replicas: int = 1
    max_replicas: int = 1
    policy: str = POLICIES[0]
    host: str = ""
    listener: str = ""
    is_fixed: bool = False  # an operator has said how many replicas there are to be
    num_new: int = 0  # of them, that take room which nothing of ours has


def server_options(args: ServerArgs) -> dict[str, Any]:
    """What differs from the defaults; files are named so that they are found from any folder."""
    given = {f.name: getattr(args, f.name) for f in fields(args) if getattr(args, f.name) != f.default}
    return given | {name: os.path.abspath(given[name]) for name in given.keys() & _FILES if os.path.exists(given[name])}


def replica_needs(
    args: ServerArgs, plan: Plan, nodes: Sequence[Mapping[str, float]]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Options that a replica's place decides, and what it takes of a node's resources, by Ray's names.

    nodes: what each has. Where Serve's configuration is what is wanted, nodes may come later than it, and Ray waits for
    them: options that say it all are enough. Raises: ConfigError when there is not enough for all replicas.
    """
    size, (gpus, cpus) = args.tensor_parallel_size, [sum(n.get(kind, 0) for n in nodes) for kind in ("GPU", "CPU")]
    if args.device == "cuda" or (gpus and args.device is None):
        room = sum(int(node.get("GPU", 0)) // size for node in nodes)
        if room < plan.replicas and plan.listener:
            words = f"each needs {size} GPUs of one node; there is room for {room}"
            raise ConfigError(f"--replicas {plan.replicas}: {words}")
        share = cpus / plan.max_replicas if plan.listener else 1.0
        return {"device": "cuda"}, {"num_gpus": size, "num_cpus": min(1.0, share)}
    if args.device == "cpu" and args.cpu_threads and not plan.listener:
        return {}, {"num_cpus": size * args.cpu_threads}
    share = cpus / plan.max_replicas
    threads = args.cpu_threads or max(1, int(share) // size)
    if share < _LEAST_CPUS * size or threads * size > max((node.get("CPU", 0) for node in nodes), default=0):
        words = f"with {size} × {threads} threads each, they find no room on {cpus:g} CPUs"
        later = "" if plan.listener else " (if more come later, say device, and for cpu cpu_threads)"
        raise ConfigError(f"--max-replicas {plan.max_replicas}: {words}{later}")
    return {"device": "cpu", "cpu_threads": threads}, {"num_cpus": math.floor(100 * min(share, threads * size)) / 100}


def application(plan: Plan) -> serve.Application:
    """What `serve.run` takes; Ray is there. Raises: ConfigError."""
    args = args_from_options(plan.options)
    if args.kv_events_endpoint:
        raise ConfigError("--kv-events-endpoint: each replica has its own; minisgl cluster status names them")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    more, resources = replica_needs(args, plan, nodes)
    _require_room(plan, resources, args.drain_timeout + _END_SECONDS if plan.is_fixed else _ROOM_SECONDS)
    front = {name: value for name, value in plan.options.items() if name.startswith("ssl_")}
    served = {name: value for name, value in plan.options.items() if name not in front} | more
    count: dict[str, Any] = {"num_replicas": plan.replicas}
    if plan.max_replicas > plan.replicas and not plan.is_fixed:
        scale: dict[str, Any] = {"min_replicas": plan.replicas, "max_replicas": plan.max_replicas}
        scale |= {"upscale_delay_s": 5.0, "downscale_delay_s": 60.0}
        count = {"autoscaling_config": {**scale, "policy": {"policy_function": f"{__name__}:autoscaling"}}}
    common: dict[str, Any] = {"max_ongoing_requests": _UNBOUNDED, "health_check_period_s": 2.0}
    common |= {"graceful_shutdown_wait_loop_s": 0.2, "graceful_shutdown_timeout_s": args.drain_timeout + _END_SECONDS}
    count |= {"max_constructor_retry_count": 2, "ray_actor_options": resources}
    count["request_router_config"] = {"request_router_class": "minisgl.cluster.ingress:PrefixRequestRouter"}
    replica = serve.deployment(**count, **common)(Replica)
    here = {f"node:{node_address()}": 0.001} if plan.listener else {}
    ingress = serve.deployment(**common, ray_actor_options={"num_cpus": 0, "resources": here})(serve.ingress()(Ingress))
    # Each `serve.run` would be a version of its own, and replace all replicas also where only numbers change.
    replica._version, ingress._version = _version(served), _version([front, plan.listener, plan.policy])
    return ingress.bind(replica.bind(served, plan.host), front, plan.listener, plan.policy)


def _require_room(plan: Plan, resources: Mapping[str, float], seconds: float) -> None:
    """Raises: ConfigError when Ray has no room for the new replicas, which it would wait for for ever."""
    bundle = {kind: resources[name] for kind, name in (("GPU", "num_gpus"), ("CPU", "num_cpus")) if name in resources}
    if plan.num_new:
        group = placement_group([bundle] * plan.num_new)
        has_room = group.wait(seconds)
        remove_placement_group(group)
        if not has_room:
            raise ConfigError(f"--replicas {plan.replicas}: Ray has no room for {plan.num_new} more with {bundle} each")


def _version(made_of: object) -> str:
    """Replicas of the same version stay."""
    return hashlib.sha256(json.dumps([minisgl.__version__, made_of], sort_keys=True, default=str).encode()).hexdigest()
