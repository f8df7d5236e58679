"""The adapters read the thought state: ``scale * A (S (B x))`` (``ops/README.md``)."""

from .api import delta

__all__ = ["delta"]
