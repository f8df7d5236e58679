"""The adapters read the thought state: ``scale * A (S (B x))`` (DESIGN.md section 1)."""

from .api import delta

__all__ = ["delta"]
