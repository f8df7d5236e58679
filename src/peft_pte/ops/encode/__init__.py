"""Evicted keys and values -> thought state (DESIGN.md section 1, paper section 3)."""

from .api import encode

__all__ = ["encode"]
