from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx

from tools.check_wheel import wait_for_url

ROOT = Path(__file__).parent.parent.parent
CHAT = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4, "temperature": 0}


def hand_overs(package: Path, folder: Path) -> list[tuple[str, str]]:
    """Pairs of files, caller and called, in the order of their first call while the chat is answered."""
    paths = [str(ROOT / "tools" / "walk" / "hook"), str(package), os.environ.get("PYTHONPATH", "")]
    switch, log = folder / "on", folder / "log"
    switch.write_bytes(b"0")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MINISGL_WALK": str(folder)}
    command = [sys.executable, "-m", "minisgl", "--port", "0", "--device", "cpu"]
    with log.open("w") as out, httpx.Client(timeout=60) as client:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            url = f"{wait_for_url(server, log)}/v1/chat/completions"
            client.post(url, json=CHAT).raise_for_status()  # what is imported or made only once is not the walk
            switch.write_bytes(b"1")
            client.post(url, json=CHAT).raise_for_status()
            switch.write_bytes(b"0")
        finally:
            server.terminate()
            server.wait(30)
    lines = sorted(line.split() for file in folder.glob("calls.*") for line in file.read_text().splitlines())
    return list(dict.fromkeys((caller, called) for _, caller, called in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the files through which one chat walks.")
    parser.add_argument("--package", type=Path, default=ROOT / "python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = hand_overs(args.package.resolve(), Path(folder))
    for caller, called in pairs:
        print(f"{caller} -> {called}")
    files = {file for pair in pairs for file in pair}
    print(f"{len(files)} files, {len(pairs)} hand-overs from one file to another")


if __name__ == "__main__":
    main()
