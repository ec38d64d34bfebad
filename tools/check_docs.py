"""Documents rot where nobody looks: check that each relative link and each `path/in/backticks` of a document exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "minisgl"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
CODE_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|md|toml|txt|cpp|cu|h)|[\w.-]+(?:/[\w.-]+)*/)`")


def missing_paths(document: Path) -> list[str]:
    """What `document` names and is not there: looked for beside it, at the root, anywhere in the package."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    names = LINK.findall(text) + CODE_PATH.findall(text)
    bases = (document.parent, ROOT, PACKAGE)
    found = {name for name in names if any((base / name).exists() for base in bases)}
    return sorted({name for name in names if name not in found and not any(PACKAGE.rglob(name))})


def main() -> int:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmark").rglob("*.md")]
    problems = [f"{path.relative_to(ROOT)}: no such file: {name}" for path in documents for name in missing_paths(path)]
    print("\n".join(problems) or f"{len(documents)} documents: every file that they name exists")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
