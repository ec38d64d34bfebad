"""The line budget: `python/minisgl` stays readable in a weekend. Exit status 1 over it; long files are named."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "python" / "minisgl"
BUDGET = 10_000  # lines of Python for everything, tests aside
LONG_FILE = 500


def main() -> int:
    sizes = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    total = sum(sizes.values())
    for path, size in sorted(sizes.items()):
        if size > LONG_FILE:
            print(f"warning: {path} has {size} lines; {LONG_FILE} is where a file should be split")
    print(f"python/minisgl: {total} lines of {BUDGET}")
    return int(total > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
