"""`minisgl simulate`: a cluster on paper, of replicas that plan with the real planner."""

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from minisgl.benchmark import metrics
from minisgl.benchmark.dataset import naming, parse_lengths
from minisgl.benchmark.floor import Machine
from minisgl.benchmark.offline import engine_options
from minisgl.cluster.router import POLICIES
from minisgl.config.args import ArgumentParser, argument, integer, parse_args, parser_of, several
from minisgl.config.runtime import SchedulerConfig
from minisgl.errors import ConfigError
from minisgl.simulate.cluster import Simulation
from minisgl.simulate.times import Served, by_floor, calibrated
from minisgl.simulate.workload import generate, read_trace

PROG = "minisgl simulate"
KINDS: dict[str, Callable[[str], Any]] = {  # of flags, in flags.yaml
    "natural": argument(integer(0)),
    "positive": argument(integer(1)),
    "counts": argument(several(integer(1, 65536))),
    "routers": argument(several(parser_of(f"one or more of {', '.join(POLICIES)}", POLICIES.__contains__))),
    "above 0": argument(parser_of("a number above 0", lambda value: 0 < value < 1e18, float)),
    "lengths": parse_lengths,
}


def make_parser() -> argparse.ArgumentParser:
    groups = msgspec.yaml.decode(Path(__file__).with_name("flags.yaml").read_bytes())
    parser = ArgumentParser(prog=PROG, **groups.pop("about"), allow_abbrev=False)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (kind, default, text) in flags.items():
            how = {"action": "store_true"} if kind == "switch" else {"type": KINDS.get(kind, str), "default": default}
            group.add_argument(f"--{name}", **how, help=text)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command. Raises: ConfigError naming the flag, or the file, line and field that is wrong."""
    args, server_flags = make_parser().parse_known_args(argv)
    metrics.check_files(json=args.json, plot=args.plot)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs the extra: pip install 'minisgl[plot]'")
    served, rows = make_served(args, server_flags), list[dict[str, Any]]()
    trace = read_trace(args, served.config.max_seq_len) if args.trace else None
    for replicas in args.replicas:
        sessions = trace or generate(args, replicas, served.config.max_seq_len)
        for router in args.router:
            simulation = Simulation(served, replicas, router, args.seed, args.autoscale)
            simulation.run(sessions)
            rows.append({"replicas": replicas, "router": router, **figures(simulation, args.price)})
    table = Table(*rows[0], title=served.about, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=150).print(table)
    config = {name: str(value) for name, value in vars(args).items()}
    with naming(args.json or args.plot):
        if args.json:
            Path(args.json).write_text(json.dumps({"about": served.about, "config": config, "results": rows}, indent=1))
        if args.plot:
            plot(args.plot, rows)
    return 0


def make_served(args: argparse.Namespace, server_flags: Sequence[str]) -> Served:
    """What each replica is, with those of the server's flags that its planner reads. Raises: ConfigError."""
    floor = args.shape, Machine(args.bandwidth, args.peak_flops), args.efficiency
    served = calibrated(args.calibration, args.model) if args.calibration else by_floor(*floor)
    options, read = engine_options(parse_args(server_flags, prog=PROG)), SchedulerConfig.__dataclass_fields__
    options["overlap"] = not options.pop("disable_overlap", False) and served.config.overlap
    if foreign := [name.replace("_", "-") for name in options if name not in read]:
        raise ConfigError(f"--{foreign[0]}: a simulation does not depend on it")
    config = replace(served.config, **options)
    max_seq_len = min(config.max_seq_len, config.num_pages * config.page_size)
    return replace(served, config=replace(config, max_seq_len=max_seq_len), overhead=args.overhead)


def figures(simulation: Simulation, price: float) -> dict[str, Any]:
    """By the columns of the table; latencies in milliseconds. price: of a replica's hour."""
    duration, itl = simulation.duration, metrics.statistics(simulation.itl or [0.0])
    summary, replicas = metrics.summarize(simulation.records, duration), simulation.replicas
    hours = sum((replica.ended or duration) - replica.started for replica in replicas) / 3600
    return {
        "started": len(replicas),
        "requests": summary.num_requests,
        "requests/s": summary.request_rate,
        "tokens/s out": summary.output_rate,
        **{f"TTFT {point}": summary.latencies["ttft"][point] for point in ("p50", "p90", "p99")},
        **{f"ITL {point}": itl[point] for point in ("p50", "p99")},
        "cached, %": 100 * summary.num_cached / summary.num_prompt,
        "retracted": sum(replica.planner.num_retracted for replica in replicas),
        "cost/M out": 1e6 * price * hours / summary.num_output,
        "router, µs": 1e6 * simulation.routing / summary.num_requests,
        "took, s": simulation.took,
    }


def plot(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """A panel for each of three columns, with a line for each router, over the number of replicas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for panel, column in zip(figure.subplots(1, 3), ("tokens/s out", "TTFT p50", "cached, %"), strict=True):
        for router in dict.fromkeys(row["router"] for row in rows):
            points = [(row["replicas"], row[column]) for row in rows if row["router"] == router]
            panel.plot(*zip(*points, strict=True), "o-", label=router)
        panel.set(xlabel="replicas", ylabel=column, xscale="log", ylim=(0, None))
    panel.legend()
    figure.savefig(path, dpi=120)
