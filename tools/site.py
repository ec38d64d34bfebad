"""For mkdocs: what documents say of files outside of `docs/` is text on the site, where these files are not. And the
page of the Python API lists the options of `LLM`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from minisgl.config.args import ServerArgs, make_parser

_OPTIONS = "<!-- options of LLM -->"


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Links that lead out of the folder lose their address, and a mark becomes a table."""
    up = r"\.\./" * (1 + page.file.src_uri.count("/"))
    markdown = re.sub(rf"\[([^\]]+)\]\({up}[^)]*\)", r"\1", markdown)
    return markdown.replace(_OPTIONS, options() if _OPTIONS in markdown else "")


def options() -> str:
    """The options by their names as keywords, with defaults and what --help says."""
    helps = {action.dest: str(action.help) for action in make_parser()._actions}
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(ServerArgs):
        text = helps[field.name].partition(" (default:")[0].replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{field.default!r}` | {text} |")
    return "\n".join(lines)
