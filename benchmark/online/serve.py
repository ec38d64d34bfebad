"""Latency under load: a server of a shape, and `minisgl bench serve` at several rates of arrival.

    python benchmark/online/serve.py [--shape qwen3-0.6b] [--rates 4 16 64 inf] [--trace FILE] [--json FILE] [flags]

Further flags go to the server (`--tp 4`, `--page-size 16`). Prints a Markdown table: a row for each
rate, or for the trace.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisgl.benchmark import run_script
from minisgl.benchmark.shapes import write_shape
from minisgl.config.args import parse_args


@contextlib.contextmanager
def serving(model: Path, flags: list[str], seconds: float) -> Iterator[str]:
    """A server of the shape in `model`, on a free port. Yields its URL."""
    log = model / "server.log"
    command = [sys.executable, "-m", "minisgl", "--model", str(model), "--dummy-weight", "--port", "0", *flags]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _wait_ready(server, log, seconds)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_ready(server: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("minisgl serves"):
                return line.split(" at ")[1]
        time.sleep(0.2)
    raise SystemExit(f"the server is not ready:\n{log.read_text(errors='replace')[-4000:]}")


def measure(flags: list[str], directory: Path, timeout: float) -> dict[str, Any]:
    """The JSON document of one run of `minisgl bench serve`. Raises: SystemExit with its words when it fails."""
    line = directory / "line"
    line.unlink(missing_ok=True)
    command = [sys.executable, "-m", "minisgl", "bench", "serve", *flags, "--json", str(line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode or not line.exists():
        raise SystemExit(done.stdout + done.stderr)
    document: dict[str, Any] = json.loads(line.read_text())
    return document


def row(name: str, summary: dict[str, Any]) -> str:
    latencies = summary["latencies"]
    cells = [f"{latencies[kind]['p50']:.1f} / {latencies[kind]['p99']:.1f}" for kind in ("ttft", "itl", "e2e")]
    share = f"{100 * summary['floor'] / summary['duration']:.1f} %" if summary["floor"] else ""
    rates = f"{summary['request_rate']:.1f} | {summary['output_rate']:,.0f} | {share}"
    return f"| {name} | {rates} | {' | '.join(cells)} | {summary['num_failed']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--rates", nargs="+", default=["4", "16", "64", "inf"], help="requests/s")
    parser.add_argument("--trace", help="a trace in place of the rates")
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--input-len", default="100:1024")
    parser.add_argument("--output-len", default="100:1024")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one run, and to start the server")
    parser.add_argument("--json", type=Path, metavar="FILE.jsonl", help="append one line for each run")
    args, server_flags = parser.parse_known_args()
    parse_args(server_flags)  # a wrong one is told before anything is started
    load = ["--shape", args.shape, "--ignore-eos", "--temperature", "0.6", "--warmup", "8", "--vocab-size", "4096"]
    load += ["--num-prompts", str(args.num_prompts), "--input-len", args.input_len, "--output-len", args.output_len]
    with tempfile.TemporaryDirectory() as directory:
        model = write_shape(args.shape, directory)
        with serving(model, server_flags, args.timeout) as url:
            print("Latencies in ms, p50 / p99.\n")
            print("| | requests/s | tok/s | share of the floor | TTFT | ITL | E2E | failed |")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            runs = [("trace", ["--trace", args.trace])] if args.trace else []
            runs = runs or [(f"{rate}/s", ["--request-rate", rate]) for rate in args.rates]
            for name, flags in runs:
                document = measure(["--base-url", url, *load, *flags], model, args.timeout)
                print(row(name, document["summary"]), flush=True)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps({"name": name, "shape": args.shape, **document}) + "\n")


if __name__ == "__main__":
    run_script(main)
