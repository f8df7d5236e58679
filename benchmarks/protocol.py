"""What the paper's protocol takes, for whoever has the GPUs: operations, launches, memory and hours, by model and arm. Counted, not timed.

A scoring call (forward and backward of one completion of 3,072 tokens, gradient checkpointing, default settings) is counted on fake tensors as in
`settings`, in the window of the protocol. A token of a rollout is counted in launches on a small model of the family and continued to the
layers of the shape; in bytes it reads the weights once for all rows and each row's keys and values. Hours follow from published rates of
the cards and from the three shares in :class:`Card`, which are assumptions: each part takes what the slowest of products, bytes and launches takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .cases import LINEARS, SHAPES, shape_config, shaped_base, with_lora, with_pte
from .peaks import PeakCase
from .session import Row, Session
from .settings import COUNTED_LAYERS, Costs, Work, counted_step
from .tables import table
from .theory import kv_bytes_per_token
from .token import TokenCase, launches

MODELS = {
    "Qwen2.5-3B": "Qwen2.5-3B-Instruct",
    "Qwen2.5-7B": "Qwen2.5-7B-Instruct",
    "Llama-3.1-8B": "R1-Distill-Llama-8B",
}
ARMS: dict[str, dict[str, Any] | None] = {
    "LoRA, full cache": None,
    "LoRA_c": {"state_update": "off"},
    "Global-Only": {"state_update": "frozen"},
    "PTE": {},
}
PROMPT, COMPLETION, WINDOW, RANK = 256, 3072, 768, 32
BATCH, ROLLOUT, MICRO, STEPS = 512, 64, 4, 272
"""Completions of a step, rows of a rollout and of a scoring call per GPU; steps of an epoch: 17,398 problems, 8 completions each."""
DECODED_LAYERS = (2, 4)
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


def measure(session: Session) -> Iterator[Row]:
    """One row per shape and arm."""
    shapes = ["tiny"] if session.quick else list(MODELS)
    completion, window = (96, 32) if session.quick else (COMPLETION, WINDOW)
    for shape in shapes:
        case = PeakCase(shape, completion, prompt=32 if session.quick else PROMPT, window=window, rank=RANK)
        config = shape_config(shape)
        for arm, fields in ARMS.items():
            scoring = _scoring(case, fields, config.num_hidden_layers)
            decoded = [_decoding(layers, fields, window) for layers in DECODED_LAYERS]
            slope = (decoded[1] - decoded[0]) / (DECODED_LAYERS[1] - DECODED_LAYERS[0])
            yield {
                "shape": shape,
                "arm": arm,
                "prompt": case.prompt,
                "completion": completion,
                "window": None if fields is None else window,
                "trained": _trained(shape, fields, window),
                **{f"scoring_{name}": value for name, value in asdict(scoring).items()},
                "decoding_launches": decoded[0] + slope * (config.num_hidden_layers - DECODED_LAYERS[0]),
                "layers": config.num_hidden_layers,
            }


def _scoring(case: PeakCase, fields: dict[str, Any] | None, layers: int) -> Costs:
    found = []
    for few in COUNTED_LAYERS:
        work = Work()
        step = counted_step(case, fields, few, work)
        found.append((Costs(work.number, work.flop, step.kept, step.peak), step))
    (fewer, first), (more, second) = found
    line = fewer.toward(more, (layers - first.layers) / (second.layers - first.layers))
    return Costs(line.launches, line.flop, line.kept_bytes, first.peak_of(layers, second))


def _adapted(base: Any, fields: dict[str, Any] | None, window: int, meta: bool) -> Any:
    if fields is None:
        return with_lora(base, RANK, LINEARS, meta=meta)
    return with_pte(base, meta=meta, r=RANK, num_global_tokens=RANK, cache_window=window, **fields)


def _decoding(layers: int, fields: dict[str, Any] | None, window: int) -> float:
    case = TokenCase(1, layers=layers)
    # Small enough for a rollout to fill it, and as many evictions to a token as in a large one.
    model = _adapted(shaped_base(case.shape, "cpu", layers=layers), fields, min(window, 32), meta=False)
    return launches(model.eval(), "", case)


def _trained(shape: str, fields: dict[str, Any] | None, window: int) -> int:
    model = _adapted(shaped_base(shape, "meta"), fields, window, meta=True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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


def account(row: Row, card: Card, cards: int) -> Account:
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


def report(rows: list[Row]) -> str:
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
    return table(head, lines, left=2)
