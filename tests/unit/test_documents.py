"""README.md says what the program does: its flags are the parser's. And the check of what documents name."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from minisgl.benchmark.shapes import SHAPES
from minisgl.config.args import FLAG_WORDS, parse_args
from minisgl.config.device import kept_as
from minisgl.config.families import read_model_config
from minisgl.config.probe import Capabilities
from minisgl.config.resolve import ModelFiles, resolve
from minisgl.env import VARIABLES
from tools import check_links
from tools.check_docs import missing_extras, missing_headings, missing_paths, read_extras

README = Path(__file__).parents[2] / "README.md"


def test_the_flags_of_the_readme_are_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    table = README.read_text().partition("## Flags")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    documented = {flag for cell in first_cells for flag in re.findall(r"`(--[a-z-]+)`", cell)}
    with pytest.raises(SystemExit):
        parse_args(["--help"], {})
    options = re.findall(r"^  (?:-h, )?(--.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    real = {flag for line in options for flag in re.findall(r"(--[a-z-]+)", line.split("  ")[0])}
    assert documented == real - {"--help", "--version"}


def test_headings_that_are_not_there_are_named() -> None:
    text = "[a](#flags) [b](#flegs) [c](docs/operations.md#access) [d](docs/operations.md#excess) [e](https://x.org/#y)"
    assert missing_headings(README, text) == ["heading: #flegs", "heading: docs/operations.md#excess"]


def test_files_and_extras_that_are_not_there_are_named() -> None:
    assert missing_paths(README, "see `core.py`, `docs/adr/`, [this](docs/features.md) and `config/nowhere.py`") == [
        "file: config/nowhere.py"
    ]
    extras = read_extras((README.parent / "pyproject.toml").read_text())
    assert {"cuda", "fa", "fi"} <= extras
    text = "pip install 'minisgl[cuda,fa]', 'minisgl[rocm]', the extra `fi` or the extra `mps`"
    assert missing_extras(text, extras) == ["extra: mps", "extra: rocm"]


ROOT = README.parent
PACKAGE = ROOT / "python" / "minisgl"
CODE = re.compile(r"`([^`]+)`")


def names_of_the_package() -> set[str]:
    """Each class, and each of its attributes and methods behind a dot."""
    found = set[str]()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            found.add(node.name)
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef):
                    found.add(f"{node.name}.{part.name}")
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    found.add(f"{node.name}.{part.target.id}")
    return found


def test_what_is_named_to_those_who_come_from_mini_sglang_is_here() -> None:
    """Of each table the column of ours: the second one."""
    text = (ROOT / "docs" / "from-mini-sglang.md").read_text()
    cells = [line.split("|")[2] for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    paths = {f"{file.relative_to(PACKAGE)}" + "/" * file.is_dir() for file in PACKAGE.rglob("*")}
    routes = set(json.loads((PACKAGE / "server" / "openapi.json").read_text())["paths"])
    ours = paths | set(FLAG_WORDS) | routes | VARIABLES | names_of_the_package()
    ours |= {"MINISGL_DISABLE_OVERLAP_SCHEDULING", "minisgl serve NAME", "minisgl chat NAME"}
    named = {name for cell in cells for name in CODE.findall(cell)}
    assert len(named) > 90
    assert named <= ours


def test_the_flags_of_mini_sglang_are_taken() -> None:
    """Those that its command line has, all but expert parallelism."""
    text = (ROOT / "docs" / "from-mini-sglang.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `--")]
    theirs = [(flag, row[2]) for row in rows for flag in re.findall(r"`(--[a-z-]+)`", row[1])]
    assert len(theirs) > 25
    assert {flag for flag, _ in theirs if flag not in FLAG_WORDS} == {"--expert-parallel-size", "--ep-size"}


def test_the_planner_decides_what_memory_tuning_says(tmp_path: Path) -> None:
    """The table of docs/howto/memory.md: Qwen3-0.6B on a CPU that has 8 GiB free."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"]))
    files = ModelFiles(tmp_path, read_model_config(tmp_path), {})
    flags = frozenset({"avx2", "fma", "f16c"})
    tools = {"cxx": "/usr/bin/c++", "packages": frozenset({"tvm_ffi"})}
    machine = Capabilities(num_cores=8, memory=8 * 2**30, cpu_flags=flags, **tools)
    text = (ROOT / "docs" / "howto" / "memory.md").read_text().partition("## What was measured")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 9
    for flags_cell, *told in rows:
        engine = resolve(parse_args(flags_cell.strip("`").replace("none", "").split(), {}), files, machine).engine
        weights = engine.model.weight_bytes(kept_as(engine), 1)
        token = engine.kv_bytes(1, 0) / engine.page_size
        tokens = engine.num_pages * engine.page_size
        computed = [f"{weights / 1e9:.2f} GB", f"{token / 1e3:.0f} kB", f"{tokens:,} tokens", f"{engine.max_seq_len:,}"]
        assert told == computed, flags_cell


