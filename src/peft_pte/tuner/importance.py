"""How far back the heads of a model look: what ``head_budget`` splits windows by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..config import PTEConfig
from ..eviction.policies import Attention
from ..eviction.policy import Window, register_eviction
from ..passes.modes import evaluating
from ..seam import Seam

_PROBE = "_importance"


@register_eviction(_PROBE)
@dataclass(frozen=True)
class _Probe(Attention):
    """The oldest leave, and it is noted how much the last queries attended to them.

    Args:
        queries: As in ``attention``.
        found: By layer, what was noted: ``[G]`` of each eviction.
    """

    found: dict[int, list[Tensor]] = field(default_factory=dict)

    def leaving(self, window: Window, evict: int) -> Tensor:
        """The oldest."""
        weights = window.attention()[..., :evict].sum(dim=-1).mean(dim=(0, 2))
        self.found.setdefault(window.layer, []).append(weights.unflatten(0, (window.keys.shape[1], -1)).mean(dim=1))
        oldest = torch.arange(evict, device=weights.device)
        return oldest.expand(*window.positions.shape[:2], -1)


@torch.no_grad()
def head_importance(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cache_window: int = 1024,
    evict_ratio: float = 0.25,
    queries: int = 8,
    prompt_length: int = 4,
) -> list[list[float]]:
    """How much each KV head attends to thoughts that are about to leave a window, for ``eviction_options={"importance": ...}``.

    The share of attention, of the last queries before each eviction, that falls on the ``m`` oldest thoughts of a sliding window: what a head
    that looks back further than its window would lose. A model that is to hold its window well spends the slots there (HeadKV, arXiv
    2410.19258, measures the same kind of thing with questions whose answers are known).

    Args:
        model: A base model, without adapters. It is as it was afterwards.
        input_ids: Texts ``[B, N]``, longer than the window, of the kind that the model is to think.
        attention_mask: ``[B, N]``, zero for padding; ``None``: no padding.
        cache_window: ``W`` of the adapter to come, in tokens.
        evict_ratio: Likewise.
        queries: Of how many thoughts, the last before an eviction.
        prompt_length: Columns that never leave.

    Returns:
        By layer of the model, by KV head: from 0 to 1. Empty for a layer that evicts nothing.

    Raises:
        TypeError: The model has adapters already.
        ValueError: No text is longer than the window.
    """
    if isinstance(model, PeftModel) or Seam.of(model) is not None:
        raise TypeError(
            "`model` must be a base model without adapters, got an adapted one. Measure before get_peft_model."
        )
    found: dict[int, list[Tensor]] = {}
    config = PTEConfig(
        task_type="CAUSAL_LM",
        r=1,
        num_global_tokens=1,
        state_update="off",
        cache_window=cache_window,
        evict_ratio=evict_ratio,
        eviction=_PROBE,
        eviction_options={"queries": queries, "found": found},
    )
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    adapted: Any = get_peft_model(model, config)
    try:
        with evaluating(adapted):
            for row, mask in tqdm(zip(input_ids, real, strict=True), total=len(input_ids), desc="Texts"):
                adapted(input_ids=row[mask][None], prompt_length=prompt_length)
        layers = len(Seam.require(model).sites)
    finally:
        adapted.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    if not found:
        raise ValueError(
            f"`input_ids` must hold a text of more than {cache_window + prompt_length} tokens, the window and the prompt, got rows of "
            f"{input_ids.shape[1]}. Use longer texts, or a smaller cache_window."
        )
    return [torch.stack(found[layer]).mean(dim=0).tolist() if layer in found else [] for layer in range(layers)]
