"""`minisgl cluster serve|status|scale|drain`: starts a cluster and ends it, or asks one that runs."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Sequence

from minisgl.cluster.address import reach
from minisgl.cluster.router import POLICIES
from minisgl.config.args import ArgumentParser, argument, integer, json_object, make_parser, parse_args
from minisgl.config.resolve import prepare
from minisgl.errors import ConfigError
from minisgl.processes.control import ENDING_SIGNALS, PR_SET_PDEATHSIG
from minisgl.server.launch import bind_port
from minisgl.utils.log import setup_logging
from minisgl.utils.process import private_folder

OLDEST = (2, 60)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises: ConfigError for a wrong command line, WorkerDied when the cluster fails."""
    name, *rest = argv or ["--help"]
    if name == "serve":
        return _serve(rest)
    parser = ArgumentParser(prog="minisgl cluster", description="Replicas on Ray behind one address.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve|status|scale|drain")
    commands.add_parser("serve", help="start a cluster: the server's flags, and those of minisgl cluster serve --help")
    for command, about in (
        ("status", "what there is, as JSON"),
        ("scale", "have so many replicas from now on"),
        ("drain", "take no new requests, let those that run finish, and end the cluster"),
    ):
        one = commands.add_parser(command, help=about, description=about)
        one.add_argument("--url", default="http://127.0.0.1:1919", help="of the cluster (default: %(default)s)")
        one.add_argument("--key", default=os.environ.get("MINISGL_ADMIN_KEY", ""), help="the operator's, if any")
        if command == "scale":
            one.add_argument("replicas", type=argument(integer(1, 4096)))
            one.add_argument("--options", type=argument(json_object), default={}, help="JSON: server options to change")
    args = parser.parse_args(list(argv) or ["--help"])
    body = {"replicas": args.replicas, "options": args.options} if args.command == "scale" else {}
    path, data = ("", None) if args.command == "status" else (f"/{args.command}", json.dumps(body).encode())
    print(_ask(f"{args.url.rstrip('/')}/cluster{path}", args.key, data))
    return 0


def _ask(url: str, key: str, data: bytes | None) -> str:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return json.dumps(json.loads(answer.read()), indent=2)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url}: {error.read().decode(errors='replace').strip()}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--url {url}: no cluster answers there ({getattr(error, 'reason', error)})") from None


def _apart() -> int | None:
    """Go on in a process of a session of its own, where this returns None. Signals come to us alone, and are passed on:
    Ray's processes would follow them before requests have ended. Here, its exit status is returned when it ends."""
    ours = os.getpid()
    if child := os.fork():
        for signum in ENDING_SIGNALS:
            signal.signal(signum, lambda number, _: os.kill(child, number))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return None if os.getppid() == ours else 1


def _serve(words: list[str]) -> int:
    prog = "minisgl cluster serve"
    own = ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    group = make_parser(prog)
    for parser in (own, group.add_argument_group("cluster")):
        parser.add_argument("--replicas", type=argument(integer(1, 4096)), default=1, help="servers (default: 1)")
        parser.add_argument("--max-replicas", type=argument(integer(1, 4096)), help="as many when there is much to do")
        parser.add_argument("--address", help="of the Ray cluster to join (default: one is started on this machine)")
        parser.add_argument("--router", choices=POLICIES, default=POLICIES[0], help="(default: %(default)s)")
    if {"-h", "--help"} & {*words}:
        group.print_help()
        return 0
    if words and not words[0].startswith("-"):
        words = ["--model", *words]
    asked, rest = own.parse_known_args(words)
    args = parse_args(rest, prog=prog)
    if args.shell:
        raise ConfigError("--shell: a cluster has none; minisgl chat has")
    check_ray()
    if asked.address is not None:
        try:
            reach(asked.address)
        except ConnectionError as error:
            raise ConfigError(f"--address {asked.address}: {error}") from None
    if (status := _apart()) is not None:
        return status
    os.environ["LOG_FORMAT"] = args.log_format
    setup_logging("cluster")
    with contextlib.closing(bind_port(args.host, args.port)) as listener:
        if asked.address is None:
            prepare(args)  # what is wrong with it is told before anything is started
        try:
            from minisgl.cluster.owner import Owner
            from minisgl.cluster.serving import Plan, server_options
        except (ImportError, RuntimeError) as error:  # what it needs is not there, or of another version
            raise ConfigError(f"Ray Serve cannot be imported ({error}): pip install 'minisgl[ray]'") from error
        plan = Plan(server_options(args), asked.replicas, max(asked.replicas, asked.max_replicas or 1), asked.router)
        with private_folder() as folder:
            return Owner(plan, listener, folder, asked.address).run()


def check_ray() -> None:
    """Raises: ConfigError unless Ray Serve is there, and new enough."""
    version = importlib.metadata.version("ray") if importlib.util.find_spec("ray") else ""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        told = f"Ray {OLDEST[0]}.{OLDEST[1]} or newer{version and f', and this is {version}'}"
        raise ConfigError(f"minisgl cluster needs {told}: pip install 'minisgl[ray]'")
