"""What the adapted model saw since it was last asked: evictions, state norms, cache bytes. Nothing is printed."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from ..cache.cache import PTECache
from ..cache.schedule import evictions_before
from .layout import Layout


class Statistics:
    """Running means, kept on the device until :meth:`drain`, so that watching costs no synchronisation."""

    def __init__(self) -> None:
        self._scored_evictions: list[float] = []
        self._decoded_evictions = 0
        self._norms: list[Tensor] = []
        self._decoding_bytes = 0
        self._scoring_bytes = 0

    def observe(self, cache: PTECache, layout: Layout | None, evicted: bool, decoding: bool) -> None:
        """Note a call that used ``cache``, ``decoding`` or scoring; ``layout`` is ``None`` where it was one token per row.

        A call of one token that evicted nothing has nothing to say.
        """
        if layout is None and not evicted:
            return
        norm = cache.state.norm()
        if norm is not None:
            self._norms = [*self._norms[-63:], norm]
        if layout is not None and layout.columns - layout.prompt > 1 and not decoding:
            self._scored_evictions = [*self._scored_evictions[-63:], _evictions(cache, layout)]
            self._scoring_bytes = max(self._scoring_bytes, cache.nbytes)
        else:
            self._decoded_evictions = cache.evictions
            self._decoding_bytes = max(self._decoding_bytes, cache.nbytes)

    def drain(self) -> dict[str, float]:
        """``evictions_per_sequence``, ``state_norm``, ``cache_bytes`` since the last call; empty if nothing ran.

        Evictions are those of scored sequences (padding does not count) where any were scored, else those of the last
        generation; bytes are the most that a generation held, or a scoring call where nothing was generated.
        """
        figures: dict[str, float] = {}
        if self._scored_evictions:
            figures["evictions_per_sequence"] = fmean(self._scored_evictions)
        elif self._decoding_bytes:
            figures["evictions_per_sequence"] = float(self._decoded_evictions)
        if self._norms:
            figures["state_norm"] = float(torch.stack(self._norms).mean())
        if self._decoding_bytes or self._scoring_bytes:
            figures["cache_bytes"] = float(self._decoding_bytes or self._scoring_bytes)
        self.__init__()  # type: ignore[misc]
        return figures


def _evictions(cache: PTECache, layout: Layout) -> float:
    """Mean number of evictions that the thoughts of one row of a call cause."""
    window, step = cache.window or 0, cache.tokens_per_eviction
    return fmean(evictions_before(count - 1, window, step) if count else 0 for count in layout.thoughts)
