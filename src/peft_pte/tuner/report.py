"""What the cache of an adapted model did, for a reader: evictions, states, bytes beside a full cache, speed, distance to the full cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..passes.boundary import Columns, PromptSpec, find_prompt_ends
from ..passes.fidelity import text_fidelity
from ..passes.statistics import Scored
from ..seam import Seam


@dataclass(frozen=True)
class Report:
    """What happened since the last report, or the last log of a trainer; ``None`` where nothing did. ``print`` shows it as a table."""

    evictions_per_sequence: float | None = None
    """Of scored sequences, or else of the last generation."""
    state_norms: list[float] = field(default_factory=list)
    """Mean L2 norm of the rows of ``S``, by layer that has a state."""
    cache_bytes: float | None = None
    """The most that was held."""
    full_cache_bytes: float | None = None
    """What the model's own cache would have held of the same tokens."""
    tokens_per_second: float | None = None
    """Of generations, all rows together."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """Of a text that was given: ``kl`` to the base model on its full cache, in nats a token, by how much had left, and ``ratio_p5``
    (:meth:`peft_pte.passes.fidelity.Fidelity.figures`)."""

    def __str__(self) -> str:
        return "\n".join(f"{name:<24}{figure}" for name, figure in self._lines()) or "Nothing ran yet."

    def _lines(self) -> list[tuple[str, str]]:
        lines: list[tuple[str, str]] = []
        if self.evictions_per_sequence is not None:
            lines.append(("evictions per sequence", f"{self.evictions_per_sequence:.1f}"))
        if self.state_norms:
            low, high = min(self.state_norms), max(self.state_norms)
            lines.append(("norm of the state", f"{low:.3g} to {high:.3g}, over {len(self.state_norms)} layers"))
        if self.cache_bytes is not None and self.full_cache_bytes is not None:
            share = self.full_cache_bytes / max(self.cache_bytes, 1.0)
            full = f"{self.full_cache_bytes / 1e6:,.2f} MB"
            lines.append(("cache", f"{self.cache_bytes / 1e6:,.2f} MB; a full one {full}, {share:.1f} times as much"))
        if self.tokens_per_second is not None:
            lines.append(("tokens per second", f"{self.tokens_per_second:,.1f}"))
        named = {
            "kl": "KL to the full cache",
            "kl_beyond": "  beyond four windows",
            "ratio_p5": "5th percentile of ratio",
        }
        for name, label in named.items():
            if not math.isnan(self.fidelity.get(name, math.nan)):
                unit = "" if name == "ratio_p5" else " nats a token"
                lines.append((label, f"{self.fidelity[name]:.3g}{unit}"))
        return lines


def report(
    model: Any, input_ids: Tensor | None, attention_mask: Tensor | None, prompt_length: int | Tensor | None
) -> Report:
    """See :meth:`peft_pte.PTEModel.report`."""
    seam = Seam.require(model)
    norms, figures = seam.statistics.state_norms(), seam.statistics.drain()
    figures.pop("state_norm", None)
    distance: dict[str, float] = {}
    if input_ids is not None:
        config = seam.config(seam.require_adapter())
        mask = None if attention_mask is None else attention_mask.bool()
        columns = Columns(input_ids, mask, (input_ids.shape[0], input_ids.shape[1]), input_ids.device)
        ends = find_prompt_ends(config.prompt_end, PromptSpec(length=prompt_length), columns, None)
        if ends.first is None or bool(ends.unseen.any()):
            raise ValueError(
                "`prompt_length` must say where thinking starts in `input_ids`, as nothing else does. Give it, or train with PTEConfig(prompt_end=...)."
            )
        tokens = text_fidelity(seam, Scored(input_ids, mask, ends.first))
        # Not of what has happened.
        seam.statistics.drain()
        distance = {name: figure.item() for name, figure in tokens.figures().items()} if len(tokens.kl) else {}
    return Report(state_norms=norms, fidelity=distance, **figures)
