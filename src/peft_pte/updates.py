"""How the tokens of an eviction share the rows of the state: one entry per update, by the name of ``PTEConfig.encoder_attention``.

An update is ``S' = weights @ (W_V V_e)`` with weights made of the scores ``(W_Q h_g) (W_K K_e)^T / sqrt(R)``. The kernels know the three kinds that
are here; one that is registered beside them runs in torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Update:
    """One way to make an update of what was evicted."""

    weights: Weights
    """From scores ``[.., Q, E]`` and the validity of tokens ``[.., E]`` (``None``: all valid) to weights ``[.., Q, E]``."""
    source: str
    """Where it comes from."""


def _mean(scores: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return scores / scores.shape[-1]
    mask = valid[..., None, :]
    return torch.where(mask, scores, 0.0) / mask.sum(dim=-1, keepdim=True).clamp(min=1)


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return scores.softmax(dim=-1)
    mask = valid[..., None, :]
    # A row without any valid token has no softmax; its weights are zero, not 0 / 0.
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return torch.where(mask, weights, 0.0)


def _shares(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Each token is shared out among the rows, 1 on average."""
    return _mean(scores.shape[-2] * scores.softmax(dim=-2), valid)


UPDATES = {
    "linear": Update(_mean, "paper, section 3: S' = (W_Q h_g) (W_K K_e)^T (W_V V_e); the mean over E is [ours]"),
    "softmax": Update(_softmax, "the same with a softmax over the evicted tokens [ours]"),
    "slots": Update(_shares, "a softmax over the rows, as in slot attention (arXiv 2006.15055) [ours]"),
}


_OF_KERNELS = frozenset(UPDATES)


def register_update(name: str, source: str) -> Callable[[Weights], Weights]:
    """Let ``PTEConfig(encoder_attention=name)`` share the rows of the state by the function that is decorated.

    The function makes weights ``[.., Q, E]`` of scores ``[.., Q, E]``, ``(W_Q h_g) (W_K K_e)^T / sqrt(R)`` in float32 or float64, and of the validity
    of tokens ``[.., E]`` (``None``: all valid). It may look at nothing else: each eviction of each row is one ``[Q, E]``, wherever it stands. Gradients
    flow through it. What it gives to a token of padding is not used. It runs in torch; ``impl="triton"`` is refused.

    Args:
        name: What ``PTEConfig.encoder_attention`` calls it. Whoever loads the adapter registers it before.
        source: Where it comes from.

    Returns:
        A decorator that gives the function back.

    Raises:
        ValueError: Another function has the name.
    """

    def register(weights: Weights) -> Weights:
        known = UPDATES.get(name)
        if known is not None and not _is_same(known.weights, weights):
            raise ValueError(f"`encoder_attention` {name!r} is known already. Choose another name.")

        @functools.wraps(weights)
        def masked(scores: Tensor, valid: Tensor | None) -> Tensor:
            found = weights(scores, valid)
            return found if valid is None else torch.where(valid[..., None, :], found, 0.0)

        UPDATES[name] = Update(masked, source)
        return weights

    return register


def _is_same(one: Weights, other: Weights) -> bool:
    """Whether both are of one definition, as where a module is loaded again."""
    named = ((each.__module__, each.__qualname__) for each in (one, other))
    return len(set(named)) == 1


def update_of(name: str) -> Update:
    """The update that ``PTEConfig.encoder_attention`` names.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in UPDATES:
        raise ValueError(f"`attention` must be one of {', '.join(map(repr, UPDATES))}, got {name!r}.")
    return UPDATES[name]


def implementation_of(name: str, impl: str) -> str:
    """``impl``, as far as it can compute the update ``name``: kernels know those of this package alone.

    Raises:
        ValueError: There is no update of that name.
        NotImplementedError: The kernels are asked for by name, and do not know it.
    """
    update_of(name)
    if name in _OF_KERNELS or impl not in ("auto", "triton"):
        return impl
    if impl == "triton":
        raise NotImplementedError(
            f'`impl="triton"` knows the updates {", ".join(map(repr, sorted(_OF_KERNELS)))}, got {name!r}. Use impl="auto", which takes the reference.'
        )
    return "reference"
