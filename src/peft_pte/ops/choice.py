"""``impl="auto"`` on a GPU: both implementations are timed once per operation, dtype, shape class and device, and the faster is kept.

Operands are made up, of the shapes of :mod:`peft_pte.ops.tune`. On any other device the reference is the faster one, and nothing is timed.
What was chosen is logged once, at level info, and :func:`choices` tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)


class Case(NamedTuple):
    """What is chosen for."""

    operation: str
    """``"compress"``, ``"delta"``, ``"delta_token"`` or ``"encode"``."""
    dtype: torch.dtype
    shape: str
    """``"few"`` rows, or ``"many"``: 16 or more."""
    device: torch.device


class Choice(NamedTuple):
    """What was chosen, and why."""

    impl: str
    milliseconds: dict[str, float]
    """Of one call, by implementation; those that did not run are missing."""


_choices: dict[Case, Choice] = {}
# Of the largest entry: rounding of half precision, in sums over a thousand.
_MOST_ERROR = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


def choices() -> dict[Case, Choice]:
    """What ``impl="auto"`` has chosen in this process by timing."""
    return dict(_choices)


def shape_class(rows: int) -> str:
    """Of so many rows."""
    return "few" if rows < 16 else "many"


# Traced as what it returns.
@torch.compiler.assume_constant_result
def fastest(operation: str, dtype: torch.dtype, shape: str, device: torch.device) -> str:
    """The faster implementation, timed where it is not known yet.

    Inside a graph that is being captured or traced nothing can be timed: what is not known by then is the reference.
    """
    case = Case(operation, dtype, shape, device)
    known = _choices.get(case)
    if known is not None:
        return known.impl
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "reference"
    choice = _choices[case] = _race(case)
    times = ", ".join(f"{impl} {milliseconds:.4f} ms" for impl, milliseconds in choice.milliseconds.items())
    logger.info(
        "%s takes %s for %s rows in %s on %s (%s)",
        case.operation,
        choice.impl,
        case.shape,
        case.dtype,
        case.device,
        times,
    )
    return choice.impl


def _race(case: Case) -> Choice:
    device = (
        torch.cuda.device(case.device) if case.device.type == "cuda" and torch.cuda.is_available() else nullcontext()
    )
    # Whatever the caller is in the middle of.
    with device, torch.inference_mode(False), torch.no_grad(), torch.autocast(case.device.type, enabled=False):
        from .tune import call_of

        reference, kernel = (call_of(*case, impl) for impl in ("reference", "triton"))
        times = {"reference": milliseconds(reference)}
        try:
            expected, found = reference().double(), kernel().double()
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error < _MOST_ERROR.get(case.dtype, 1e-3):
                raise ArithmeticError(f"it is off by {error:.1e} of the largest entry")
            times["triton"] = milliseconds(kernel)
        except Exception as reason:
            # Whatever keeps the kernel from running, the reference runs; who asks for the kernel by name gets the error.
            logger.warning("%s is taken from the reference: %s: %s", case.operation, type(reason).__name__, reason)
    return Choice(min(times, key=lambda impl: times[impl]), times)


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of ``call`` on the GPU."""
    import triton

    median: float = triton.testing.do_bench(call, return_mode="median")
    return median