def test_troubles_are_told_as_they_are_documented() -> None:
    """What docs/troubleshooting.md quotes of the program's words stands in the package."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    sources = "\n".join(file.read_text() for kind in ("py", "yaml") for file in PACKAGE.rglob(f"*.{kind}"))
    for words in ("; choose another", "is taken", "cannot be fetched", "without a network, give a local directory"):
        assert words in text and words in sources
    for words in ("torch computes", "has run this script again", "ended unexpectedly", "killed by", "set HF_ENDPOINT"):
        assert words in text and words in sources
    for row in re.findall(r"row `([^`]+)`", text):
        assert f'"{row}"' in sources, row
    for flag in re.findall(r"`?(--[a-z][a-z-]+)", text):
        assert flag in FLAG_WORDS or flag in ("--torch-backend", "--shm-size"), flag


def test_the_readme_in_chinese_has_the_same_sections_and_commands() -> None:
    texts = [README.read_text(), README.with_name("README.zh.md").read_text()]
    headings = [re.findall("^#+(?= )", re.sub("^```.*?^```$", "", text, flags=re.S | re.M), re.M) for text in texts]
    assert headings[0] == headings[1]
    english, chinese = (
        [re.sub(" *#.*", "", block) for block in re.findall("^```.*?^```$", text, re.S | re.M)] for text in texts
    )
    assert english == chinese


def test_links_to_others_are_whole_and_safe() -> None:
    """Whether they answer is asked by `make links`, which needs a network."""
    addresses = check_links.links()
    assert len(addresses) > 12
    for address, where in addresses.items():
        parts = urlsplit(address)
        assert parts.scheme == "https" and "." in (parts.hostname or ""), (address, where)
        assert not re.search(r"(?i)todo|xxx|placeholder|your-|[…<>{}\\]", address), (address, where)


def test_a_link_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"HEAD /here": 200, "HEAD /no-heads": 404, "GET /no-heads": 200, "HEAD /gone": 404, "GET /gone": 404}
    transport = httpx.MockTransport(lambda asked: httpx.Response(answers[f"{asked.method} {asked.url.path}"]))
    client = httpx.Client
    monkeypatch.setattr(check_links.httpx, "Client", lambda **_: client(transport=transport))
    found = {f"https://host.test/{name}": ["a.md"] for name in ("here", "no-heads", "gone")}
    monkeypatch.setattr(check_links, "links", lambda: found)
    assert check_links.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "a.md: https://host.test/gone: status 404",
        "3 addresses, 1 that cannot be had",
    ]


def test_the_readme_in_chinese_has_the_same_figures() -> None:
    """Of its tables of speeds, cell by cell."""
    texts = [README.read_text(), README.with_name("README.zh.md").read_text()]
    rows = [re.findall(r"^\| [^|\n]*(?:\| [\d.]+ \([^|]*){1}.*$", text, re.MULTILINE) for text in texts]
    figures = [[re.findall(r"\d+(?:\.\d+)?", row.partition("|")[2].partition("|")[2]) for row in part] for part in rows]
    assert len(figures[0]) >= 6 and figures[0] == figures[1]
