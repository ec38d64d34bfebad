"""The line budget: what serves stays readable in a weekend. Exit status 1 over it; long files are named.

Kernels and the tools beside the server have budgets of their own (docs/adr/0005-line-budgets.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "python" / "minisgl"
KERNELS, TOOLS = ("kernel",), ("benchmark", "doctor")
BUDGETS = {"serving": 10_000, "kernels, their Python side": 2_500, "benchmark and doctor": 1_800}  # lines of Python
LONG_FILE = 500


def part_of(path: Path) -> str:
    top = path.parts[0]
    serving, kernels, tools = BUDGETS
    return kernels if top in KERNELS else tools if top in TOOLS else serving


def main() -> int:
    totals = dict.fromkeys(BUDGETS, 0)
    for file in sorted(PACKAGE.rglob("*.py")):
        path, size = file.relative_to(PACKAGE), len(file.read_text().splitlines())
        totals[part_of(path)] += size
        if size > LONG_FILE:
            print(f"warning: {path} has {size} lines; {LONG_FILE} is where a file should be split")
    for part, total in totals.items():
        print(f"{part}: {total} lines of {BUDGETS[part]}")
    return int(any(total > BUDGETS[part] for part, total in totals.items()))


if __name__ == "__main__":
    sys.exit(main())
