"""The metrics of all replicas as one page."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"^([^\s{#]+)(?:\{(.*)\})?( .*)$")
_END = "# EOF"  # of OpenMetrics


def merged(pages: Mapping[str, str]) -> str:
    """One exposition of several, by the replicas' names: each family once, its samples with a label `replica`."""
    families: dict[str, tuple[list[str], list[str]]] = {}  # by name: what is said of it, and its samples
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# ") and line != _END:
                family = line.split(" ", 3)[2]
                about = families.setdefault(family, ([], []))[0]
                if line not in about:
                    about.append(line)
            elif (found := _SAMPLE.match(line)) is not None:
                labels = ",".join(filter(None, (found[2], f'replica="{replica}"')))
                families.setdefault(family, ([], []))[1].append(f"{found[1]}{{{labels}}}{found[3]}")
    lines = [line for about, samples in families.values() for line in (*about, *samples)]
    ends = [_END] * any(page.rstrip().endswith(_END) for page in pages.values())
    return "\n".join([*lines, *ends, ""])
