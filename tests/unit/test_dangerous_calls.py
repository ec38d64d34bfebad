"""Nothing in the package runs or unpickles what it reads: the source is searched for calls and modules that would."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

import minisgl
from minisgl.utils.process import private_folder

PACKAGE = Path(minisgl.__file__).parent
# Modules whose formats run code when they are read, or whose only use is to run some.
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "dbm"}
MODULES |= {"code", "codeop", "imp", "pty", "xmlrpc", "tarfile", "zipfile", "ftplib", "telnetlib", "wsgiref", "cgi"}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint", "os.system", "os.popen", "tempfile.mktemp"}
CALLS |= {
    f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")
}
CALLS |= {"subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive", "torch.hub.load"}
CALLS |= {"torch.jit.load", "torch.package.PackageImporter", "asyncio.create_subprocess_shell"}
# Of multiprocessing's connections and pyzmq's sockets: these pickle.
METHODS = {"send_pyobj", "recv_pyobj", "extractall"}
# Calls that are harmless with one value of an argument only.
ONLY_WITH = {"torch.load": ("weights_only", True)}
NEVER_WITH = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "verify": True}
# What pickles on purpose: a child's arguments, through a private pipe of the process that starts it.
MULTIPROCESSING = {f"processes/{name}.py" for name in ("supervisor", "control")}
MULTIPROCESSING |= {"utils/process.py"}


def problems(source: str, where: str = "x.py") -> list[str]:
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what is imported here, by the name that it has here
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name.partition(".")[0]): alias.name for alias in node.names}
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
            imported = [node.module or ""]
        else:
            continue
        for name in imported:
            top = name.partition(".")[0]
            if top in MODULES or (top == "multiprocessing" and where not in MULTIPROCESSING):
                found.append(f"{where}:{node.lineno}: imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"{where}:{node.lineno}: {what}" for what in _of_call(node, names)]
    return found


def _of_call(node: ast.Call, names: dict[str, str]) -> list[str]:
    first, dot, rest = ast.unparse(node.func).partition(".")
    called = names.get(first, first) + dot + rest
    called = called.replace("np.", "numpy.")
    found = [f"calls {called}"] if called in CALLS or called.rpartition(".")[2] in METHODS else []
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
    if called in ONLY_WITH and given.get(ONLY_WITH[called][0]) is not ONLY_WITH[called][1]:
        found.append(f"{called} without {ONLY_WITH[called]}")
    found += [f"{name}={given[name]}" for name, value in NEVER_WITH.items() if given.get(name, value) is not value]
    if (
        called.startswith("subprocess.")
        and node.args
        and not isinstance(node.args[0], (ast.List, ast.Name, ast.Starred))
    ):
        found.append(f"{called} of something that may be a text")
    if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
        found.append("imports what a variable names")
    return found


def test_nothing_in_the_package_does() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = [what for file in files for what in problems(file.read_text(), str(file.relative_to(PACKAGE)))]
    assert found == []
    assert all((PACKAGE / name).exists() for name in MULTIPROCESSING)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as read",
        "import _pickle as p",
        "def f():\n    import dill",
        "import multiprocessing",
        "eval('1')",
        "exec(x)",
        "compile(x, '', 'eval')",
        "__import__(x)",
        "import yaml\nyaml.load(x, yaml.Loader)",
        "from yaml import load as read\nread(x)",
        "import yaml as y\ny.unsafe_load(x)",
        "import torch\ntorch.load(x)",
        "import torch\ntorch.load(x, weights_only=False)",
        "from torch import load\nload(x, weights_only=flag)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=args.trust)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import os\nos.system('ls')",
        "from os import system\nsystem('ls')",
        "import subprocess\nsubprocess.run(['ls'], shell=True)",
        "import subprocess\nsubprocess.run('ls -l')",
        "import importlib\nimportlib.import_module(name)",
        "socket.recv_pyobj()",
        "import tempfile\ntempfile.mktemp()",
        "import httpx\nhttpx.get(x, verify=False)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert problems(source)


def test_the_sockets_are_private_whatever_the_umask() -> None:
    for umask in (0o000, 0o022, 0o077):
        before = os.umask(umask)
        try:
            with private_folder() as directory:
                about = Path(directory).stat()
        finally:
            os.umask(before)
        assert (stat.S_IMODE(about.st_mode), about.st_uid) == (0o700, os.getuid())
