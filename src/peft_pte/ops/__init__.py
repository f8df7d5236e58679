"""The mathematics, each operation as a torch reference and a Triton kernel; equations in ``ops/README.md``."""

from .choice import choices
from .compress import compress_
from .delta import delta, delta_add_, delta_read, for_tokens
from .encode import encode
from .implementation import resolve_impl

__all__ = ["choices", "compress_", "delta", "delta_add_", "delta_read", "encode", "for_tokens", "resolve_impl"]
