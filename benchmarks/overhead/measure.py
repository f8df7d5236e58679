"""Beside LoRA on the same linears: launches, CPU time and peak of a training step by the length of its passes, and of a token while decoding."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..common.records import Record
from ..common.session import Session
from ..common.session import add_options as add_shared
from . import step, token

PARTS = {"step": step, "token": token}
KEY = ("part", "figure", "shape", "thoughts", "window", "width", "layers", "batch", "prompt", "per_window", "peer")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add_shared(parser, "part", "peers", parts=tuple(PARTS), peers=tuple(dict.fromkeys((*step.PEERS, *token.PEERS))))


def measure(session: Session) -> Iterator[Record]:
    """Rows of both parts."""
    for name, part in PARTS.items():
        if session.wants_part(name):
            yield from part.measure(session)
