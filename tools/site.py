"""For mkdocs: what documents say of files outside of `docs/` is text on the site, where these files are not. The page
of the Python API lists the options of `LLM`. And pages with diagrams have the script that draws them, from the site."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

from minisgl.config.args import ServerArgs, make_parser

_OPTIONS = "<!-- options of LLM -->"
_MERMAID = "assets/mermaid.min.js"
_FETCHED = Path(__file__).parent.parent / "build" / "mermaid.min.js"


def on_files(files: Files, config: Any, **_: object) -> None:
    """The site has the script that tools/mermaid.py has fetched."""
    if not _FETCHED.is_file():
        raise PluginError(f"{_FETCHED} is missing: make docs-site fetches it")
    files.append(File.generated(config, _MERMAID, abs_src_path=str(_FETCHED)))


def on_post_page(output: str, page: Any, **_: object) -> str:
    """Where it is loaded, the theme does not load another one from elsewhere."""
    script = f'<script src="{get_relative_url(_MERMAID, page.url)}"></script>\n'
    return output.replace("</head>", f"{script}</head>", 1) if 'class="mermaid"' in output else output


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
