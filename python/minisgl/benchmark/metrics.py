"""What a benchmark measures, as numbers, table and JSON. Times are in seconds inside, milliseconds when shown."""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from minisgl import __version__
from minisgl.benchmark.dataset import naming
from minisgl.errors import ConfigError

PERCENTILES = (50, 90, 99)
LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "step": "time per step",
    "e2e": "end to end",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One request, as its client saw it.

    start: seconds after the benchmark's. arrivals: when each piece of output came, seconds after `start`.
    num_prompt, num_output, num_cached: tokens, as the server counted them. error: why it failed.
    has_gaps: whether `arrivals` are all of them, rather than the first and the last only.
    """

    start: float
    e2e: float
    arrivals: tuple[float, ...] = ()
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0
    error: str | None = None
    has_gaps: bool = True

    @property
    def ttft(self) -> float | None:
        return self.arrivals[0] if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Mean time of the tokens after the first; a piece of output may carry several."""
        if self.num_output < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_output - 1)

    @property
    def itl(self) -> list[float]:
        """Gaps between pieces of output: what a reader waits for."""
        if not self.has_gaps:
            return []
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's totals over its successful requests, rates per second of `duration`, latencies in milliseconds.

    floor: seconds that the machine needs at least, and step_floor: a decode step, where they were computed; with the
    machine's `ceilings` in words.
    """

    num_requests: int
    num_failed: int
    duration: float
    num_prompt: int
    num_output: int
    num_cached: int
    request_rate: float
    prompt_rate: float
    output_rate: float
    latencies: dict[str, dict[str, float]]
    errors: dict[str, int]
    floor: float | None = None
    step_floor: float | None = None
    ceilings: str | None = None

    def floor_texts(self) -> list[str]:
        """The floor in words, with the share of it that was reached."""
        texts = []
        if self.floor and self.duration:
            rate = self.num_output / self.floor
            texts.append(f"{rate:.1f} tokens/s out; reached: {100 * self.floor / self.duration:.1f}%")
        if self.step_floor and "step" in self.latencies:
            share = 100_000 * self.step_floor / self.latencies["step"]["p50"]
            texts.append(f"{1000 * self.step_floor:.3f} ms per step; reached: {share:.1f}%")
        return [*texts, f"by these ceilings: {self.ceilings}"] if texts and self.ceilings else texts


def latency_samples(records: Sequence[Record], steps: Sequence[float] = ()) -> dict[str, list[float]]:
    """All values of each kind of latency, in seconds; kinds without any are left out."""
    good = [record for record in records if record.error is None]
    samples = {
        "ttft": [record.ttft for record in good if record.ttft is not None],
        "tpot": [record.tpot for record in good if record.tpot is not None],
        "itl": [gap for record in good for gap in record.itl],
        "step": list(steps),
        "e2e": [record.e2e for record in good],
    }
    return {name: values for name, values in samples.items() if values}


def summarize(
    records: Sequence[Record],
    duration: float,
    steps: Sequence[float] = (),
    floor: float | None = None,
    step_floor: float | None = None,
    ceilings: str | None = None,
) -> Summary:
    """The numbers of a run that took `duration` seconds. steps: times of single decode steps, where known."""
    good, names = [record for record in records if record.error is None], ("num_prompt", "num_output", "num_cached")
    num_prompt, num_output, num_cached = (sum(getattr(record, name) for record in good) for name in names)
    per_second = 1 / duration if duration > 0 else 0.0
    rates = len(good) * per_second, num_prompt * per_second, num_output * per_second
    latencies = {name: statistics(values) for name, values in latency_samples(records, steps).items()}
    errors = dict(Counter(record.error for record in records if record.error is not None).most_common())
    counts = len(records), len(records) - len(good), duration, num_prompt, num_output, num_cached
    return Summary(*counts, *rates, latencies, errors, floor, step_floor, ceilings)


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum in milliseconds, of values in seconds."""
    array = np.asarray(values) * 1000
    points = {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(array, PERCENTILES), strict=True)}
    return {"mean": float(array.mean()), **points, "max": float(array.max())}


def print_summary(title: str, summary: Summary, console: Console | None = None) -> None:
    """Two tables: throughput and latencies; then the errors, most frequent first."""
    console = console or Console()
    totals = Table(title=title, title_justify="left", show_header=False)
    done = summary.num_requests - summary.num_failed
    hit = 100 * summary.num_cached / max(1, summary.num_prompt)
    for name, value in (
        ("requests", f"{done} done, {summary.num_failed} failed"),
        ("duration", f"{summary.duration:.2f} s"),
        ("tokens", f"{summary.num_prompt} in ({hit:.0f}% from the cache), {summary.num_output} out"),
        ("throughput", f"{summary.request_rate:.2f} requests/s"),
        ("", f"{summary.prompt_rate:.1f} tokens/s in"),
        ("", f"{summary.output_rate:.1f} tokens/s out"),
        *(("floor", text) for text in summary.floor_texts()),
    ):
        totals.add_row(name, value)
    console.print(totals)
    if summary.latencies:
        table = Table("latency (ms)")
        for column in next(iter(summary.latencies.values())):
            table.add_column(column, justify="right")
        for name, values in summary.latencies.items():
            digits = 3 if name == "step" else 1
            table.add_row(f"{LATENCIES[name]} ({name})", *(f"{value:.{digits}f}" for value in values.values()))
        console.print(table)
    for error, count in list(summary.errors.items())[:5]:
        console.print(f"{count} × {error}", style="red", markup=False)


def make_document(config: Mapping[str, Any], summary: Summary) -> dict[str, Any]:
    """The numbers, and everything that makes them repeatable."""
    return {
        "version": __version__,
        "commit": describe_commit(),
        "command": ["minisgl", *sys.argv[1:]],
        "machine": describe_machine(),
        "config": dict(config),
        "summary": asdict(summary),
    }


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on; nothing that names the machine or its owner."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    torch = sys.modules.get("torch")
    cuda = torch.cuda if torch is not None and torch.cuda.is_available() else None
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": f"{cuda.device_count()} x {cuda.get_device_name()}" if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def check_files(**files: str | None) -> None:
    """Called before a run, which may take long. Raises: ConfigError when they could not be written after it."""
    for name, path in files.items():
        if path and not Path(path).parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no such directory")


def write_files(args: Any, summary: Summary, records: Sequence[Record], steps: Sequence[object] = ()) -> None:
    """What `--json` and `--output` ask for. Raises: ConfigError naming the file that cannot be written."""
    plain = (int, float, dict, type(None))
    config = {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
    document = make_document(config, summary)
    with naming(args.json or args.output):
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(document) + "\n")
        if args.output:
            document["requests"], document["steps"] = [asdict(record) for record in records], list(steps)
            Path(args.output).write_text(json.dumps(document, indent=1) + "\n")


def describe_commit() -> str | None:
    """The commit that the package was run from, with a mark for local changes; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
