"""Cached keys and values that leave -> thought states, in place, all layers at once (``ops/README.md``)."""

from .api import compress_

__all__ = ["compress_"]
