"""Rows side by side: a layout in which the prompts of all rows end in the same column, and evictions come in the same columns.

A batch may pad anywhere: TRL pads prompts left and completions right, an SFT collator pads right, a later turn of a conversation is
padded to the longest. A call runs in one layout: prompts end in column ``P``, thoughts follow without a gap. A row whose clock is in the
middle of a block where those of others are not is padded in front. Rows already so are left alone; others are moved, and their outputs
moved back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.rows import Clocks


@dataclass(frozen=True)
class Layout:
    """How rows are laid out."""

    prompt: int
    """``P``, columns of the prompts, left padding included."""
    columns: int
    """``P + T``."""
    thoughts: tuple[int, ...]
    """Thoughts of each row."""
    offsets: tuple[int, ...]
    """Columns of padding in front of the thoughts of each row."""
    source: Tensor | None = None
    """``[B, P + T]``, the input column that each column came from; ``None``: rows were left alone."""
    target: Tensor | None = None
    """``[B, N]``, the column that each input column went to; ``P + T`` for padding."""
    mask: Tensor | None = None
    """``[B, P + T]``, False for padding; ``None``: no padding."""

    @property
    def ragged(self) -> bool:
        """Whether rows differ in their number of thoughts, or start apart."""
        return len(set(self.thoughts)) > 1 or any(self.offsets)

    def pack(self, rows: Tensor) -> Tensor:
        """``[B, N, ...] -> [B, P + T, ...]``."""
        if self.source is None:
            return rows
        return rows.gather(1, _like(self.source, rows))

    def unpack(self, rows: Tensor) -> Tensor:
        """``[B, P + T, ...] -> [B, N, ...]``; zero where the input was padding."""
        if self.target is None:
            return rows
        padded = torch.cat([rows, rows.new_zeros(rows.shape[0], 1, *rows.shape[2:])], dim=1)
        return padded.gather(1, _like(self.target, padded))


def lay_out(
    boundaries: Tensor,
    mask: Tensor | None,
    columns: int,
    clocks: Clocks | None = None,
    agree: Callable[[int, int], tuple[int, int]] | None = None,
) -> Layout:
    """The layout of rows whose thoughts start at ``boundaries [B]`` and whose real tokens are ``mask [B, N]``.

    ``clocks`` say where rows stand, if they have written thoughts before; ``agree`` may ask for more columns of prompt and of thoughts
    than the rows need.
    """
    column = torch.arange(columns, device=boundaries.device)
    thought = column >= boundaries[:, None]
    real = torch.ones_like(thought) if mask is None else mask
    before, after = real & ~thought, real & thought
    # One synchronisation: is the layout the one we want already, and how wide is it?
    aligned = (
        (boundaries == boundaries[0]).all()
        & ~(before[:, :-1] & ~real[:, 1:] & ~thought[:, 1:]).any()
        & ~(after[:, 1:] & ~real[:, :-1] & thought[:, :-1]).any()
    )
    head = torch.stack([aligned.long(), boundaries[0], before.sum(dim=1).amax()])
    is_aligned, first, widest, *counts = torch.cat([head, after.sum(dim=1)]).tolist()
    thoughts = tuple(counts)
    offsets = (0,) * len(thoughts) if clocks is None else clocks.offsets(thoughts)
    longest = max(offset + count for offset, count in zip(offsets, thoughts, strict=True))
    # One thought of rows that share no clock comes in one column.
    apart = clocks is not None and len(set(clocks.thoughts)) > 1 and longest == 1 < columns - first
    is_aligned = is_aligned and not any(offsets) and not apart
    needed = (first, columns - first) if is_aligned else (widest, longest)
    widest, longest = needed if agree is None else agree(*needed)
    if is_aligned and (widest, longest) == needed:
        return Layout(first, columns, thoughts, offsets, mask=mask)
    total = widest + longest
    rank_before, rank_after = before.cumsum(dim=1) - 1, after.cumsum(dim=1) - 1
    start = widest + torch.tensor(offsets, device=boundaries.device)[:, None]
    target = torch.where(before, widest - before.sum(dim=1, keepdim=True) + rank_before, start + rank_after)
    target = torch.where(real, target, total)
    batch = boundaries.shape[0]
    source = column.new_zeros(batch, total + 1).scatter(1, target, column.expand(batch, -1))
    packed = torch.zeros_like(source, dtype=torch.bool).scatter(1, target, real)
    return Layout(widest, total, thoughts, offsets, source[:, :total], target, packed[:, :total])


def _like(index: Tensor, rows: Tensor) -> Tensor:
    # Where layers are spread over devices, what comes out is on another one than what went in.
    return index.to(rows.device).reshape(*index.shape, *([1] * (rows.ndim - 2))).expand(-1, -1, *rows.shape[2:])
