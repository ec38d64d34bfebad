"""Tables and plots from what benchmarks wrote.

    python benchmark/plot.py results.jsonl ... [--write]       results beside peers and floors (docs/benchmarks.md)
    python benchmark/plot.py --latencies run.json OUT.png       distributions of one run's latencies (its --output file)

The lines are those of `minisgl bench offline --json`; of several runs of one row the median counts. `--write` puts the
table between the marks in docs/benchmarks.md, and the plot into docs/img/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisgl.benchmark import run_script
from minisgl.benchmark.metrics import LATENCIES, Record, latency_samples
from minisgl.errors import ConfigError

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # type: ignore[assignment, misc]

DOCS = Path(__file__).parent.parent / "docs"
MARKS = ("<!-- results -->", "<!-- end of results -->")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: which run it is, and what others reach on the same kind of GPU (H200), bf16.

    Throughput in tokens/s where `streams` is 0 (the standard workload), else milliseconds of a step of so many streams.
    """

    shape: str
    tp_size: int
    streams: int
    sglang: float | None  # mini-sglang, FlashAttention 3 and FlashInfer
    vllm: float  # 0.26

    @property
    def label(self) -> str:
        gpus = f", {self.tp_size} GPUs" if self.tp_size > 1 else ""
        load = f"{self.streams} stream{'s' if self.streams > 1 else ''}" if self.streams else "256 requests"
        return f"{self.shape[:-1].capitalize()}B, {load}{gpus}"


ROWS = [
    Row("qwen3-0.6b", 1, 0, 21_600, 22_900),
    Row("qwen3-14b", 1, 0, 5_970, 6_020),
    Row("qwen3-0.6b", 1, 1, 1.83, 1.84),
    Row("qwen3-0.6b", 1, 16, 1.98, 2.21),
    Row("qwen3-14b", 1, 1, 8.76, 8.75),
    Row("qwen3-14b", 1, 16, 9.43, 9.43),
    Row("qwen3-32b", 4, 0, None, 7_870),
    Row("qwen3-32b", 2, 0, None, 4_935),
    Row("qwen3-32b", 4, 1, None, 7.23),
    Row("qwen3-32b", 2, 1, None, 11.25),
]


def find(row: Row, documents: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """(what minisgl reaches, the floor), in the row's unit; medians over its runs."""
    values = []
    for document in documents:
        config, summary = document["config"], document["summary"]
        kind = (config["shape"], config["engine"].get("tensor_parallel_size", 1), config["workload"])
        if kind != (row.shape, row.tp_size, "streams" if row.streams else "standard"):
            continue
        if row.streams and config["num_prompts"] == row.streams:
            values.append((summary["latencies"]["step"]["p50"], 1000 * summary["step_floor"]))
        elif not row.streams:
            values.append((summary["output_rate"], summary["num_output"] / summary["floor"]))
    return (statistics.median(v for v, _ in values), statistics.median(f for _, f in values)) if values else None


def table(documents: Sequence[dict[str, Any]]) -> str:
    lines = ["| | floor | mini-sglang | vLLM 0.26 | minisgl | share of the floor |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        found = find(row, documents)
        digits, unit = (2, "ms") if row.streams else (0, "tok/s")
        value, floor = found or (None, None)
        share = f"{100 * (floor / value if row.streams else value / floor):.0f} %" if value and floor else "–"
        cells = [f"{n:,.{digits}f} {unit}" if n else "–" for n in (floor, row.sglang, row.vllm, value)]
        lines.append(f"| {row.label} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def plot(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of every row that was measured: throughput as a share of the floor, so that one scale fits all."""
    measured = [(row, found) for row in ROWS if (found := find(row, documents))]
    figure = Figure(figsize=(9, 1 + 0.55 * len(measured)), layout="constrained")
    axes = figure.subplots()
    for position, (row, (value, floor)) in enumerate(measured):
        for offset, (name, color, number) in enumerate(
            (("minisgl", "C0", value), ("mini-sglang", "C1", row.sglang), ("vLLM 0.26", "C2", row.vllm))
        ):
            if number:
                share = 100 * (floor / number if row.streams else number / floor)
                label = name if position == 0 else None
                bars = axes.barh(position + 0.27 * (offset - 1), share, 0.25, color=color, label=label)
                axes.bar_label(bars, [f"{number:,.2f} ms" if row.streams else f"{number:,.0f} tok/s"], padding=2)
    axes.set(yticks=range(len(measured)), yticklabels=[row.label for row, _ in measured], xlim=(0, 115))
    axes.set_xlabel("share of the floor, %")
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_latencies(source: Path, path: Path) -> None:
    """Cumulative distributions of the latencies of one run."""
    try:
        document = json.loads(source.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--latencies {source}: {error}") from None
    records = [Record(**request) for request in document["requests"]]
    samples = latency_samples(records, document["steps"])
    figure = Figure(figsize=(4 * len(samples), 3.6), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples.items(), strict=True):
        ordered = sorted(1000 * value for value in values)
        axes.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")
        axes.set(xlabel=f"{LATENCIES[name]} (ms)", ylabel="share of samples", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def read_documents(file: Path) -> list[dict[str, Any]]:
    """The lines of `minisgl bench offline --json` in a file. Raises: ConfigError naming the file."""
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
    return [line for line in lines if isinstance(line, dict) and "engine" in line.get("config", {})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md and docs/img/benchmarks.png")
    parser.add_argument("--latencies", nargs=2, type=Path, metavar=("FILE.json", "OUT.png"))
    args = parser.parse_args()
    if Figure is None and (args.latencies or args.write):
        raise ConfigError("plots need matplotlib: pip install matplotlib, or minisgl's extra `plot`")
    if args.latencies:
        plot_latencies(*args.latencies)
        return
    documents = [document for file in args.files for document in read_documents(file)]
    print(table(documents))
    if args.write:
        page = DOCS / "benchmarks.md"
        before, rest = page.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        page.write_text(f"{before}{MARKS[0]}\n{table(documents)}\n{MARKS[1]}{after}")
        plot(documents, DOCS / "img" / "benchmarks.png")


if __name__ == "__main__":
    run_script(main)
