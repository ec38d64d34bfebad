"""Ask each address that the documents link to whether it is still there: `python tools/check_links.py`, for a nightly
run on a machine with a network. Addresses of examples are left out. Exit status 1 when one is gone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"""(?:\]\(|<)(https?://[^\s)>"']+)""")  # of Markdown; what stands in code is no link
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
OURS = ("127.0.0.1", "localhost")
EXAMPLES = (".example", "example.org", "example.com")
THERE = (200, 401, 403, 405, 429, 503)  # also those that turn programs away
AGENT = {"User-Agent": "Mozilla/5.0 (compatible; minisgl-links)"}


def documents() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    for folder in ("docs", "benchmark", "page"):
        yield from (path for path in (ROOT / folder).rglob("*.md") if "node_modules" not in path.parts)


def links() -> dict[str, list[str]]:
    """Each address that somebody else answers, and the documents that link to it."""
    found: dict[str, list[str]] = {}
    for path in documents():
        for address in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
            host = urlsplit(address).hostname or ""
            if host not in OURS and not host.endswith(EXAMPLES):
                found.setdefault(address.partition("#")[0], []).append(str(path.relative_to(ROOT)))
    return found


def problem(address: str) -> str:
    """Why it cannot be had; "" when it can."""
    try:
        with httpx.Client(follow_redirects=True, timeout=20, headers=AGENT) as client:
            status = client.head(address).status_code
            if status not in THERE:
                status = client.get(address).status_code  # some have no answer to HEAD
    except httpx.HTTPError as error:
        return f"{type(error).__name__} {error}".strip()
    return "" if status in THERE else f"status {status}"


def main() -> int:
    found = links()
    with ThreadPoolExecutor(8) as pool:
        problems = dict(zip(found, pool.map(problem, found), strict=True))
    for address, what in problems.items():
        if what:
            print(f"{', '.join(sorted(set(found[address])))}: {address}: {what}")
    num = sum(map(bool, problems.values()))
    print(f"{len(found)} addresses, {num} that cannot be had")
    return int(num > 0)


if __name__ == "__main__":
    sys.exit(main())
