"""Scoring by what left when a sequence was written: whether it can have been so, and what leaves at which eviction."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..cache.cache import PTECache
from ..cache.heads import ChoosingLayer
from ..cache.ragged import RaggedLayer
from ..cache.schedule import evictions_before
from ..cache.store import Recorded
from ..eviction.records import Evictions
from ..seam import Generation, Seam
from .turn import Turn

_REMEDY = "Hand on what `generate` returned for these very sequences, row by row."


def refuse_continued() -> NoReturn:
    """Refuse a record in a call that goes on with a cache.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "`evictions` are of whole sequences, so they cannot be scored on with a cache (`past_key_values`). Score the whole sequences."
    )


def check_evictions(evictions: Evictions, cache: PTECache, turn: Turn | None, positions: Tensor) -> bool:
    """Refuse what cannot have left; returns whether it is known of all rows.

    Args:
        evictions: What is to leave.
        cache: The cache of the call.
        turn: What rows write; ``None``: nothing is bounded.
        positions: ``[B, T]``, absolute, of the columns of thoughts.

    Raises:
        ValueError: The record is of other layers, rows, heads or lengths, or a thought leaves twice, or before it was written.
    """
    choosing = {index: layer for index, layer in cache.thought_layers if isinstance(layer, ChoosingLayer)}
    if turn is None or not choosing:
        raise ValueError(
            "`evictions` are for a bounded cache whose heads choose what leaves, and here nothing is chosen. Leave them out."
        )
    if set(evictions.layers) != set(choosing):
        raise ValueError(
            f"`evictions` must be of the layers {sorted(choosing)}, got those of {sorted(evictions.layers)}. {_REMEDY}"
        )
    step, window, batch = turn.clocks.step, turn.clocks.window, len(turn.thoughts)
    if (evictions.window, evictions.step) != (window, step):
        raise ValueError(
            f"`evictions` must be those of a window of {window} thoughts of which {step} leave together, got {evictions.window} and {evictions.step}. "
            f"{_REMEDY}"
        )
    if evictions.batch != batch:
        raise ValueError(f"`evictions` must be of {batch} rows, got {evictions.batch}. {_REMEDY}")
    known = evictions.counts
    _check_numbers([_miscounted(part, known, choosing[index], step) for index, part in evictions.layers.items()])
    counts: list[int] = known.tolist()
    _check_lengths(counts, turn)
    _check_positions(evictions, turn, positions, window, step)
    return all(count >= _evictions(thoughts, turn) for count, thoughts in zip(counts, turn.thoughts, strict=True))


def _evictions(thoughts: int, turn: Turn) -> int:
    return evictions_before(thoughts - 1, turn.clocks.window, turn.clocks.step) if thoughts else 0


def _check_numbers(wrong: list[Tensor]) -> None:
    device = wrong[0].device
    for index, there in enumerate(torch.stack([part.to(device) for part in wrong]).tolist()):
        if there:
            raise ValueError(
                "`evictions` must hold what each head loses at an eviction, and in the bounded layer "
                f"{index} (counted from 0) hold more or less. {_REMEDY}"
            )


def _miscounted(part: Tensor, counts: Tensor, layer: ChoosingLayer, step: int) -> Tensor:
    """Whether in a record ``[B, E, G, m]`` a head of a layer loses more or less than it does at one of ``counts [B]`` evictions."""
    number = torch.arange(part.shape[1], device=part.device)
    lost: Any = step
    if isinstance(layer, RaggedLayer) and part.shape[1]:
        if part.shape[2] != len(layer.clock.budgets):
            raise ValueError(
                f"`evictions` must be of {len(layer.clock.budgets)} heads in layer {layer.index}, got {part.shape[2]}. {_REMEDY}"
            )
        table = torch.tensor([lost for lost, _ in layer.clock.table], device=part.device)
        lost = table[number.clamp(max=len(table) - 1)]
    known = number < counts[:, None].to(part.device)
    return (((part >= 0).sum(dim=3) != lost) & known[:, :, None]).any()


def _check_lengths(counts: list[int], turn: Turn) -> None:
    for row, (count, thoughts) in enumerate(zip(counts, turn.thoughts, strict=True)):
        # What would leave for the last token, no token that is scored comes behind: `generate` never feeds it.
        needed = _evictions(thoughts - 1, turn) if thoughts else 0
        if 0 < count < needed:
            raise ValueError(
                f"`evictions` must hold the {needed} evictions of the {thoughts} thoughts of row {row}, got {count}. {_REMEDY}"
            )


