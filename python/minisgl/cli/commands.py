"""The commands for models on this disk, and for the command line itself."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from rich.filesize import decimal

from minisgl.config.args import FLAG_WORDS, ArgumentParser, parse_args, suggestion
from minisgl.config.locate import DEMO_MODEL, locate_model, split_revision
from minisgl.env import cache_dir
from minisgl.errors import ConfigError

TEXTS = Path(__file__).parent / "texts"
COMMANDS: dict[str, dict[str, Any]] = msgspec.yaml.decode((TEXTS / "commands.yaml").read_bytes())


def main(argv: Sequence[str]) -> int:
    """Run a command of this module. Returns the exit status. Raises: ConfigError for a wrong command line."""
    name, *words = argv
    if name not in COMMANDS:
        hint = f"; minisgl serve {name} serves a model" if "/" in name else suggestion(name, COMMANDS)
        raise ConfigError(f"unknown command {name}{hint}; see minisgl help")
    parser = ArgumentParser(prog=f"minisgl {name}", description=COMMANDS[name]["about"])
    for argument, options in COMMANDS[name].get("arguments", {}).items():
        parser.add_argument(argument, **options)
    {"pull": _pull, "ls": _ls, "help": _help, "completion": _completion}[name](parser.parse_args(words))
    return 0


def _pull(args: argparse.Namespace) -> None:
    name, revision = split_revision(args.model, args.revision)
    path = locate_model(name, args.model_source or parse_args([]).model_source, revision)
    print(f"{args.model}: {_size(path)}, in {path}")


def _ls(_: argparse.Namespace) -> None:
    for name, path in (*models(), (f"compiled kernels, in {cache_dir()}", cache_dir())):
        stopped = any(not file.with_name(file.name.split(".")[0]).exists() for file in path.rglob("*.incomplete"))
        print(f"{_size(path):>9}  {name}" + ", incomplete: minisgl pull goes on" * stopped)


def models() -> Iterator[tuple[str, Path]]:
    """Names and folders of the built-in model, and of those in the hubs' caches."""
    from huggingface_hub.constants import HF_HUB_CACHE

    yield "the built-in demo model", DEMO_MODEL
    scope = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    for path in sorted((*Path(HF_HUB_CACHE).glob("models--*--*"), *scope.glob("models/*--*"))):
        yield path.name.removeprefix("models--").replace("--", "/", 1) + " (modelscope)" * (scope in path.parents), path
    old = {*scope.glob("models/*/*"), *scope.glob("hub/models/*/*")} - {*scope.glob("models/*--*/*")}  # before 1.38
    yield from ((f"{path.parent.name}/{path.name.replace('___', '.')} (modelscope)", path) for path in sorted(old))


def _size(path: Path) -> str:
    """Of a file, or of each file below a folder once, whatever links lead to it."""
    files = {file.resolve() for file in (path, *path.rglob("*")) if file.is_file()}
    return decimal(sum(file.stat().st_size for file in files))


def _help(_: argparse.Namespace) -> None:
    lines = (f"  {name:12}{command['about']}" for name, command in COMMANDS.items())
    print((TEXTS / "help.txt").read_text(encoding="utf-8").rstrip().replace("COMMANDS", "\n".join(lines)))


def _completion(args: argparse.Namespace) -> None:
    server = {**FLAG_WORDS, "--config": None, "--version": ()}
    commands = {name: {"words": [], "flags": server, **command} for name, command in COMMANDS.items()}
    template = (TEXTS / f"completion.{args.shell}.j2").read_text(encoding="utf-8")
    print(jinja2.Template(template, trim_blocks=True).render(commands=commands))
