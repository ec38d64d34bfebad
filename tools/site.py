"""For mkdocs: what documents say of files outside of `docs/` is text on the site, where these files are not."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Links that lead out of the folder lose their address."""
    up = r"\.\./" * (1 + page.file.src_uri.count("/"))
    return re.sub(rf"\[([^\]]+)\]\({up}[^)]*\)", r"\1", markdown)
