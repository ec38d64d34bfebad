"""What the lessons of `docs/learn/` say of the code: the table of messages, and the lines that links point at.

`python -m tools.lessons` says what is not true any more (exit status 1), `--write` makes it true.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import UnionType

import msgspec

from minisgl.message import messages

ROOT = Path(__file__).parent.parent
LESSONS = ROOT / "docs" / "learn"
LINK = re.compile(r"\[`([\w.]+)`\]\((\S+?\.py)#L(\d+)\)")
TABLE = re.compile(r"(<!-- messages -->\n).*?(<!-- /messages -->)", re.DOTALL)
CHANNELS = {  # who receives, and what
    "tokenizers, detokenizer": messages.TokenizerMsg,
    "scheduler of rank 0": messages.BackendMsg,
    "other ranks": messages.RankMsg,
    "API server": messages.FrontendMsg,
}


def message_table() -> str:
    """Channel → message → fields, as Markdown."""
    lines = ["| to | message | fields |", "|---|---|---|"]
    for channel, union in CHANNELS.items():
        assert isinstance(union, UnionType)
        for message in union.__args__:
            fields = ", ".join(f"`{field.name}`" for field in msgspec.structs.fields(message))
            lines.append(f"| {channel} | `{message.__name__}` | {fields} |")
    return "\n".join(lines) + "\n"


def line_of(path: Path, name: str) -> int | None:
    """The line on which `Class.method`, or any other definition of the module, begins."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    found: ast.stmt | None = None
    for part in name.split("."):
        named = (node for node in body if part in _names(node))
        found = next(named, None)
        body = found.body if isinstance(found, ast.ClassDef) else []
    return found.lineno if found is not None else None


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def brought_up_to_date(path: Path, text: str) -> str:
    """Raises: ValueError for a link to what is not there."""

    def link(match: re.Match[str]) -> str:
        name, file, _ = match.groups()
        source = (path.parent / file).resolve()
        line = line_of(source, name) if source.is_file() else None
        if line is None:
            raise ValueError(f"{path.relative_to(ROOT)}: there is no {name} in {file}")
        return f"[`{name}`]({file}#L{line})"

    return TABLE.sub(lambda match: match[1] + message_table() + match[2], LINK.sub(link, text))


def main(argv: list[str]) -> int:
    stale = []
    for path in sorted(LESSONS.rglob("*.md")):
        text = path.read_text()
        new = brought_up_to_date(path, text)
        if new != text and "--write" in argv:
            path.write_text(new)
        elif new != text:
            stale.append(
                f"{path.relative_to(ROOT)}: links or tables are not up to date (python -m tools.lessons --write)"
            )
    print("\n".join(stale) or "lessons: every line and message that they name is there")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
