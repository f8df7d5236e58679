"""Which slots the tokens of a chunk may see, in the form the attention takes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .plan import Chunk


class _Held:
    """What a mask is told of a cache: slots in use before the chunk is written."""

    is_compileable = False

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def get_query_offset(self, *args: Any) -> int:
        """The slot of the first query."""
        return self.slots

    def get_mask_sizes(self, query_length: int, *args: Any) -> tuple[int, int]:
        """Slots in all, and the first of them."""
        return self.slots + query_length, 0


class ChunkMasks:
    """Makes the masks of the chunks of a call, each form once.

    Padding stands in prompts alone, or behind the end of a row, where nothing real looks back on it.

    Args:
        config: The text config of the model.
        dtype: What the model computes in.
        step: ``m``, tokens of an eviction.
    """

    def __init__(self, config: Any, dtype: torch.dtype, step: int) -> None:
        self.config, self.dtype, self.step = config, dtype, step
        self._made: dict[tuple[int, ...], Any] = {}

    def of(self, chunk: Chunk, prompt_mask: Tensor | None, rows: int, device: torch.device) -> Any:
        """The mask of ``chunk``; ``prompt_mask [B, P]`` is False for padding."""
        prompt, window = chunk.held
        gone = min(chunk.evictions, 1) * self.step
        form = (prompt, window, chunk.prompt, chunk.thoughts, chunk.evictions)
        if form not in self._made:
            held = prompt + window - gone
            slots = None
            if prompt_mask is not None:
                slots = torch.ones(rows, held + chunk.length, dtype=torch.bool, device=device)
                slots[:, :prompt] = prompt_mask[:, :prompt]
                slots[:, held : held + chunk.prompt] = prompt_mask[:, prompt : prompt + chunk.prompt]
            self._made[form] = create_causal_mask(
                config=self.config,
                inputs_embeds=torch.empty(
                    1 if slots is None else rows, chunk.length, 0, dtype=self.dtype, device=device
                ),
                attention_mask=slots,
                past_key_values=cast(Any, _Held(held)),
                and_mask_function=_still_there(prompt, held, self.step) if chunk.evictions > 1 else None,
            )
        return self._made[form]


def _still_there(prompt: int, held: int, step: int) -> Any:
    """The first ``m`` tokens of the chunk see all slots, the next ``m`` not the oldest ``m`` thoughts, and so on."""

    def visible(batch_index: Any, head_index: Any, query_index: Any, slot: Any) -> Any:
        gone = (query_index - held) // step * step
        return (slot < prompt) | (slot >= prompt + gone)

    return visible
