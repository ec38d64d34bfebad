"""The commands beside serving: what they print, their near misses, and completion in the shells themselves."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pexpect
import pytest

from minisgl.__main__ import main
from minisgl.cli.commands import COMMANDS
from minisgl.config.args import make_parser

PYTHON = Path(__file__).parents[2] / "python"


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    return (status, *capfd.readouterr())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With a hub's cache and another's: one model is whole, of one something is missing."""
    hub = tmp_path / "hub"
    for name, file in (("models--org--whole", "blobs/abc"), ("models--org--partial", "blobs/abc.incomplete")):
        (hub / name / file).parent.mkdir(parents=True)
        (hub / name / file).write_bytes(bytes(1_500_000))
        (hub / name / "snapshots" / "main").mkdir(parents=True)
        (hub / name / "snapshots" / "main" / "model.safetensors").symlink_to(hub / name / file)
    (hub / "datasets--org--data").mkdir()
    for name in ("org--new/snapshots/master", "Qwen/Qwen3-0___6B"):  # as it is since 1.38, and as it was
        other = tmp_path / "scope" / "models" / name
        other.mkdir(parents=True)
        (other / "model.safetensors").write_bytes(bytes(3_000))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
    monkeypatch.setenv("MINISGL_CACHE_DIR", str(tmp_path / "none"))
    return tmp_path


