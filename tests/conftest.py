"""Lets the tests that need no more than pytest run where its plugins are not installed, as on a GPU machine; no
example of Hypothesis fails because the machine is busy; threads of torch do not spin while they wait, on cores that
other tests want; long tests come first (`order.py`); and what was skipped is told by its reason at the end, and is a
failure where REQUIRE_ALL is set and a machine without a GPU could run it."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from typing import Any

import pytest

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


def pytest_addoption(parser: pytest.Parser) -> None:
    for plugin in ABSENT:
        for name in PLUGIN_OPTIONS[plugin]:
            parser.addini(name, f"of {plugin}, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    for plugin in ABSENT:
        config.addinivalue_line("markers", f"{plugin.removeprefix('pytest_')}: of {plugin}, which is not installed")


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
    if skips:
        terminalreporter.section("skipped")
    for reason, count in skips.most_common():
        failed = os.environ.get("REQUIRE_ALL") and not LACKING.search(reason)
        terminalreporter.write_line(f"{count:5} {reason}" + " - a failure here: REQUIRE_ALL" * bool(failed))
