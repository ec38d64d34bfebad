"""In what order tests run, and which of xdist's workers runs them."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

# What takes long comes first, so that no worker is alone with it at the end; the rest follows as it is collected.
LONGEST = (
    "tests/soak/",
    "tests/browser/test_inside.py",
    "tests/browser/test_chat.py",
    "tests/faults/test_restart.py",
    "tests/faults/test_slow_clients.py",
    "tests/faults/test_large_bodies.py",
    "tests/faults/test_overload.py",
    "tests/faults/test_grammar_time.py",
    "tests/integration/test_llm.py",
    "tests/integration/test_models.py",
    "tests/integration/test_windows.py",
    "tests/integration/test_int4.py",
    "tests/integration/test_gguf_quality.py",
    "tests/integration/test_kernel_cache.py",
    "tests/integration/test_real_model.py",
    "tests/e2e/test_learn.py",
    "tests/e2e/test_lifecycle.py",
    "tests/faults/",
    "tests/e2e/",
    "tests/integration/",
    "tests/browser/",
    "tests/clients/",
)
# Files whose tests share nothing that is dear: each goes to whichever worker is free. Any other file is one worker's.
APART = (
    "tests/e2e/test_learn.py",
    "tests/e2e/test_lifecycle.py",
    "tests/e2e/test_shell.py",
    "tests/faults/test_drain.py",
    "tests/faults/test_environment.py",
    "tests/faults/test_restart.py",
    "tests/faults/test_start.py",
)


def rank(nodeid: str) -> int:
    """Of a test among all, for sorting."""
    return next((i for i, prefix in enumerate(LONGEST) if nodeid.startswith(prefix)), len(LONGEST))


class InOrder(LoadFileScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in APART else file
