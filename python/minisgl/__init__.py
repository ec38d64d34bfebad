"""minisgl: compact, high-performance inference and serving for large language models."""

__version__ = "0.1.0"
