"""Documents rot where nobody looks: check that what a document or a module's docstring names is there: each relative
link and the heading behind it, each `path/in/backticks`, and each extra, which messages of the program name too."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "minisgl"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
ANCHOR = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
ENDINGS = "py|md|toml|txt|ya?ml|cc|cpp|cuh?|h"
CODE_PATH = re.compile(rf"`([\w.-]+(?:/[\w.-]+)*\.(?:{ENDINGS})|[\w.-]+(?:/[\w.-]+)*/)`")
EXTRA = re.compile(r"minisgl\[([\w,-]+)\]|extra `([\w-]+)`")
THEIRS = "from-mini-sglang.md"  # names files of another project; tests/unit/test_documents.py looks at ours
SOURCES = ("python", "tests", "tools", "benchmark")


def missing_paths(document: Path, text: str) -> list[str]:
    """Files that `text` names and that are not there: looked for beside it, at the root, anywhere in the package."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    bases = (document.parent, ROOT, PACKAGE, ROOT / "docs" / "learn" / "solutions")
    found = {
        name: any((base / name).exists() for base in bases) for name in LINK.findall(text) + CODE_PATH.findall(text)
    }
    return sorted(f"file: {name}" for name, is_there in found.items() if not is_there and not any(PACKAGE.rglob(name)))


def headings(text: str) -> set[str]:
    """What links may point to: a document's headings, in the form that links have."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def missing_headings(document: Path, text: str) -> list[str]:
    """Headings that links of `text` lead to, in it or in documents beside it, and that are not there."""
    missing = []
    for path, anchor in ANCHOR.findall(text):
        target = document.parent / path if path else document
        if target.suffix == ".md" and target.is_file() and anchor not in headings(target.read_text()):
            missing.append(f"heading: {path}#{anchor}")
    return missing


def missing_extras(text: str, extras: set[str]) -> list[str]:
    """Extras that `text` tells its readers to install and that pyproject.toml does not have."""
    named = {name for pair in EXTRA.findall(text) for names in pair for name in names.split(",") if name}
    return sorted(f"extra: {name}" for name in named - extras)


def read_extras(pyproject: str) -> set[str]:
    """The keys of pyproject.toml's table of extras. (Python 3.10 has no parser for it.)"""
    table = pyproject.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = ", table, flags=re.MULTILINE))


def main() -> int:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmark").rglob("*.md")]
    modules = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    extras = read_extras((ROOT / "pyproject.toml").read_text())
    problems = []
    for path in [*documents, *modules]:
        text = path.read_text()
        if path.name == THEIRS:
            continue
        told = (ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text
        missing = missing_paths(path, told) + missing_extras(text if path.is_relative_to(PACKAGE) else told, extras)
        missing += missing_headings(path, text) if path.suffix == ".md" else []
        problems += [f"{path.relative_to(ROOT)}: no such {what}" for what in missing]
    num = f"{len(documents)} documents and {len(modules)} modules"
    print("\n".join(problems) or f"{num}: every file, heading and extra that they name exists")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
