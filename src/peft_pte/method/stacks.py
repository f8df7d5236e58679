"""Weights of linears that read the same input, one above the other, so that one product serves them all.

The copies are looked at before every token, and made anew where a weight is not what it was: another tensor, at another address, or of
another version. Not every write makes a version. A fused optimizer's does not, but it needs gradients: weights that have some are read
one by one, and a call that takes gradients, or several tokens, ends all copies. A write through `.data` between two single
tokens of one cache is seen by nobody, autograd included, and comes to act with the next call of several tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layer import PTELinear
from .state import Stacked


class _Source(NamedTuple):
    """A weight as it was when it was copied."""

    linear: PTELinear
    weight: Tensor
    storage: Tensor
    """The same numbers; while it is held, nothing else comes to stand at their address."""
    address: int
    version: int


class _Copied(NamedTuple):
    sources: tuple[_Source, ...]
    stacked: Stacked


class Stacks:
    """The copies of one model. They are no part of it: whoever copies or saves it gets none."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], _Copied] = {}

    def of(self, groups: Iterable[tuple[PTELinear, ...]], adapter: str) -> dict[str, Stacked]:
        """Those of ``adapter``, as its weights are now, by name of the first linear of each of ``groups`` that read the same input."""
        found: dict[str, Stacked] = {}
        for group in groups:
            key = group[0].name, adapter
            copied = self._copies.get(key)
            if copied is not None:
                for linear, weight, _, address, version in copied.sources:
                    down = linear.pte_down._modules.get(adapter)
                    if (
                        down is None
                        or down.weight is not weight
                        or weight.data_ptr() != address
                        or weight._version != version
                        or weight.grad is not None
                    ):
                        copied = None
                        break
            if copied is None:
                copied = _copy(group, adapter)
            if copied is not None:
                self._copies[key] = copied
                found[copied.stacked.names[0]] = copied.stacked
        return found

    def forget(self) -> None:
        """Let go of all copies."""
        self._copies = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stacks:
        return Stacks()

    def __reduce__(self) -> tuple[type[Stacks], tuple[()]]:
        return Stacks, ()


def _copy(group: tuple[PTELinear, ...], adapter: str) -> _Copied | None:
    """The weights of those of ``group`` that are like the first; ``None``: there is nothing to share."""
    sources: list[_Source] = []
    kinds: set[Any] = set()
    for linear in group:
        down = linear.pte_down._modules.get(adapter)
        weight = None if down is None else down.weight
        if not isinstance(weight, Tensor) or weight.is_inference() or weight.is_meta:
            continue
        if not weight.is_leaf or weight.grad is not None:
            continue
        kind = (weight.shape, weight.dtype, weight.device, linear.r[adapter], linear.impl[adapter])
        if not kinds or kind in kinds:
            kinds.add(kind)
            sources.append(_Source(linear, weight, weight.detach(), weight.data_ptr(), weight._version))
    if len(sources) < 2 or sources[0].weight.shape[-1] != group[0].in_features:
        return None
    with torch.no_grad():
        copy = torch.cat([source.weight for source in sources])
    return _Copied(tuple(sources), Stacked(tuple(source.linear.name for source in sources), copy))
