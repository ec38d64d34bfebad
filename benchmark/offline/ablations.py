"""What each part is worth: the standard workload with one thing changed at a time.

    python benchmark/offline/ablations.py [--shape qwen3-0.6b] [--only GROUP ...] [--quick] [--json FILE] [flags]

Groups: overlap, graphs, radix, backends, chunks. Further flags go to every run (`--tp 4`, `--page-size 16`). Each run
is a fresh process with a time limit; one that fails is a row with its error, and the others go on. Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minisgl.benchmark import offline, run_script
from minisgl.config.args import parse_args

# With prompts that share most of their tokens, so that a cache has something to find.
SHARED = ["--workload", "prefix", "--num-prompts", "256", "--prefix-len", "1024", "--input-len", "16:128"]
SHARED += ["--output-len", "64:256", "--vocab-size", "10001", "--temperature", "0.6", "--warmup", "8"]
STANDARD = ["--workload", "standard"]
GROUPS = ("overlap", "graphs", "radix", "backends", "chunks")
QUICK = ["--num-prompts", "64", "--output-len", "64:128"]


def make_runs(backends: list[str], chunks: list[int]) -> list[tuple[str, str, list[str]]]:
    """(group, name, flags) of each run."""
    return [
        ("base", "defaults", STANDARD),
        ("overlap", "overlap off", [*STANDARD, "--disable-overlap"]),
        ("graphs", "graphs off", [*STANDARD, "--cuda-graph-max-bs", "0"]),
        ("graphs", "graphs and overlap off", [*STANDARD, "--cuda-graph-max-bs", "0", "--disable-overlap"]),
        ("radix", "shared prefix, radix cache", [*SHARED, "--cache", "radix"]),
        ("radix", "shared prefix, no cache", [*SHARED, "--cache", "naive"]),
        *(("backends", f"attention {pair}", [*STANDARD, "--attn", pair]) for pair in backends),
        *(("chunks", f"steps of {n} tokens", [*STANDARD, "--max-prefill-length", str(n)]) for n in chunks),
    ]


def measure(flags: list[str], timeout: float) -> dict[str, Any]:
    """The JSON document of one run of `minisgl bench offline`, or {"error": its last words}."""
    with tempfile.TemporaryDirectory() as directory:
        line = Path(directory) / "line"
        command = [sys.executable, "-m", "minisgl", "bench", "offline", *flags, "--json", str(line)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout:g} s"}
        if done.returncode == 0 and line.exists():
            document: dict[str, Any] = json.loads(line.read_text())
            return document
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": words[-1]}


def row(name: str, document: dict[str, Any], base: float | None) -> str:
    if "error" in document:
        return f"| {name} | {document['error']} | | | |"
    summary = document["summary"]
    rate, ttft = summary["output_rate"], summary["latencies"]["ttft"]["p50"]
    share = f"{100 * summary['floor'] / summary['duration']:.1f} %" if summary["floor"] else ""
    ratio = f"{rate / base:.3f}" if base else ""
    return f"| {name} | {rate:,.0f} | {share} | {ratio} | {ttft:,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument(
        "--only", nargs="+", default=[], choices=GROUPS, help="groups; the defaults are always measured"
    )
    parser.add_argument("--backends", nargs="+", default=["triton", "triton,cuda", "fa,cuda", "fa", "fi"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--quick", action="store_true", help="64 requests with short outputs")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds of one run")
    parser.add_argument("--json", type=Path, metavar="FILE.jsonl", help="append one line for each run")
    args, further = parser.parse_known_args()
    _, flags = offline.make_parser().parse_known_args(further)
    parse_args(flags)  # a wrong one is told once, before any run
    print("| | tok/s | share of the floor | ratio | TTFT p50, ms |\n|---|---|---|---|---|", flush=True)
    bases: dict[str, float] = {}  # of each workload: its first run
    for group, name, flags in make_runs(args.backends, args.chunks):
        if args.only and group not in ("base", *args.only):
            continue
        quick = QUICK if args.quick else []
        document = measure(["--shape", args.shape, *flags, *quick, *further], args.timeout)
        base = bases.setdefault(flags[1], document.get("summary", {}).get("output_rate"))
        print(row(name, document, base), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps({"group": group, "name": name, "shape": args.shape, **document}) + "\n")


if __name__ == "__main__":
    run_script(main)
