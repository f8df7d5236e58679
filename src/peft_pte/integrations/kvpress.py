"""Scores of kvpress (NVIDIA) as a policy: `pip install kvpress`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_pte.eviction.policy import EvictionPolicy, Window, register_eviction


@register_eviction("kvpress")
@dataclass(frozen=True)
class KVPress(EvictionPolicy):
    """``score`` of a `ScorerPress` of kvpress, by the name of its class, as in
    ``PTEConfig(eviction="kvpress", eviction_options={"press": "KnormPress"})``.

    Those fit that look at keys and values alone, as ``KnormPress`` and ``KeyDiffPress``. One that needs its attention module, hidden vectors or
    all queries is given none: those of thoughts are gone when thoughts leave. (Importing kvpress wraps transformers' attention functions.)

    Args:
        press: Name of a class of ``kvpress``.
        options: Its arguments; what it says of ratios is not used: the budget is the window.
    """

    press: str = "KnormPress"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_press", make_press(self.press, self.options))

    def score(self, window: Window) -> Tensor:
        """The scores of the press.

        Raises:
            NotImplementedError: It needs more than it is shown.
        """
        press: Any = object.__getattribute__(self, "_press")
        try:
            scores: Tensor = press.score(None, None, window.keys, window.values, None, {})
        except (AttributeError, TypeError) as error:
            raise NotImplementedError(
                f"{self.press} needs more than keys and values ({type(error).__name__}: {error}), which is all that is left when "
                "thoughts leave. Use another press, or one of the policies of peft_pte."
            ) from error
        return scores


def make_press(name: str, options: dict[str, Any]) -> Any:
    """A `ScorerPress` of kvpress.

    Raises:
        ImportError: kvpress is not installed.
        ValueError: There is none of that name, or it gives no scores.
    """
    try:
        presses = importlib.import_module("kvpress")
    except ImportError as error:
        raise ImportError('eviction="kvpress" needs the package kvpress: pip install kvpress.') from error
    press = getattr(presses, name, None)
    if press is None or not hasattr(press, "score"):
        raise ValueError(f"`press` must name a class of kvpress that scores tokens, got {name!r}. Use 'KnormPress'.")
    made = press(**options)
    _check_rows(made, name)
    return made


def _check_rows(press: Any, name: str) -> None:
    """Refuse scores that are drawn, or depend on other rows: scoring a sequence would evict something else than writing it.

    Raises:
        ValueError: They do.
    """
    keys = torch.arange(64.0).reshape(2, 1, 8, 4).cos()
    try:
        both, alone = (press.score(None, None, part, part, None, {}) for part in (keys, keys[:1]))
    except (AttributeError, TypeError):
        # It needs more than keys and values, which `score` says.
        return
    if not torch.allclose(both[:1], alone):
        raise ValueError(
            f"`press` must give a row the same scores whatever stands beside it and whenever it is asked, and {name} does not. For random choices use "
            'eviction="random".'
        )
