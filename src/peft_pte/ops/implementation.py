"""Who computes an operation: resolved once per layer, visible, and never changed behind the caller's back."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def _find_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def triton_available() -> bool:
    """Whether Triton can be imported here (nothing is imported to find out)."""
    return _find_triton()


def resolve_impl(impl: str, device: torch.device) -> str:
    """Turn ``"auto"`` into the implementation that runs on ``device``; check an explicit choice.

    ``"auto"`` is the reference on every device: the kernels have been checked for correctness, but their speed has
    not been measured on a GPU yet, and an unmeasured kernel is no default.

    Raises:
        ValueError: ``impl`` is no implementation.
        NotImplementedError: Triton was asked for and cannot run here.
    """
    if impl in ("auto", "reference"):
        return "reference"
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
