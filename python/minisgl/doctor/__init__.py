"""`minisgl doctor`: one table that says whether this machine can serve, and how to mend what cannot.

Exit status 0 when nothing fails, 1 otherwise, 2 for a wrong command line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from minisgl.config.args import ArgumentParser, argument, integer
from minisgl.doctor import system, toolchain
from minisgl.doctor.row import Row, Status, guarded

_STYLES: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "bold red"),
    "n/a": ("–", "dim"),
}


def examine(model: str | None, host: str, port: int) -> list[Row]:
    """All checks, in the table's order. Takes some seconds; changes nothing on the machine."""
    torch = toolchain.probe_torch()
    smi = toolchain.ask_nvidia_smi()
    rows = [
        guarded("Python", system.check_python),
        guarded("torch", lambda: toolchain.check_torch(torch)),
        guarded("NVIDIA driver", lambda: toolchain.check_driver(smi, torch)),
        guarded("GPUs", lambda: toolchain.check_gpus(smi, torch)),
        guarded("CPU", system.check_cpu),
        guarded("Memory", lambda: system.check_memory(needed=system.weight_bytes(model))),
        guarded("libstdc++", toolchain.check_libstdcxx),
        guarded("C++ compiler", lambda: toolchain.check_compiler(toolchain.find_compiler())),
        guarded("Python headers", toolchain.check_headers),
        guarded("nvcc", lambda: toolchain.check_nvcc(toolchain.find_nvcc(), torch)),
        guarded("backends", lambda: toolchain.check_backends(torch)),
        guarded("Port", lambda: system.check_port(host, port)),
        guarded("Model", lambda: system.check_model(model)),
    ]
    return [row for group in rows for row in group]


def print_table(rows: Sequence[Row], console: Console) -> None:
    """The table, and below it a line that sums it up."""
    table = Table(title="minisgl doctor", title_justify="left")
    for title in ("check", "", "found"):
        table.add_column(title, overflow="fold")
    for row in rows:
        label, style = _STYLES[row.status]
        fix = f"\n→ {row.fix}" if row.fix else ""
        table.add_row(
            row.name, f"[{style}]{label}[/]", _escape(row.detail) + (f"[{style}]{_escape(fix)}[/]" if fix else "")
        )
    console.print(table)
    counts = {status: sum(row.status == status for row in rows) for status in _STYLES}
    verdict = "cannot serve yet" if counts["fail"] else "ready to serve"
    console.print(f"{verdict}: {counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status. Raises: ConfigError for a wrong command line."""
    parser = ArgumentParser(prog="minisgl doctor", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", "--model-path", help="directory or hub id to look at (default: the built-in demo model)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address of the server")
    parser.add_argument("--port", type=argument(integer(0, 65535)), default=1919, help="port of the server")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    rows = examine(args.model, args.host, args.port)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows, Console())
    return int(any(row.status == "fail" for row in rows))


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
