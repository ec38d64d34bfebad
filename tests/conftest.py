"""Lets the tests that need no more than pytest run where its plugins are not installed, as on a GPU machine; no
example of Hypothesis fails because the machine is busy; threads of torch do not spin while they wait, on cores that
other tests want; long tests come first (`order.py`); and what was skipped is told by its reason at the end, and is a
failure where REQUIRE_ALL is set and a machine without a GPU could run it. Files that only a GPU runs are not even
collected without one, unless they are asked for by name: that is told, too."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

gc.disable()  # until all tests are collected: a fifth of the time that this takes
PLUGIN_OPTIONS = {
    "pytest_timeout": ("timeout",),
    "pytest_asyncio": ("asyncio_mode", "asyncio_default_fixture_loop_scope"),
}
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("busy", deadline=None)
    settings.load_profile("busy")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; processes of tests have it too
# What a machine of ours may lack. Where it has node, REQUIRE_NODE says so.
LACKING = re.compile(r"\bGPUs?\b|CUDA device|Hopper|needs node")
ABSENT = [plugin for plugin in PLUGIN_OPTIONS if importlib.util.find_spec(plugin) is None]


ONLY_GPU = re.compile(r"^pytestmark = (\[\s*pytest\.mark\.gpu\b|MARKS$)", re.MULTILINE)
HAS_GPU = any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg")))
INSTEAD = "MINISGL_TEST_DEVICE", "TRITON_INTERPRET"  # of a GPU


def is_left_out(file: Path) -> bool:
    if HAS_GPU or any(map(os.environ.get, INSTEAD)) or not file.match("test_*.py"):
        return False
    return file.parent.name == "gpu" or ONLY_GPU.search(file.read_text()) is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return is_left_out(collection_path) or None


def pytest_addoption(parser: pytest.Parser) -> None:
    for plugin in ABSENT:
        for name in PLUGIN_OPTIONS[plugin]:
            parser.addini(name, f"of {plugin}, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    for plugin in ABSENT:
        config.addinivalue_line("markers", f"{plugin.removeprefix('pytest_')}: of {plugin}, which is not installed")


def pytest_collection_finish() -> None:
    gc.freeze()  # no collection of garbage walks over what imports have made, and over all tests
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.order import InOrder

    config.option.loadscopereorder = False
    return InOrder(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("xdist") is not None:
        from tests.order import rank

        items.sort(key=lambda item: rank(item.nodeid))


def skips_of(config: pytest.Config) -> Counter[str]:
    """How many tests were skipped, by reason."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter is not None else []
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def pytest_sessionfinish(session: pytest.Session) -> None:
    unseen = [reason for reason in skips_of(session.config) if not LACKING.search(reason)]
    if unseen and os.environ.get("REQUIRE_ALL") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skips = skips_of(terminalreporter.config)
    folders = [folder for name in terminalreporter.config.args if (folder := Path(name)).is_dir()]
    files = [file for folder in folders for file in folder.rglob("test_*.py") if is_left_out(file)]
    if skips or files:
        terminalreporter.section("skipped")
    if files:
        count = sum(len(re.findall(r"^def test_", file.read_text(), re.MULTILINE)) for file in files)
        terminalreporter.write_line(f"{count:5} functions in {len(files)} files for GPUs alone: not collected here")
    for reason, count in skips.most_common():
        failed = os.environ.get("REQUIRE_ALL") and not LACKING.search(reason)
        terminalreporter.write_line(f"{count:5} {reason}" + " - a failure here: REQUIRE_ALL" * bool(failed))