def test_ls_names_models_as_serve_takes_them(capfd: pytest.CaptureFixture[str], home: Path) -> None:
    status, out, _ = run(capfd, "ls")
    lines = [line.strip() for line in out.splitlines()]
    assert status == 0
    assert lines[1:5] == [
        "1.5 MB  org/partial, incomplete: minisgl pull goes on",
        "1.5 MB  org/whole",
        "3.0 kB  org/new (modelscope)",
        "3.0 kB  Qwen/Qwen3-0.6B (modelscope)",
    ]
    assert lines[0].endswith("the built-in demo model")
    assert lines[5:] == [f"0 bytes  compiled kernels, in {home / 'none' / 'kernels'}"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sevre"], ["unknown command sevre", "did you mean serve?", "minisgl help"]),
        (["quantise", "a", "b"], ["did you mean quantize?"]),
        (["Qwen/Qwen3-0.6B"], ["minisgl serve Qwen/Qwen3-0.6B serves a model"]),
        (["xyz"], ["unknown command xyz; see minisgl help"]),
        (["serve", "--prot", "1"], ["unknown argument --prot", "did you mean --port?", "minisgl serve --help"]),
        (["chat", "--tempature", "1"], ["unknown argument --tempature", "minisgl chat --help"]),
        (["--prot", "1"], ["did you mean --port?", "minisgl --help"]),
        (["pull"], ["MODEL", "minisgl pull --help"]),
        (["pull", "a/b", "--revison", "x"], ["did you mean --revision?"]),
        (["pull", "nothing-such"], ["--model nothing-such: no directory"]),
        (["ls", "--al"], ["unknown argument --al"]),
        (["completion", "tcsh"], ["'tcsh'", "bash"]),
        (["help", "sevre"], ["did you mean serve?"]),
        (["doctor", "--pot", "1"], ["did you mean --port?"]),
        (["bench", "srve"], ["bench srve", "serve or offline"]),
    ],
)
def test_what_is_mistyped_is_one_line(capfd: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    status, out, errors = run(capfd, *argv)
    assert (status, out, errors.count("\n")) == (2, "", 1)
    for word in words:
        assert word in errors


def test_help_lists_every_command(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capfd, "help")
    assert [line.split()[0] for line in out.split("commands:\n")[1].split("\n\n")[0].splitlines()] == list(COMMANDS)
    for line in re.findall(r"^  minisgl (\w+)", out, flags=re.MULTILINE):
        assert line in COMMANDS
    for argv in (["help", "serve"], ["serve", "--help"], ["pull", "-h"], ["help", "doctor"], ["--help"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
        assert capfd.readouterr().out.startswith("usage: minisgl")


def test_help_shows_groups_and_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    text = make_parser("minisgl serve").format_help()
    titles = re.findall(r"^([A-Z].*):$", text, flags=re.MULTILINE)
    assert titles[:3] == ["Model", "Server", "Device and memory"] and len(titles) >= 7
    words = " ".join(text.split())
    for shown in (
        "(default: 1919)",
        "{auto,cpu,cuda}",
        "(default: the built-in demo model)",
        "examples: minisgl serve",
    ):
        assert shown in words
    takes_value = [action for action in make_parser()._actions if action.nargs != 0 and action.default != "append"]
    untold = [a.dest for a in takes_value if "default" not in (a.help or "") and type(a).__name__ != "_AppendAction"]
    assert untold == ["config"]


@pytest.mark.parametrize("name", ["pull", "ls", "doctor", "simulate"])
def test_completion_knows_the_flags_of_each_command(capfd: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    flags = set(re.findall(r"(--[a-z][a-z-]+)", capfd.readouterr().out.partition("options:")[2])) - {"--help"}
    assert set(COMMANDS[name].get("flags", {})) == flags


def test_completion_knows_the_flags_of_quantize() -> None:
    """By its source: to run it, torch has to be imported."""
    flags = re.findall(r'add_argument\("(--[a-z-]+)"', (PYTHON / "minisgl" / "quantize.py").read_text())
    assert list(COMMANDS["quantize"]["flags"]) == flags


# What is typed, and what may come next.
CASES = [
    (
        "minisgl ",
        {"serve", "chat", "pull", "ls", "doctor", "bench", "simulate", "quantize", "cluster", "help", "completion"},
    ),
    ("minisgl se", {"serve"}),
    ("minisgl serve --device ", {"auto", "cpu", "cuda"}),
    ("minisgl serve --schedule-policy l", {"lpm"}),
    ("minisgl chat --fairness ", {"on", "off"}),
    ("minisgl serve --max-q", {"--max-queued-requests", "--max-queued-tokens"}),
    ("minisgl completion ", {"bash", "zsh", "fish"}),
    ("minisgl pull --model-source h", {"huggingface"}),
    ("minisgl quantize --quantization ", {"int4", "int8"}),
    ("minisgl bench o", {"offline"}),
    ("minisgl simulate --router r", {"random"}),
]


def need(shell: str) -> None:
    """CI has all three shells: there it fails without them."""
    if shutil.which(shell) is None:
        if os.environ.get("CI") or os.environ.get("REQUIRE_SHELLS"):
            pytest.fail(f"no {shell}: apt-get install {shell}")
        pytest.skip(f"needs {shell}")


def script(shell: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    _, out, errors = run(capfd, "completion", shell)
    assert errors == ""
    file = folder / f"minisgl.{shell}"
    file.write_text(out)
    return file


def test_completion_in_bash(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [f"source {script('bash', tmp_path, capfd)}"]
    for typed, _ in CASES:
        words = typed.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        lines += [f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _minisgl; echo ${{COMPREPLY[*]}}"]
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], capture_output=True, text=True, check=True)
    for (typed, expected), found in zip(CASES, done.stdout.splitlines(), strict=True):
        assert set(found.split()) - {"--help"} == expected, typed


def test_tab_in_an_interactive_bash(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.gguf").touch()
    child = interactive("bash", ["--norc", "-i"], tmp_path, f"source {script('bash', tmp_path, capfd)}")
    child.send("minisgl serve --mod\t")  # as far as it is certain
    child.expect("minisgl serve --mod\a?el")
    child.send(" weig\t")
    child.expect_exact("weights.gguf")
    child.close(force=True)


def test_completion_in_fish(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need("fish")
    file = script("fish", tmp_path, capfd)
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    (empty := tmp_path / "empty").mkdir()
    for typed, expected in CASES:
        command = f"source {file}; complete -C '{typed}'"
        done = subprocess.run(["fish", "-c", command], capture_output=True, text=True, check=True, env=env, cwd=empty)
        assert {line.split("\t")[0] for line in done.stdout.splitlines()} == expected, typed


def test_completion_in_zsh(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need("zsh")
    file = script("zsh", tmp_path, capfd)
    child = interactive("zsh", ["-f", "-i"], tmp_path, f"autoload -U compinit; compinit -u -D; source {file}")
    for typed, expected in CASES:
        child.send(f"\x15{typed}" + "\t" * min(2, len(expected)))  # the first may only add what all have in common
        if len(expected) == 1:
            child.expect_exact(typed.rpartition(" ")[0] + f" {next(iter(expected))}")
        for word in sorted(expected) if len(expected) > 1 else ():
            child.expect_exact(word)
    child.close(force=True)


def interactive(shell: str, args: Sequence[str], folder: Path, first: str) -> pexpect.spawn[str]:
    env = {**os.environ, "HOME": str(folder), "TERM": "dumb", "PS1": "$ "}
    child = pexpect.spawn(
        shell, list(args), env=env, cwd=str(folder), encoding="utf-8", timeout=60, dimensions=(60, 200)
    )
    child.sendline(first + "; echo rea''dy")
    child.expect_exact("ready\r\n")
    return child


def test_help_and_errors_import_nothing_heavy() -> None:
    """What a person waits for at each Tab, and after each mistyped word."""
    code = (
        "import sys; from minisgl.__main__ import main; main(['completion', 'bash']); main(['help']); main(['sevre'])"
    )
    code += "; sys.exit(' '.join({'torch', 'transformers', 'fastapi', 'prompt_toolkit'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(PYTHON)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stderr.strip().splitlines()[1:] == []


COMMAND_LINES = (
    *("bench serve", "bench offline", "cluster", "cluster serve", "doctor", "quantize", "simulate", "serve", "chat"),
    *("pull", "completion", "ls"),
)


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_a_value_that_does_not_fit_an_option_is_told_what_is_expected(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each option of each command: argparse itself would tell only the name of a function of ours."""
    parsers: dict[str, Callable[[str], object]] = {}
    add = argparse.ArgumentParser.add_argument

    def watched(self: argparse.ArgumentParser, *flags: str, **how: Any) -> argparse.Action:
        if how.get("type", str) not in (str, Path):
            parsers[flags[0]] = how["type"]
        return add(self, *flags, **how)

    monkeypatch.setattr("argparse._ActionsContainer.add_argument", watched)
    with contextlib.suppress(SystemExit):
        main([*words.split(), "--help"])
    has_some = ("bench serve", "bench offline", "cluster", "cluster serve", "doctor", "simulate")
    assert bool(parsers) == (words in has_some)
    for flag, parse in parsers.items():
        with pytest.raises(argparse.ArgumentTypeError, match=r"'nope': expected \w+"):
            pytest.fail(f"{flag} takes {parse('nope')!r}")


def test_options_that_are_no_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    for text in ("nope", "[1]", "3"):
        status, _, err = run(capfd, "cluster", "scale", "2", "--options", text)
        assert status == 2
        assert re.search(f"--options: '{re.escape(text)}': expected a JSON object", err) and err.count("\n") == 1
