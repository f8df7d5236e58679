"""The adapters read the thought state: ``scale * A (S (B x))`` (``ops/README.md``)."""

from .api import delta, delta_group_

__all__ = ["delta", "delta_group_"]
