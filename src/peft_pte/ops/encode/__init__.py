"""Evicted keys and values -> thought state (``ops/README.md``, paper section 3)."""

from .api import encode

__all__ = ["encode"]
