"""`minisgl doctor`: one table that says whether this machine can serve, and how to mend what cannot.

Exit status 0 when nothing fails, 1 otherwise, 2 for a wrong command line.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minisgl.config.args import ArgumentParser, argument, integer
from minisgl.config.probe import PACKAGES, probe
from minisgl.doctor import system, toolchain
from minisgl.doctor.row import Row, Status, guarded
from minisgl.utils.log import told

_STYLES: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "bold red"),
    "n/a": ("–", "dim"),
}


def examine(model: str | None, host: str, port: int) -> list[Row]:
    """All checks, in the table's order. Takes some seconds, a minute where a kernel is compiled for the first time."""
    torch, machine, path = toolchain.probe_torch(), probe(), system.find_model(model)
    checks: dict[str, Callable[[], Row | list[Row]]] = {
        "Python": system.check_python,
        "torch": lambda: toolchain.check_torch(torch),
        "NVIDIA driver": lambda: toolchain.check_driver(machine, torch),
        "GPUs": lambda: toolchain.check_gpus(machine, torch),
        "CPU": lambda: system.check_cpu(machine),
        "Memory": lambda: system.check_memory(machine),
        "libstdc++": toolchain.check_libstdcxx,
        "C++ compiler": lambda: toolchain.check_compiler(toolchain.find_compiler()),
        "nvcc": lambda: toolchain.check_nvcc(machine, torch),
        "packages": lambda: [toolchain.check_package(module, bool(machine.gpus)) for module in PACKAGES],
        "Port": lambda: system.check_port(host, port),
        "Model": lambda: system.check_model(model, path),
        "Configuration": lambda: system.check_configuration(path, machine),
    }
    return [row for name, check in checks.items() for row in guarded(name, check)]


def print_table(rows: Sequence[Row], console: Console) -> None:
    """The table, and below it a line that sums it up."""
    table = Table(title="minisgl doctor", title_justify="left")
    for title in ("check", "", "found"):
        table.add_column(title, overflow="fold")
    for row in rows:
        label, style = _STYLES[row.status]
        fix = f"\n→ {row.fix}" if row.fix else ""
        table.add_row(
            row.name, f"[{style}]{label}[/]", escape(row.detail) + (f"[{style}]{escape(fix)}[/]" if fix else "")
        )
    console.print(table)
    counts = {status: sum(row.status == status for row in rows) for status in _STYLES}
    verdict = "cannot serve yet" if counts["fail"] else "ready to serve"
    console.print(f"{verdict}: {counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")


def main(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status. Raises: ConfigError for a wrong command line."""
    parser = ArgumentParser(prog="minisgl doctor", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", "--model-path", help="directory or hub id (default: the built-in demo model)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the server")
    parser.add_argument("--port", type=argument(integer(0, 65535)), default=1919, help="port of the server")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    with told("examining this machine"):
        rows = examine(args.model, args.host, args.port)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_table(rows, Console())
    return int(any(row.status == "fail" for row in rows))
