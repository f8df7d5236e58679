"""The adapter of one linear: PTE's ``A (S (B x))``, reference and kernel, beside LoRA's ``A (B x)`` and the linear itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from ..common.models import shape_config
from ..common.session import Row, Session, release
from ..common.timing import captured
from ..common.timing import measure as measure_time

PEERS = ("base_linear", "lora", "delta_reference", "delta_triton")
COLD_BYTES = 2**28
"""On a GPU, operands are taken in turns from copies of this size together, so that none is still in the L2 cache."""


@dataclass(frozen=True)
class DeltaCase:
    """One linear and one batch of tokens."""

    shape: str
    linear: str
    batch: int
    tokens: int
    """``T`` per sequence: 1 while decoding, ``m`` in a segment of a replay."""
    rank: int


def cases(session: Session) -> list[DeltaCase]:
    """The widest and the narrowest linear of each shape, decoding and in segments."""
    sizes = [(1, 1), (8, 1), (64, 1), (1, 256), (8, 256)] if session.gpu else [(1, 1), (4, 1), (4, 64)]
    rank = 32 if session.gpu else 8
    return [
        DeltaCase(shape, linear, batch, tokens, rank)
        for shape in session.shapes
        for linear in ("up_proj", "k_proj")
        for batch, tokens in sizes
    ]


def measure(session: Session) -> Iterator[Row]:
    """One row per case and peer."""
    for case in cases(session):
        for peer in session.missing("delta", case, PEERS):
            yield session.attempt("delta", case, peer, partial(_measure, session, case, peer))
        release(session.device)


def features(case: DeltaCase) -> tuple[int, int]:
    """``(in, out)`` of the linear."""
    config: Any = shape_config(case.shape)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.hidden_size, {
        "up_proj": config.intermediate_size,
        "k_proj": config.num_key_value_heads * head_dim,
    }[case.linear]


def floor_bytes(case: DeltaCase, peer: str, itemsize: int) -> int:
    """Bytes that must move: weights and input read, output written, float32 states read."""
    inner, outer = features(case)
    weights = inner * outer if peer == "base_linear" else case.rank * (inner + outer)
    states = 0 if peer in ("base_linear", "lora") else case.batch * case.rank**2 * 4
    return itemsize * (weights + case.batch * case.tokens * (inner + outer)) + states


def floating_point_operations(case: DeltaCase, peer: str) -> int:
    """Multiplications and additions of the matmuls."""
    inner, outer = features(case)
    per_token = inner * outer if peer == "base_linear" else case.rank * (inner + outer)
    per_token += 0 if peer in ("base_linear", "lora") else case.rank**2
    return 2 * case.batch * case.tokens * per_token


def _measure(session: Session, case: DeltaCase, peer: str) -> Row:
    floor = floor_bytes(case, peer, session.dtype.itemsize)
    copies = min(-(-COLD_BYTES // floor), 64) if session.gpu else 1
    calls = [_call(session, case, peer) for _ in range(copies)]

    def run() -> None:
        for call in calls:
            call()

    with torch.no_grad():
        spread = measure_time(captured(run, session.device), session.device, repeats=20, budget=session.budget)
    times = {key: value / copies for key, value in asdict(spread).items() if key != "repeats"}
    limit = max(
        floor / session.ceilings["bytes_per_second"],
        floating_point_operations(case, peer) / session.ceilings["flop_per_second"],
    )
    return {
        "seconds": {**times, "repeats": spread.repeats},
        "floor_bytes": floor,
        "flop": floating_point_operations(case, peer),
        "share_of_ceiling": limit / times["median"],
    }


def _call(session: Session, case: DeltaCase, peer: str) -> Callable[[], Any]:
    inner, outer = features(case)
    draw = partial(torch.randn, device=session.device, dtype=session.dtype)
    hidden = draw(case.batch, case.tokens, inner)
    if peer == "base_linear":
        return partial(functional.linear, hidden, draw(outer, inner))
    down, up = draw(case.rank, inner), draw(outer, case.rank)
    if peer == "lora":
        return lambda: functional.linear(functional.linear(hidden, down), up) * 2.0
    from peft_pte.ops import delta

    state = torch.randn(case.batch, case.rank, case.rank, device=session.device)
    return partial(delta, hidden, down, state, up, scale=2.0, impl=peer.removeprefix("delta_"))
