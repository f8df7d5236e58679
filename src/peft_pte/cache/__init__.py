"""Which tokens leave, and what is kept of the others."""

from .cache import PTECache

__all__ = ["PTECache"]
