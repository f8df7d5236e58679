"""What the counts of the protocol mean on a card: memory and hours.

A token of a rollout reads the weights once for all rows and each row's keys and values. Hours follow from published rates of the cards and from
the three shares in :class:`Card`, which are assumptions: each part takes what the slowest of products, bytes and launches takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.arithmetic import kv_bytes_per_token
from ..common.models import SHAPES, shape_config
from ..common.pages import Section, origin, table
from ..common.records import Record
from .measure import KEY, MODELS

BATCH, ROLLOUT, MICRO, STEPS = 512, 64, 4, 272
"""Completions of a step, rows of a rollout and of a scoring call per GPU; steps of an epoch: 17,398 problems, 8 completions each."""
BF16, FLOAT32 = 2, 4
ADAM = 4 * FLOAT32
"""Bytes of a trained weight: itself, its gradient, two moments."""


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet, and what of it is assumed to be reached."""

    memory: float
    flops: float
    """Dense products in bfloat16 a second."""
    bandwidth: float
    flops_reached: float = 0.4
    bandwidth_reached: float = 0.6
    launch: float = 6e-6
    """Seconds for an operation that is too small to count."""


CARDS = {"A100 40 GB": Card(40e9, 312e12, 1.555e12), "H100 80 GB": Card(80e9, 989e12, 3.35e12)}


@dataclass(frozen=True)
class Account:
    """A step of the protocol on one of several equal GPUs."""

    memory: float
    """Bytes at most: while scoring or while writing."""
    scoring: float
    """Seconds of a step."""
    writing: float
    """Seconds of a step."""

    @property
    def hours(self) -> float:
        """Of an epoch."""
        return STEPS * (self.scoring + self.writing) / 3600


def account(row: Record, card: Card, cards: int) -> Account:
    """What ``row`` takes on ``cards`` GPUs, each with all the weights (DDP)."""
    config, parameters = shape_config(row["shape"]), SHAPES[row["shape"]].parameters
    weights, adapter = BF16 * parameters, ADAM * row["trained"]
    share = BATCH / cards
    # The frozen head: logits and their gradient, in chunks that are never all alive.
    head = 3 * 2 * config.hidden_size * config.vocab_size * row["completion"]
    flop = MICRO * (row["scoring_flop"] + head)
    scoring = max(flop / (card.flops * card.flops_reached), row["scoring_launches"] * card.launch) * share / MICRO
    kept = kv_bytes_per_token(config, BF16)
    rows = min(ROLLOUT, share)
    held = [min(token, row["window"] or token) + row["prompt"] for token in range(row["completion"])]
    steps = [
        max(
            (weights + rows * columns * kept) / (card.bandwidth * card.bandwidth_reached),
            2 * parameters * rows / (card.flops * card.flops_reached),
            row["decoding_launches"] * card.launch,
        )
        for columns in held
    ]
    gradients = FLOAT32 * row["trained"]
    scored = weights + adapter + MICRO * (row["scoring_peak_bytes"] - gradients)
    written = weights + adapter - gradients + rows * (max(held) + 1) * kept
    return Account(max(scored, written), scoring, sum(steps) * share / rows)


def render(rows: list[Record]) -> str:
    """The table of examples/paper/README.md."""
    head = ["model", "arm", "PFLOP a step", "launches: completion scored", "token written"]
    head += [f"{part}, {name}" for name in CARDS for part in ("GB", "hours, 1", "hours, 8")]
    lines = []
    for row in rows:
        cells = [MODELS.get(row["shape"], row["shape"]), row["arm"], f"{BATCH * row['scoring_flop'] / 1e15:,.0f}"]
        cells += [f"{row['scoring_launches']:,.0f}", f"{row['decoding_launches']:,.0f}"]
        for card in CARDS.values():
            one, eight = (account(row, card, cards) for cards in (1, 8))
            fits = one.memory <= card.memory
            cells += [
                f"{one.memory / 1e9:.0f}{'' if fits else ', too much'}",
                f"{one.hours:,.0f}",
                f"{eight.hours:,.0f}",
            ]
        lines.append(cells)
    return f"{table(head, lines, left=2)}\n\n{origin(rows)}"


SECTIONS = (Section("examples/paper/README.md", "protocol", render, key=KEY),)
