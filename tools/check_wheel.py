"""Does what we publish work where nothing of the repository is? Build the wheel, install it into an empty environment
elsewhere, start the server there and chat once. Exit status 1, with the server's words, when it does not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
READY = re.compile(r"http://[\d.]+:\d+")
START_SECONDS = 300  # compiling the CPU kernels included
MESSAGES = [{"role": "user", "content": "Hello!"}]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MINISGL"))}


def install(folder: Path) -> Path:
    """An environment with the wheel. Returns its Python."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("minisgl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python, torch = folder / "venv" / "bin" / "python", version("torch")
    backend = ["--torch-backend", "cpu"] if torch.endswith("+cpu") else []
    for packages in ([*backend, "--no-deps", f"torch=={torch}"], ["-c", str(ROOT / "constraints.txt"), str(wheel)]):
        command = [str(ROOT / "tools" / "install"), sys.executable, *packages]
        subprocess.run(command, cwd=folder, env={**ENVIRONMENT, "INTO": str(python)}, check=True)
    return python


def chat(python: Path, folder: Path) -> str:
    """What the server of that environment answers."""
    command = [str(python), "-m", "minisgl", "--port", "0", "--device", "cpu"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = wait_for_url(server, folder / "log")
            body = {"messages": MESSAGES, "max_tokens": 16, "temperature": 0}
            httpx.get(f"{url}/page/app.js").raise_for_status()  # files that are no modules are there too
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
            return str(answer["choices"][0]["message"]["content"])
        finally:
            server.terminate()
            server.wait(30)


def wait_for_url(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server that writes this log listens. Raises: SystemExit when it does not start."""
    for _ in range(START_SECONDS * 5):
        if found := READY.search(log.read_text()):
            return found[0]
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = chat(install(folder), folder)
    if not text:
        raise SystemExit("the answer is empty")
    print(f"the wheel serves: {text!r}")


if __name__ == "__main__":
    main()
