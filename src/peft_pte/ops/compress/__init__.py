"""Cached keys and values that leave -> thought states, in place, all layers at once (``ops/README.md``)."""

from .api import ROTARY_STYLES, compress_
from .reference import rotate

__all__ = ["ROTARY_STYLES", "compress_", "rotate"]
