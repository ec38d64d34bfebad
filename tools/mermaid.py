"""Fetch the script that draws the site's diagrams, so that no page of the site loads it from elsewhere: of a pinned
release from npm, whose digest is known. `python tools/mermaid.py FILE`; needs npm."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

RELEASE = "mermaid@11.17.2"
DIGEST = "V6K3C8EBdEsPFZXSKMJe6ppQOENxuHARr9GvHX4hh47lAbhMRD9qf4oEK7LoaRQxULMa80/qt5gHO73aCleBBg=="  # SHA-512
SCRIPT = "package/dist/mermaid.min.js"


def unpack(package: bytes, digest: str = DIGEST) -> bytes:
    """The script in the package. Raises: ValueError when it is not the package that was chosen."""
    found = base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != digest:
        raise ValueError(f"{RELEASE}: its SHA-512 is {found}, not {digest}")
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        member = archive.extractfile(SCRIPT)
        assert member is not None
        return member.read()


def main() -> int:
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", "--silent", RELEASE], cwd=folder, stdout=subprocess.DEVNULL, check=True)
            (package,) = Path(folder).glob("*.tgz")
            script = unpack(package.read_bytes())
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{target}: {error}; it comes from npm, which is part of Node.js", file=sys.stderr)
            return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(script)
    return 0


if __name__ == "__main__":
    sys.exit(main())
