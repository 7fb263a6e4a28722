"""A learned router in front of several LLM sizes: the best answer that still meets its deadline."""

__version__ = "0.1.0"
