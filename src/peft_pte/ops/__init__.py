"""The mathematics, each operation as a torch reference and a Triton kernel; equations in ``ops/README.md``."""

from .compress import compress_
from .delta import delta, delta_group_
from .encode import encode
from .implementation import resolve_impl

__all__ = ["compress_", "delta", "delta_group_", "encode", "resolve_impl"]
