"""The line budget: what serves stays readable in a weekend. Exit status 1 over it; long files are named.

The HTTP API, kernels, and the tools beside the server have budgets of their own (docs/adr/0005-line-budgets.md, 0007).
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "python" / "minisgl"
PARTS = {  # folders, and their budget in lines of Python
    "from text to tokens and back": ((), 11_150),  # all that is not named below
    "the HTTP API": (("server", "parser", "grammar"), 6_200),
    "kernels, their Python side": (("kernel",), 2_500),
    "benchmark and doctor": (("benchmark", "doctor"), 1_800),
}
LONG_FILE = 500


def part_of(path: Path) -> str:
    return next((part for part, (folders, _) in PARTS.items() if path.parts[0] in folders), next(iter(PARTS)))


def main() -> int:
    totals = dict.fromkeys(PARTS, 0)
    for file in sorted(PACKAGE.rglob("*.py")):
        path, size = file.relative_to(PACKAGE), len(file.read_text().splitlines())
        totals[part_of(path)] += size
        if size > LONG_FILE:
            print(f"warning: {path} has {size} lines; {LONG_FILE} is where a file should be split")
    for part, total in totals.items():
        print(f"{part}: {total} lines of {PARTS[part][1]}")
    return int(any(total > PARTS[part][1] for part, total in totals.items()))


if __name__ == "__main__":
    sys.exit(main())
