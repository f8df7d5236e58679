"""Which slots the tokens of a chunk may see, in the form the attention takes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ..cache.ragged import RaggedLayer
from ..cache.schedule import first_visible
from ..cache.store import known
from ..host.compat import CACHE, attention_of
from .plan import Chunk

_ALWAYS = torch.iinfo(torch.int64).max


class _Held:
    """What a mask is told of a cache: columns before the first query."""

    is_compileable = False

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def get_query_offset(self, *args: Any) -> int:
        """The column of the first query."""
        return self.columns

    def get_mask_sizes(self, query_length: int, *args: Any) -> tuple[int, int]:
        """Columns in all, and the first of them."""
        return self.columns + query_length, 0


class ChunkMasks:
    """Makes the masks of the chunks of a call, each form once where rows are in step.

    Args:
        config: The text config of the model.
        dtype: What the model computes in.
        window: ``W``.
        step: ``m``, tokens of an eviction.
        always: Whether layers want a mask where all that is not later is seen too: they add to it.
        together: ``[B, N, N]`` over the first columns of a sequence, True where a token sees a later one too; ``None``: nowhere.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        window: int,
        step: int,
        always: bool = False,
        together: Tensor | None = None,
    ) -> None:
        self.together = together
        self.config, self.dtype, self.window, self.step, self.always = config, dtype, window, step, always
        self._made: dict[tuple[int, ...], Any] = {}

    def in_step(self, chunk: Chunk, prompt_mask: Tensor | None, rows: int, device: torch.device) -> Any:
        """The mask of ``chunk`` where all rows share a clock; ``prompt_mask [B, P]`` is False for padding.

        Padding stands in prompts alone, or behind the end of a row, where nothing real looks back on it.
        """
        prompt, window = chunk.held
        form = (prompt, window, chunk.prompt, chunk.thoughts, chunk.evictions)
        together = self.together if chunk.prompt else None
        if form not in self._made:
            held = prompt + window - chunk.drop
            seen = None
            if prompt_mask is not None:
                seen = torch.ones(rows, held + chunk.length, dtype=torch.bool, device=device)
                seen[:, :prompt] = prompt_mask[:, :prompt]
                seen[:, held : held + chunk.prompt] = prompt_mask[:, prompt : prompt + chunk.prompt]
            still_there = _still_there(prompt, held, self.step) if chunk.evictions > 1 else None
            alike = seen is None and together is None
            made = self._make(1 if alike else rows, chunk.length, device, held, seen, still_there, together)
            self._made[form] = made.expand(rows, -1, -1, -1) if isinstance(made, Tensor) else made
        return self._made[form]

    def by_row(self, chunk: Chunk, prompt_mask: Tensor | None, written: Tensor, late: Tensor) -> Any:
        """The mask of ``chunk`` where each row has its own clock.

        Args:
            chunk: The chunk.
            prompt_mask: ``[B, P]``, False for padding; ``None``: no padding.
            written: ``[B]``, thoughts that a row has written when the chunk starts.
            late: ``[B]``, columns of thoughts of the chunk before a row starts.
        """
        prompt, window = chunk.held
        window -= chunk.drop
        rows, device = written.shape[0], written.device
        held = prompt + window

        def prompts(first: int, columns: int) -> Tensor:
            if prompt_mask is None:
                return torch.full((rows, columns), _ALWAYS, device=device)
            return torch.where(prompt_mask[:, first : first + columns], _ALWAYS, -1)

        def count(columns: int, first: Tensor) -> Tensor:
            return torch.arange(columns, device=device) + first[:, None]

        own = count(chunk.thoughts, written - late)
        standing = torch.where(own >= written[:, None], own, -1)
        columns = [prompts(0, prompt), count(window, written - window), prompts(prompt, chunk.prompt), standing]
        thought = torch.cat(columns, dim=1)
        first = first_visible(
            torch.cat([prompts(prompt, chunk.prompt).clamp(max=0), own], dim=1), self.window, self.step
        )
        together = self.together if chunk.prompt else None
        return self._make(rows, chunk.length, device, held, None, _not_before(thought, first, held), together)

    def of_heads(
        self, chunk: Chunk, prompt_mask: Tensor | None, written: Tensor, late: Tensor, layer: RaggedLayer
    ) -> Tensor:
        """The mask ``[B, H, T, columns]`` of ``chunk`` for a layer whose heads hold different numbers of thoughts.

        Args:
            chunk: The chunk.
            prompt_mask: ``[B, P]``, False for padding; ``None``: no padding.
            written: ``[B]``, thoughts that a row has written when the chunk starts.
            late: ``[B]``, columns of thoughts of the chunk before a row starts.
            layer: The layer of the cache.
        """
        prompt, window = chunk.held[0], chunk.held[1] - chunk.drop
        rows, device = written.shape[0], written.device
        holds = layer.holding(written)
        heads = holds.shape[1]
        there = torch.arange(window, device=device) >= window - holds[..., None]
        real = torch.ones(rows, prompt + chunk.prompt, dtype=torch.bool, device=device)
        if prompt_mask is not None:
            real = prompt_mask[:, : prompt + chunk.prompt]
        own = torch.cat([real[:, prompt:], torch.arange(chunk.thoughts, device=device) >= late[:, None]], dim=1)
        before = torch.cat([real[:, None, :prompt].expand(-1, heads, -1), there], dim=2)
        after = own[:, None] & torch.ones(chunk.length, chunk.length, dtype=torch.bool, device=device).tril()
        visible = torch.cat(
            [before[:, :, None].expand(-1, -1, chunk.length, -1), after[:, None].expand(-1, heads, -1, -1)], dim=3
        )
        return self._of_numbers(visible)

    def of_heads_at_step(self, prompt_mask: Tensor | None, layer: RaggedLayer) -> Tensor:
        """The mask ``[B, H, 1, slots]`` of one token per row for such a layer; ``prompt_mask [B, P]`` is False for padding."""
        there = known(layer.visible)
        real = there.new_ones(there.shape[0], layer.prompt_slots) if prompt_mask is None else prompt_mask
        real = real[:, None].expand(-1, there.shape[1], -1).to(there.device)
        return self._of_numbers(torch.cat([real, there], dim=2)[:, :, None])

    def _of_numbers(self, visible: Tensor) -> Tensor:
        """``[B, H, T, columns]`` to add to scores, of ``visible [B, G, T, columns]``."""
        nothing = torch.zeros((), dtype=self.dtype, device=visible.device)
        made = torch.where(visible, nothing, nothing + torch.finfo(self.dtype).min)
        return made.repeat_interleave(self.config.num_attention_heads // visible.shape[1], dim=1)

    def of_step(self, visible: Tensor | None, slots: int, rows: int, device: torch.device) -> Any:
        """The mask of one token per row over ``slots`` slots, of which ``visible [B, slots]`` (``None``: all) are seen."""
        kind = attention_of(self.config)
        if kind == "sdpa" and visible is None and not self.always:
            return None
        if kind in ("eager", "sdpa") and visible is not None:
            # Of numbers, or each layer would make them of the truth values again.
            nothing = torch.zeros((), dtype=self.dtype, device=device)
            return torch.where(visible[:, None, None], nothing, nothing + torch.finfo(self.dtype).min).expand(
                rows, -1, -1, -1
            )
        visible = visible if visible is None or visible.shape[0] == rows else visible.expand(rows, -1)
        made = self._make(1 if visible is None else rows, 1, device, slots - 1, visible, None)
        return made.expand(rows, -1, -1, -1) if isinstance(made, Tensor) else made

    def _make(
        self,
        rows: int,
        queries: int,
        device: torch.device,
        held: int,
        seen: Tensor | None,
        visible: Any,
        together: Tensor | None = None,
    ) -> Any:
        return create_causal_mask(
            config=self.config,
            inputs_embeds=torch.empty(rows, queries, 0, dtype=self.dtype, device=device),
            attention_mask=seen,
            **{CACHE: cast(Any, _Held(held))},
            and_mask_function=visible,
            or_mask_function=None if together is None else _seen_together(together),
            allow_is_causal_skip=not self.always,
        )


def _still_there(prompt: int, held: int, step: int) -> Any:
    """The first ``m`` tokens of the chunk see all columns, the next ``m`` not the oldest ``m`` thoughts, and so on."""

    def visible(batch_index: Any, head_index: Any, query_index: Any, column: Any) -> Any:
        gone = (query_index - held) // step * step
        return (column < prompt) | (column >= prompt + gone)

    return visible


def _seen_together(together: Tensor) -> Any:
    def visible(batch_index: Any, head_index: Any, query_index: Any, column: Any) -> Any:
        return together[batch_index, query_index, column]

    return visible


def _not_before(thought: Tensor, first: Tensor, held: int) -> Any:
    """A column is seen if its ``thought [B, columns]`` is not before the ``first [B, queries]`` that the query sees."""

    def visible(batch_index: Any, head_index: Any, query_index: Any, column: Any) -> Any:
        return thought[batch_index, column] >= first[batch_index, query_index - held]

    return visible
