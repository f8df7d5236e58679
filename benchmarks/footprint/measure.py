"""Bytes, errors and counts of small models, and the settings of a training step at true shapes. Nothing here is timed.

``cache``: bytes while decoding; ``training``, ``variants``: peak of a step; ``replay``: scoring against the rollout; ``parameters``:
trained ones; ``computed``: bytes at true shapes by arithmetic; ``settings``: steps at true shapes, counted on fake tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..common.arithmetic import true_shape_bytes
from ..common.records import Record
from ..common.session import Session
from ..common.session import add_options as add_shared
from . import settings
from .small import cache_bytes, parameters, replay_error, training_peak

SMALL: dict[str, tuple[Callable[..., Iterator[Record]], dict[str, Any]]] = {
    "cache": (
        cache_bytes,
        {
            "window": 64,
            "multiples": [0.5, 1, 2, 4, 8, 16],
            "prompt_lengths": [32, 20],
            "policies": ["sliding_window", "key_diff"],
        },
    ),
    "training": (
        training_peak,
        {
            "window": 64,
            "multiples": [0.5, 1, 2, 4, 8, 16],
            "prompt": 32,
            "methods": ["pte", "lora"],
            "families": ["Llama", "Qwen2", "GPT-2"],
            "check": 4,
        },
    ),
    "variants": (
        training_peak,
        {
            "window": 64,
            "multiples": [1, 4, 8, 16],
            "prompt": 32,
            "methods": ["pte, detached cache", "pte, key_diff"],
            "families": ["Llama"],
            "check": 4,
        },
    ),
    "replay": (
        replay_error,
        {
            "window": 16,
            "multiple": 6,
            # Three: from four rows on, MKL multiplies float64 row by row alike and the error would be an uninformative 0.
            "prompt_lengths": [12, 5, 9],
            "dtypes": ["float64", "float32", "bfloat16", "float16"],
            "families": ["Llama", "Qwen2", "GPT-2"],
        },
    ),
    "parameters": (parameters, {"true_rank": 32}),
    "computed": (
        true_shape_bytes,
        {"window": 1024, "prompt": 256, "lengths": [1024, 4096, 16384, 65536], "rank": 32},
    ),
}
QUICK: dict[str, dict[str, Any]] = {
    "cache": {"window": 16, "multiples": [1, 2, 4], "policies": ["sliding_window"]},
    "training": {"window": 16, "multiples": [1, 4], "families": ["Llama", "GPT-2"]},
    "variants": {"window": 16, "multiples": [1, 4]},
    "replay": {"window": 8, "multiple": 3, "families": ["Llama"]},
}
PARTS = (*SMALL, "settings")
KEY = ("part", "model", "cache", "method", "attention", "dtype", "thoughts", "shape", "completion", "window", "peer")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add_shared(parser, "part", "shapes", "peers", parts=PARTS, peers=settings.PEERS)


def measure(session: Session) -> Iterator[Record]:
    """Rows of all parts; a part of small models of which a row is missing is measured from its start."""
    for part, (function, fields) in SMALL.items():
        if session.wants_part(part):
            given = {**fields, **(QUICK.get(part, {}) if session.quick else {})}
            for row in partial(function, **given)():
                if not session.results.has({"part": part, **row}):
                    yield {"part": part, **row}
    if session.wants_part("settings"):
        yield from settings.measure(session)
