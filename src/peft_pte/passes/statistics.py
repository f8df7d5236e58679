"""What the adapted model saw since it was last asked: evictions, states, bytes, speed. Nothing is printed."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from ..cache.cache import PTECache
from ..cache.schedule import evictions_before
from .layout import Layout

_KEPT = 64
"""Calls whose means are taken."""


@dataclass(frozen=True)
class Scored:
    """The last text that was scored."""

    ids: Tensor
    """``[B, N]``."""
    mask: Tensor | None
    """``[B, N]``, False for padding; ``None``: no padding."""
    first: Tensor | None
    """``[B]``, first thought column of each row; ``None``: there are no thoughts."""


@dataclass
class _Bytes:
    """The most that was held, and by a full cache of the same tokens."""

    held: int = 0
    full: int = 0

    def note(self, held: int, full: int) -> None:
        self.held, self.full = max(self.held, held), max(self.full, full)


@dataclass
class Statistics:
    """Running means, kept on the device until they are asked for, so that watching costs no synchronisation."""

    keep_text: bool = False
    """Whether the last text that was scored is kept, for a comparison with the full cache."""
    text: Scored | None = None
    _scored_evictions: list[float] = field(default_factory=list)
    _decoded_evictions: int = 0
    _norms: list[Tensor] = field(default_factory=list)
    _decoding: _Bytes = field(default_factory=_Bytes)
    _scoring: _Bytes = field(default_factory=_Bytes)
    _written: int = 0
    _seconds: float = 0.0

    def observe(self, cache: PTECache, layout: Layout | None, evicted: bool, decoding: bool, token_width: int) -> None:
        """Note a call that used ``cache``, ``decoding`` or scoring; ``layout`` is ``None`` where it was one token per row.

        A call of one token that evicted nothing has nothing to say.
        """
        if layout is None and not evicted:
            return
        norms = cache.state.norms()
        if norms is not None:
            self._norms = [*self._norms[1 - _KEPT :], norms]
        if layout is not None and layout.columns - layout.prompt > 1 and not decoding:
            self._scored_evictions = [*self._scored_evictions[1 - _KEPT :], _evictions(cache, layout)]
            self._scoring.note(cache.nbytes, cache.full_nbytes(token_width))
        else:
            self._decoded_evictions = cache.evictions
            # Of single tokens the end of the generation says it (:meth:`note_end`).
            self._decoding.note(cache.nbytes, 0 if layout is None else cache.full_nbytes(token_width))

    def note_written(self, tokens: int, seconds: float) -> None:
        """Note that a generation wrote ``tokens`` in ``seconds``."""
        self._written += tokens
        self._seconds += seconds

    def note_end(self, cache: PTECache, token_width: int) -> None:
        """Note what ``cache`` holds at the end of a generation."""
        self._decoding.note(cache.nbytes, cache.full_nbytes(token_width))

    def state_norms(self) -> list[float]:
        """Mean L2 norm of the rows of ``S`` in each layer that has a state; empty before any."""
        same = [norms for norms in self._norms if norms.shape == self._norms[-1].shape]
        return torch.stack(same).mean(dim=0).tolist() if same else []

    def figures(self) -> dict[str, float]:
        """``evictions_per_sequence``, ``state_norm``, ``cache_bytes``, ``full_cache_bytes``, ``tokens_per_second``; empty if nothing ran.

        Evictions are those of scored sequences (padding does not count) where any were scored, else those of the last
        generation. Bytes are the most that a generation held, or a scoring call where nothing was generated, and what a cache that
        keeps every column would have held. Tokens are those that generations wrote, of all rows, prefill included in their time.
        """
        figures: dict[str, float] = {}
        if self._scored_evictions:
            figures["evictions_per_sequence"] = fmean(self._scored_evictions)
        elif self._decoding.held:
            figures["evictions_per_sequence"] = float(self._decoded_evictions)
        if norms := self.state_norms():
            figures["state_norm"] = fmean(norms)
        found = self._decoding if self._decoding.held else self._scoring
        if found.held:
            figures |= {"cache_bytes": float(found.held), "full_cache_bytes": float(found.full)}
        if self._seconds:
            figures["tokens_per_second"] = self._written / self._seconds
        return figures

    def drain(self) -> dict[str, float]:
        """:meth:`figures`, and begin anew."""
        figures = self.figures()
        self.__init__(self.keep_text)  # type: ignore[misc]
        return figures


def _evictions(cache: PTECache, layout: Layout) -> float:
    """Mean number of evictions that the thoughts of one row of a call cause."""
    window, step = cache.window or 0, cache.tokens_per_eviction
    return fmean(evictions_before(count - 1, window, step) if count else 0 for count in layout.thoughts)
