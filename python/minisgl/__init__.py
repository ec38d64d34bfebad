"""minisgl: compact, high-performance inference and serving for large language models."""

from typing import TYPE_CHECKING, Any

from minisgl.core import SamplingParams

if TYPE_CHECKING:
    from minisgl.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # on demand: it imports torch, which the API server's process does without
        from minisgl.llm import LLM

        return LLM
    raise AttributeError(f"module 'minisgl' has no attribute {name!r}")
