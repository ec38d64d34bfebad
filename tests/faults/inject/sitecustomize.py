"""Python imports this first, in every process that finds it on PYTHONPATH."""

from tests.faults.points import inject

inject()
