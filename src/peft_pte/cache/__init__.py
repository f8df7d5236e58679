"""Which tokens leave, and what is kept of the others."""

from .cache import PTECache
from .static_cache import StaticPTECache

__all__ = ["PTECache", "StaticPTECache"]
