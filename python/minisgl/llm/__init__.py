"""The Python API: the same engine as the server's, inside the caller's process."""

from minisgl.llm.llm import LLM, Increment, Pending, RequestMetrics, RequestOutput

__all__ = ["LLM", "Increment", "Pending", "RequestMetrics", "RequestOutput"]
