"""For mkdocs: what documents say of files outside of `docs/` is text on the site, where these files are not."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links that lead out of the folder lose their address."""
    return _OUTSIDE.sub(r"\1", markdown)
