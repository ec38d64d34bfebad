"""Scan what the server needs, in the versions that are installed here, for published weaknesses (pip-audit).

Exit status 1 if there are any. Where the advisory service cannot be reached, or knows no packages, a line says that
nothing was scanned, and the status is 0: a build must not fail for want of a network. `--strict`: it is 1 then, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

SECONDS = 18  # for all of it


def needed(name: str) -> dict[str, str]:
    """The packages that this one needs, directly or not and without extras, and their versions here."""
    found: dict[str, str] = {}
    left = [name]
    while left:
        try:
            package = distribution(left.pop())
        except PackageNotFoundError:
            continue  # for another system
        if package.name in found:
            continue
        found[package.name] = Version(package.version).public  # without "+cpu"
        for text in package.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    del found[distribution(name).name]
    return found


def scan(packages: dict[str, str], seconds: float) -> list[dict[str, Any]]:
    """What the service says of each. Raises: OSError with the reason when it says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, answer = Path(folder, "wanted.txt"), Path(folder, "answer.json")
        wanted.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(wanted), "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--timeout", "5", "--format", "json", "--output", str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds), check=False)
        except subprocess.TimeoutExpired:
            raise OSError(f"no answer in {seconds:.0f} s") from None
        if not answer.exists():
            raise OSError((done.stderr.strip().splitlines() or ["no answer"])[-1][:300])
        said = json.loads(answer.read_text())["dependencies"]
    if all("skip_reason" in package for package in said):
        raise OSError(f"the service knows none of {', '.join(packages)}"[:300])
    return said


def main(argv: list[str]) -> int:
    begin = time.monotonic()
    packages = needed("minisgl")
    first = {name: packages[name] for name in list(packages)[:1]}
    try:
        said = scan(first, SECONDS)  # one question tells whether the others are worth asking
        said = scan(packages, SECONDS - (time.monotonic() - begin))
    except OSError as problem:
        print(f"audit: nothing was scanned, the advisory service cannot be reached: {problem}")
        return int("--strict" in argv)
    weak = [(package, weakness) for package in said for weakness in package.get("vulns", ())]
    for package, weakness in weak:
        versions = ", ".join(weakness["fix_versions"]) or "no version yet"
        print(f"audit: {package['name']} {package['version']}: {weakness['id']}; mended in {versions}")
    unknown = [package["name"] for package in said if "skip_reason" in package]
    print(f"audit: {len(said) - len(unknown)} packages scanned, {len(weak)} weaknesses; unknown: {unknown or 'none'}")
    return int(bool(weak))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