def _check_positions(evictions: Evictions, turn: Turn, positions: Tensor, window: int, step: int) -> None:
    late = torch.tensor(turn.offsets, device=positions.device)
    count = torch.tensor(turn.thoughts, device=positions.device)
    wrong: list[Tensor] = []
    if not positions.shape[1]:
        return
    for part in evictions.layers.values():
        if not part.numel():
            continue
        left = part.to(positions.device).long()
        number = torch.arange(left.shape[1], device=left.device)
        # The newest thought that can leave at each eviction, and the first there is.
        newest = torch.minimum(window + number * step, count[:, None]) - 1
        last = positions.gather(1, (late[:, None] + newest).clamp(min=0, max=positions.shape[1] - 1))
        first = positions.gather(1, late[:, None].clamp(max=positions.shape[1] - 1))
        known = left >= 0
        outside = known & ((left > last[:, :, None, None]) | (left < first[..., None, None]))
        happened = (window + number * step < count[:, None])[:, :, None, None]
        ordered = left.transpose(1, 2).flatten(2).sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        wrong += [(outside & happened).any(), twice.any()]
    if wrong and bool(torch.stack(wrong).any()):
        raise ValueError(
            f"`evictions` name a thought twice in a head, or one that is not written by then: they are of other sequences. {_REMEDY}"
        )


def check_recorded(seam: Seam, adapter: str | None, returns_dict: bool | None) -> None:
    """Refuse to return what cannot be had.

    Raises:
        ValueError: No adapter is active, nothing is bounded or chosen, or the output has no place for it.
    """
    if adapter is None or seam.config(adapter).cache_window is None or seam.policy(adapter).uniform:
        raise ValueError(
            "`return_evictions` needs an active adapter with a bounded window whose heads choose what leaves: with "
            'eviction="sliding_window" the oldest leave, and scoring knows them by itself. Leave it out.'
        )
    if not returns_dict:
        raise ValueError(
            "`return_evictions` needs `return_dict_in_generate=True`: the evictions are a field of the output."
        )


def remember(seam: Seam, generation: Generation, output: Any, evictions: Evictions) -> None:
    """Let what left the sequences of a ``generate`` that began with an empty cache be found by their tokens."""
    cache = generation.cache
    rows = None if cache is None else cache.rows
    if seam.memory is None or rows is None or cache is None or rows.columns != _columns(output) - 1:
        return
    sequences = output if isinstance(output, Tensor) else output.sequences
    behind = torch.tensor(rows.bound, device=rows.device) - rows.thoughts
    start = rows.columns - behind - rows.lengths
    # The last token was never read, but in rows that ended before.
    stop = start + rows.lengths + (1 if rows.running is None else rows.running.long())
    tokens = [
        row[first:last] for row, first, last in zip(sequences.tolist(), start.tolist(), stop.tolist(), strict=True)
    ]
    seam.memory.note(seam.writer(cache.adapter or ""), tokens, evictions)


def _columns(output: Any) -> int:
    """Of the sequences that a ``generate`` returned."""
    sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
    return sequences.shape[1]


def check_given(evictions: Any, adapter: str | None) -> None:
    """Refuse what is no record, or goes to a model that evicts nothing.

    Raises:
        TypeError: It is no :class:`peft_pte.Evictions`.
        ValueError: No adapter is active.
    """
    if evictions is None:
        return
    if not isinstance(evictions, Evictions):
        raise TypeError(
            f"`evictions` must be peft_pte.Evictions, as `generate` returns them, got {type(evictions).__name__}."
        )
    if adapter is None:
        raise ValueError(
            "`evictions` need an active adapter: the base model has its full cache, and evicts nothing. Leave them out."
        )


def at_eviction(evictions: Evictions, numbers: Tensor, complete: bool) -> Recorded:
    """What leaves at the eviction of each row before which there were ``numbers [B]``."""
    layers: dict[int, Tensor] = {}
    for index, part in evictions.layers.items():
        if not part.shape[1]:
            continue
        there = numbers.clamp(max=part.shape[1] - 1)[:, None, None, None].expand(-1, 1, *part.shape[2:])
        found = part.gather(1, there)[:, 0]
        layers[index] = torch.where((numbers < part.shape[1])[:, None, None], found, -1)
    return Recorded(layers, complete)
