"""Time on a GPU of decoding, of an eviction, of the adapter of one linear, of training steps; ratios on a CPU (``--quick``)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from ..common.models import GPU_SHAPES
from ..common.records import Record
from ..common.session import Session
from ..common.session import add_options as add_shared
from ..common.timing import Budget, ceilings
from . import compress, decode, delta, train

PARTS = {"delta": delta, "compress": compress, "decode": decode, "train": train}
SHARES = {"delta": 0.06, "compress": 0.08, "decode": 0.50, "train": 0.36}
"""Of the budget; what one leaves goes to those after it."""
PEERS = (*delta.PEERS, *compress.PEERS, *decode.PEERS, *train.PEERS)
KEY = ("part", "shape", "linear", "batch", "length", "tokens", "completion", "window", "prompt", "evict", "rank")
KEY += ("evict_ratio", "steps", "peer", "device")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add_shared(parser, "part", "shapes", "peers", parts=tuple(PARTS), peers=tuple(dict.fromkeys(PEERS)))
    parser.add_argument("--budget", type=float, help="seconds for all of it (default: 500 on a GPU, 240 on a CPU)")


def measure(session: Session) -> Iterator[Record]:
    """Rows of all parts, within the budget; what did not fit says so."""
    whole = Budget(session.options.budget or (500 if session.gpu else 240))
    limits = ceilings(session.device, session.dtype)
    rates = f"{limits['bytes_per_second'] / 1e9:,.0f} GB/s, {limits['flop_per_second'] / 1e12:,.2f} TFLOP/s"
    print(f"{session.results.source['gpu' if session.gpu else 'cpu']}: {rates}", flush=True)
    shapes = session.shapes or (GPU_SHAPES if session.gpu else ("tiny",))
    names = [name for name in PARTS if session.wants_part(name)]
    for index, name in enumerate(names):
        share = SHARES[name] / sum(SHARES[later] for later in names[index:])
        yield from PARTS[name].measure(
            replace(session, budget=Budget(whole.left * share), ceilings=limits, shapes=shapes)
        )
