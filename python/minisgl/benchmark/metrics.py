"""What a benchmark measures, as numbers, table, JSON and plot. Times are in seconds inside, milliseconds when shown."""

from __future__ import annotations

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
from minisgl.errors import ConfigError

PERCENTILES = (50, 90, 99)
LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
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
    """A run's totals over its successful requests, rates per second of `duration`, latencies in milliseconds."""

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


def summarize(records: Sequence[Record], duration: float) -> Summary:
    """The numbers of a run that took `duration` seconds."""
    good = [record for record in records if record.error is None]
    samples: dict[str, list[float]] = {
        "ttft": [record.ttft for record in good if record.ttft is not None],
        "tpot": [record.tpot for record in good if record.tpot is not None],
        "itl": [gap for record in good for gap in record.itl],
        "e2e": [record.e2e for record in good],
    }
    num_prompt = sum(record.num_prompt for record in good)
    num_output = sum(record.num_output for record in good)
    per_second = 1 / duration if duration > 0 else 0.0
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        duration=duration,
        num_prompt=num_prompt,
        num_output=num_output,
        num_cached=sum(record.num_cached for record in good),
        request_rate=len(good) * per_second,
        prompt_rate=num_prompt * per_second,
        output_rate=num_output * per_second,
        latencies={name: statistics(values) for name, values in samples.items() if values},
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
    )


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
    ):
        totals.add_row(name, value)
    console.print(totals)
    if summary.latencies:
        table = Table("latency (ms)")
        for column in next(iter(summary.latencies.values())):
            table.add_column(column, justify="right")
        for name, values in summary.latencies.items():
            table.add_row(f"{LATENCIES[name]} ({name})", *(f"{value:.1f}" for value in values.values()))
        console.print(table)
    for error, count in list(summary.errors.items())[:5]:
        console.print(f"{count} × {error}", style="red", markup=False)


def write_json(path: str, config: Mapping[str, Any], summary: Summary, records: Sequence[Record]) -> None:
    """Everything that makes the numbers repeatable, and the raw numbers. Raises: ConfigError when it cannot."""
    document = {
        "version": __version__,
        "commit": _commit(),
        "command": ["minisgl", *sys.argv[1:]],
        "machine": describe_machine(),
        "config": dict(config),
        "summary": asdict(summary),
        "requests": [asdict(record) for record in records],
    }
    try:
        Path(path).write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from None


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on; nothing that names the machine or its owner."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def check_files(output: str | None, plot: str | None) -> None:
    """Called before a run, which may take long. Raises: ConfigError when they could not be written after it."""
    for flag, path in (("--output", output), ("--plot", plot)):
        if path and not Path(path).parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no such directory")
    if plot:
        _require_matplotlib()


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'minisgl[plot]'") from None


def write_plot(path: str, title: str, records: Sequence[Record]) -> None:
    """Cumulative distributions of the latencies. Raises: ConfigError when the file cannot be written."""
    from matplotlib.figure import Figure

    good = [record for record in records if record.error is None]
    samples = {
        "ttft": [record.ttft for record in good if record.ttft is not None],
        "tpot": [record.tpot for record in good if record.tpot is not None],
        "itl": [gap for record in good for gap in record.itl],
        "e2e": [record.e2e for record in good],
    }
    samples = {name: values for name, values in samples.items() if values} or {"e2e": []}
    figure = Figure(figsize=(4 * len(samples), 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, values) in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples.items(), strict=True):
        ordered = np.sort(np.asarray(values, dtype=float)) * 1000
        axes.step(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), where="post")
        axes.set(xlabel=f"{LATENCIES[name]} (ms)", ylabel="share of samples", ylim=(0, 1.02))
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None


def _commit() -> str | None:
    """The commit that the package was run from, with a mark for local changes; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
