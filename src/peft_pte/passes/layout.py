"""A layout in which the prompts of all rows end in the same column.

A batch to score may pad anywhere: TRL pads prompts left and completions right, an SFT collator pads right and its
prompts end at different columns. A call runs in one layout: prompts end in column ``P``, thoughts start there, padding
is outside both. Rows already so are left alone; others are moved, and their outputs moved back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How rows are laid out."""

    prompt: int
    """``P``, columns of the prompts, left padding included."""
    columns: int
    """``P + T``."""
    source: Tensor | None = None
    """``[B, P + T]``, the input column that each column came from; ``None``: rows were left alone."""
    target: Tensor | None = None
    """``[B, N]``, the column that each input column went to; ``P + T`` for padding."""
    mask: Tensor | None = None
    """``[B, P + T]``, False for padding; ``None``: no padding."""
    ragged: bool = False
    """Whether padding stands among the columns of the thoughts: rows differ in their number."""

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
    boundaries: Tensor, mask: Tensor | None, columns: int, agree: Callable[[int, int], tuple[int, int]] | None = None
) -> Layout:
    """The layout of rows whose thoughts start at ``boundaries [B]`` and whose real tokens are ``mask [B, N]``.

    ``agree`` may ask for more columns of prompt and of thoughts than the rows need.
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
    thoughts = after.sum(dim=1)
    is_aligned, first, widest, longest, shortest = torch.stack(
        [aligned.long(), boundaries[0], before.sum(dim=1).amax(), thoughts.amax(), thoughts.amin()]
    ).tolist()
    needed = (first, columns - first) if is_aligned else (widest, longest)
    widest, longest = needed if agree is None else agree(*needed)
    ragged = longest != shortest
    if is_aligned and (widest, longest) == needed:
        return Layout(first, columns, mask=mask, ragged=ragged)
    total = widest + longest
    rank_before, rank_after = before.cumsum(dim=1) - 1, after.cumsum(dim=1) - 1
    target = torch.where(before, widest - before.sum(dim=1, keepdim=True) + rank_before, widest + rank_after)
    target = torch.where(real, target, total)
    batch = boundaries.shape[0]
    source = column.new_zeros(batch, total + 1).scatter(1, target, column.expand(batch, -1))
    packed = torch.zeros_like(source, dtype=torch.bool).scatter(1, target, real)
    return Layout(widest, total, source[:, :total], target, packed[:, :total], ragged)


def _like(index: Tensor, rows: Tensor) -> Tensor:
    return index.reshape(*index.shape, *([1] * (rows.ndim - 2))).expand(-1, -1, *rows.shape[2:])
