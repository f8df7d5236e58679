"""The axis legend: one letter per axis, here and in every docstring, comment, kernel and test.

====== =============================================== ====== ==================================
letter axis                                            letter axis
====== =============================================== ====== ==================================
``L``  decoder layers                                  ``E``  evicted tokens
``B``  sequences                                       ``C``  cache slots, ``P + W``
``H``  query heads                                     ``D``  flattened KV width, ``G * head_dim``
``G``  KV heads                                        ``Q``  global tokens, rows of the state
``T``  tokens of this call                             ``R``  rank, columns of the state
``P``  prompt columns, left padding included           ``W``  thought window
====== =============================================== ====== ==================================

The aliases below are checked at run time only where :func:`checked` is told to (the tests do).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int, Int64, jaxtyped
from torch import Tensor

State = Float[Tensor, "B Q R"]
InitialState = Float[Tensor, "Q R"]
GlobalTokens = Float[Tensor, "Q D"]
Query = Float[Tensor, "Q R"]
Projection = Float[Tensor, "R D"]
EvictedRows = Float[Tensor, "B N E D"]
EvictedValid = Bool[Tensor, "B N E"]
LayerStates = Float[Tensor, "L B Q R"]
LayerQueries = Float[Tensor, "L Q R"]
LayerProjections = Float[Tensor, "L R D"]
CachedHeads = Float[Tensor, "L B G C head_dim"]
LeavingValid = Bool[Tensor, "due E"]
EvictedSlots = Int64[Tensor, "due E"]
DueRows = Int64[Tensor, "due"]
CosSin = Float[Tensor, "due E rotary_dim"]
HeadStates = Float[Tensor, "B G N head_dim"]
HeadScores = Float[Tensor, "B G N"]
Hidden = Float[Tensor, "B T inner"]
Down = Float[Tensor, "R inner"]
Up = Float[Tensor, "outer Q"]
Output = Float[Tensor, "B T outer"]
GroupDown = Float[Tensor, "ranks inner"]
OneToken = Float[Tensor, "B 1 inner"]
Rows = Float[Tensor, "B outer"]
Positions = Int[Tensor, "B N"]

F = TypeVar("F", bound=Callable[..., object])


def _kind(value: Any) -> Any:
    """What the annotations of an argument can tell it by."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (tuple, list)):
        return type(value), *map(_kind, value)
    return type(value)


def checked(function: F) -> F:
    """Check the shape annotations of ``function`` when ``PEFT_PTE_CHECK_SHAPES=1``, once for all calls with the same shapes and dtypes."""
    if os.environ.get("PEFT_PTE_CHECK_SHAPES") != "1":
        return function
    from beartype import beartype

    checking = jaxtyped(typechecker=beartype)(function)
    passed: set[Hashable] = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A tracer sees no sizes to check.
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        kinds = (*map(_kind, args), *((name, _kind(value)) for name, value in sorted(kwargs.items())))
        if kinds in passed:
            return function(*args, **kwargs)
        output = checking(*args, **kwargs)
        passed.add(kinds)
        return output

    return cast(F, call)


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """That of a weight of which DeepSpeed may have left an empty tensor here."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
