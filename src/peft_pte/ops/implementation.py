"""Who computes an operation: visible, and never changed behind the caller's back."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from .choice import fastest, shape_class


@functools.cache
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def triton_available() -> bool:
    """Whether Triton can be imported here (nothing is imported to find out)."""
    return _find_triton()


def resolve_impl(impl: str, device: torch.device, operation: str, dtype: torch.dtype, rows: int) -> str:
    """Turn ``"auto"`` into the fastest implementation that runs on ``device``; check an explicit choice.

    Args:
        impl: ``"auto"``, ``"reference"`` or ``"triton"``.
        device: Where it is to run. On a GPU ``"auto"`` is timed (:mod:`peft_pte.ops.choice`), on any other it is the reference.
        operation: ``"compress"``, ``"delta"``, ``"delta_token"`` or ``"encode"``.
        dtype: Of the weights.
        rows: ``B``.

    Raises:
        ValueError: ``impl`` is no implementation.
        NotImplementedError: Triton was asked for and cannot run here.
    """
    if impl == "reference":
        return impl
    if impl == "auto":
        if device.type != "cuda" or not triton_available():
            return "reference"
        return fastest(operation, dtype, shape_class(rows), device)
    if impl != "triton":
        raise ValueError(f"`impl` must be one of 'auto', 'reference', 'triton', got {impl!r}.")
    if not triton_available():
        raise NotImplementedError(
            '`impl="triton"` needs the package triton, which is not installed. Install it, or use impl="reference".'
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError(
            f'`impl="triton"` needs a CUDA device, got {device}. Use impl="reference", or set TRITON_INTERPRET=1 to '
            "check the kernels on this device, slowly."
        )
    return "triton"
