"""The adapters read the thought state: ``scale * A (S (B x))`` (``ops/README.md``)."""

from .api import TokenOps, delta, delta_add_, delta_read, for_tokens

__all__ = ["TokenOps", "delta", "delta_add_", "delta_read", "for_tokens"]
