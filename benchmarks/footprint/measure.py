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

FAMILIES, LENGTHS = ["Llama", "Qwen2", "GPT-2"], [0.5, 1, 2, 4, 8, 16]
"""Of the small models; windows that are written."""
# Three prompts: from four rows on, MKL multiplies float64 row by row alike and the error would be an uninformative 0.
REPLAYED = {"prompt_lengths": [12, 5, 9], "dtypes": ["float64", "float32", "bfloat16", "float16"]}
VARIANTS = ["pte, detached cache", "pte, key_diff"]
training = partial(training_peak, window=64, prompt=32, check=4)
SMALL: dict[str, Callable[..., Iterator[Record]]] = {
    "cache": partial(
        cache_bytes, window=64, multiples=LENGTHS, prompt_lengths=[32, 20], policies=["sliding_window", "key_diff"]
    ),
    "training": partial(training, multiples=LENGTHS, methods=["pte", "lora"], families=FAMILIES),
    "variants": partial(training, multiples=[1, 4, 8, 16], methods=VARIANTS, families=["Llama"]),
    "replay": partial(replay_error, window=16, multiple=6, families=FAMILIES, **REPLAYED),
    "parameters": partial(parameters, true_rank=32),
    "computed": partial(true_shape_bytes, window=1024, prompt=256, lengths=[1024, 4096, 16384, 65536], rank=32),
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
    for part, function in SMALL.items():
        if session.wants_part(part):
            for row in function(**(QUICK.get(part, {}) if session.quick else {})):
                if not session.results.has({"part": part, **row}):
                    yield {"part": part, **row}
    if session.wants_part("settings"):
        yield from settings.measure(session)
