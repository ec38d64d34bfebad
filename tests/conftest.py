"""Lets the tests that need no more than pytest run where its plugins are not installed, as on a GPU machine."""

from __future__ import annotations

import importlib.util

import pytest

PLUGIN_OPTIONS = {
    "pytest_timeout": ("timeout",),
    "pytest_asyncio": ("asyncio_mode", "asyncio_default_fixture_loop_scope"),
}
ABSENT = [plugin for plugin in PLUGIN_OPTIONS if importlib.util.find_spec(plugin) is None]


def pytest_addoption(parser: pytest.Parser) -> None:
    for plugin in ABSENT:
        for name in PLUGIN_OPTIONS[plugin]:
            parser.addini(name, f"of {plugin}, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    for plugin in ABSENT:
        config.addinivalue_line("markers", f"{plugin.removeprefix('pytest_')}: of {plugin}, which is not installed")
