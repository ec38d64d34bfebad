"""Lets the tests that need no more than pytest run where its plugins are not installed, as on a GPU machine; and no
example of Hypothesis fails because the machine is busy."""

from __future__ import annotations

import importlib.util

import pytest

PLUGIN_OPTIONS = {
    "pytest_timeout": ("timeout",),
    "pytest_asyncio": ("asyncio_mode", "asyncio_default_fixture_loop_scope"),
}
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("busy", deadline=None)
    settings.load_profile("busy")
ABSENT = [plugin for plugin in PLUGIN_OPTIONS if importlib.util.find_spec(plugin) is None]


def pytest_addoption(parser: pytest.Parser) -> None:
    for plugin in ABSENT:
        for name in PLUGIN_OPTIONS[plugin]:
            parser.addini(name, f"of {plugin}, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    for plugin in ABSENT:
        config.addinivalue_line("markers", f"{plugin.removeprefix('pytest_')}: of {plugin}, which is not installed")
