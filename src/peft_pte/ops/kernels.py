"""What the launchers of all kernels share. Imports Triton: only ``*/triton.py`` may import this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` when this was imported)."""


class Kernel:
    """A Triton kernel that is launched where its first operand is.

    Triton launches on the current device and in its stream; where layers are spread over devices, their tensors are on others.
    """

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """What launches it on ``grid``."""
        launch = self.jitted[grid]

        def launch_there(first: Tensor, *operands: Any, **constants: Any) -> None:
            with torch.cuda.device_of(first):
                launch(first, *operands, **constants)

        return launch_there


def kernel(function: Callable[..., None]) -> Kernel:
    """``function``, which is written in Triton's language, as a kernel."""
    return Kernel(triton.jit(function))


@triton.jit
def dot(a, b, DTYPE: tl.constexpr, PRECISION: tl.constexpr = "ieee", UPCAST: tl.constexpr = False):
    """``a @ b`` summed in ``DTYPE``."""
    if tl.float64 == DTYPE:
        # Triton 3.7 cannot compile some float64 products (an assertion in its MMAv2 lowering); float64 is for checks.
        return tl.sum(a.to(DTYPE)[:, :, None] * b.to(DTYPE)[None, :, :], axis=1)
    if UPCAST:
        a = a.to(DTYPE)
        b = b.to(DTYPE)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=DTYPE)


@triton.jit
def shares(scores, m_rows, AXIS: tl.constexpr):
    """The softmax of ``scores`` over the rows of the state, which are along ``AXIS`` where ``m_rows`` says so."""
    scores = tl.where(m_rows, scores, float("-inf"))
    weights = tl.exp(scores - tl.expand_dims(tl.max(scores, axis=AXIS), AXIS))
    return weights / tl.expand_dims(tl.sum(weights, axis=AXIS), AXIS)


# tl.dot wants at least 16 along every axis.
MIN_BLOCK = 16


def block(length: int) -> int:
    """The block that holds a whole axis of ``length``."""
    return max(MIN_BLOCK, triton.next_power_of_2(length))


def tile(length: int, most: int) -> int:
    """The block to walk an axis of ``length`` with: the least padding, then the fewest steps, at most ``most``."""
    sizes = [1 << shift for shift in range(4, max(5, most.bit_length()))]
    return min(sizes, key=lambda size: (triton.cdiv(length, size) * size, -size))


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """What sums of ``dtype`` are kept in: float64 for float64, float32 for all else."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def upcast_dots(*operands: Tensor) -> bool:
    """Whether matrix products must run on float32 copies: the interpreter has none in bfloat16."""
    return INTERPRETED and any(operand.dtype == torch.bfloat16 for operand in operands)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; few for the interpreter, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def row_of_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as the bytes it is made of, without a copy."""
    return None if mask is None else mask.view(torch.uint8)
