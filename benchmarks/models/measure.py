"""Every causal LM of the installed transformers, tiny and random, asked the same questions with LoRA and with PTE."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..common.records import Record
from ..common.session import Session
from .tiny import config_types
from .trial import try_type

KEY = ("kind",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    parser.add_argument(
        "types",
        nargs="*",
        help="model types, tried again if they are known; all that are not known where none is named",
    )


def measure(session: Session) -> Iterator[Record]:
    """One record per type."""
    kinds = session.options.types or (["llama", "gpt2", "bloom"] if session.quick else config_types())
    for kind in kinds:
        if session.options.types or not session.results.has({"kind": kind}):
            yield try_type(kind).to_dict()


def summary(record: Record) -> str:
    """A line for a terminal."""
    return f"{record['kind']}: {record['verdict']} {record['reason'][:120]}"
