"""`Evictions`: what left, and when, of sequences that were written; handed to scoring, the same leaves again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evictions:
    """Which thoughts left each row, eviction by eviction.

    ``model.generate(..., return_evictions=True, return_dict_in_generate=True).evictions``, and ``model(..., evictions=...)``: what rounding in
    half precision would choose otherwise leaves as it left.
    """

    layers: dict[int, Tensor]
    """By layer of the model that is bounded, ``[B, E, G, m]``: absolute positions of what left at each of ``E`` evictions; -1 behind the last of a
    row, or where a head lost fewer than ``m``. A row of -1 chooses for itself."""
    window: int
    """``W``."""
    step: int
    """``m``, thoughts that are written between two evictions."""

    @staticmethod
    def of_rows(logs: dict[int, list[list[Tensor]] | None], counts: Sequence[int], window: int, step: int) -> Evictions:
        """Put together what was noted, ``[G, m]`` at each eviction of each row; the first ``counts`` of them happened.

        Raises:
            ValueError: Less was noted than has happened.
        """
        if any(
            len(entries) < count for rows in logs.values() for entries, count in zip(rows or [], counts, strict=True)
        ):
            raise ValueError(
                "Some evictions were not recorded: calls with gradients note none. Write the sequence under torch.no_grad()."
            )
        layers: dict[int, Tensor] = {}
        for index, rows in logs.items():
            found = [entries[:count] for entries, count in zip(rows or [], counts, strict=True)]
            shapes = [entry.shape for entries in found for entry in entries]
            heads = shapes[0][0] if shapes else 0
            width = max((shape[1] for shape in shapes), default=0)
            device = next((entry.device for entries in found for entry in entries), torch.device("cpu"))
            made = torch.full((len(found), max(counts, default=0), heads, width), -1, dtype=torch.int32, device=device)
            for row, entries in enumerate(found):
                for number, entry in enumerate(entries):
                    made[row, number, :, width - entry.shape[1] :] = entry
            layers[index] = made
        return Evictions(layers, window, step)

    @property
    def batch(self) -> int:
        """Rows ``B``."""
        return next(iter(self.layers.values())).shape[0]

    @property
    def counts(self) -> Tensor:
        """``[B]``, evictions that are known of each row."""
        first = next(iter(self.layers.values()))
        return (
            (first >= 0).flatten(2).any(dim=2).sum(dim=1)
            if first.numel()
            else torch.zeros(self.batch, dtype=torch.long)
        )

    def rows(self, index: Sequence[int] | Tensor) -> Evictions:
        """The rows at ``index``."""
        there = torch.as_tensor(index, dtype=torch.long)
        return replace(self, layers={layer: part[there.to(part.device)] for layer, part in self.layers.items()})

    def to(self, device: torch.device | str) -> Evictions:
        """The same on ``device``."""
        return replace(self, layers={layer: part.to(device) for layer, part in self.layers.items()})

    @staticmethod
    def join(parts: Sequence[Evictions | None]) -> Evictions:
        """One row after the other; ``None``: a row that nothing is known of.

        Raises:
            ValueError: Nothing is known of any row, or they are of different windows.
        """
        given = [part for part in parts if part is not None]
        if len({(part.window, part.step) for part in given}) > 1:
            raise ValueError("`parts` must be of one window and evict_ratio. Join those of one adapter.")
        if not given:
            raise ValueError("`parts` must hold the evictions of a row at least, got none.")
        layers: dict[int, Tensor] = {}
        for layer in given[0].layers:
            held = [part.layers[layer] for part in given]
            most, heads, width = (max(part.shape[axis] for part in held) for axis in (1, 2, 3))
            rows: list[Tensor] = []
            for part in parts:
                own = held[0].new_full((1 if part is None else part.batch, most, heads, width), -1)
                if part is not None:
                    known = part.layers[layer]
                    own[:, : known.shape[1], : known.shape[2], width - known.shape[3] :] = known
                rows.append(own)
            layers[layer] = torch.cat(rows)
        return replace(given[0], layers=layers)


class EvictionMemory:
    """What left the sequences that were written last, found by their tokens.

    A trainer scores what it has written in other batches and in another order, and hands on no more than tokens.

    Args:
        rows: Sequences that are remembered; the oldest are forgotten.
    """

    def __init__(self, rows: int) -> None:
        self.capacity = rows
        self.asked = self.found = 0
        self._rows: dict[tuple[str, tuple[int, ...]], Evictions] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def note(self, writer: str, sequences: Sequence[Sequence[int]], evictions: Evictions) -> None:
        """Remember what left ``sequences`` of a ``writer``, tokens without padding."""
        held = evictions.to("cpu")
        for number, (tokens, count) in enumerate(zip(sequences, held.counts.tolist(), strict=True)):
            self._rows.pop((writer, tuple(tokens)), None)
            own = {layer: part[number : number + 1, :count].clone() for layer, part in held.layers.items()}
            self._rows[writer, tuple(tokens)] = replace(held, layers=own)
        while len(self._rows) > self.capacity:
            del self._rows[next(iter(self._rows))]

    def recall(self, writer: str, ids: Tensor, mask: Tensor | None, counted: bool = True) -> Evictions | None:
        """What left the rows ``ids [B, N]`` when ``writer`` wrote them, whose padding ``mask [B, N]`` leaves out; ``None``: nothing is known of any."""
        rows = ids.tolist()
        real = [[True] * len(row) for row in rows] if mask is None else mask.bool().tolist()
        found = [
            self._rows.get((writer, tuple(token for token, here in zip(row, there, strict=True) if here)))
            for row, there in zip(rows, real, strict=True)
        ]
        if counted and any(name == writer for name, _ in self._rows):
            self.asked += len(found)
            self.found += sum(part is not None for part in found)
        return Evictions.join(found) if any(part is not None for part in found) else None
