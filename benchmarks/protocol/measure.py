"""What the paper's protocol takes, for whoever has the GPUs, by model and arm. Counted, not timed.

A scoring call (forward and backward of one completion of 3,072 tokens, gradient checkpointing, default settings) is counted on fake tensors as in
`footprint --part settings`, in the window of the protocol. A token of a rollout is counted in launches on a small model of the family and continued to the
layers of the shape. What follows from the counts is in `report.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..common.fake import Counted, PeakCase
from ..common.models import LINEARS, shape_config, shaped_base, with_lora, with_pte
from ..common.records import Record
from ..common.session import Session
from ..common.session import add_options as add_shared
from ..overhead.token import TokenCase, launches

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
DECODED_LAYERS = (2, 4)
KEY = ("shape", "arm", "prompt", "completion")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add_shared(parser, "shapes")


def measure(session: Session) -> Iterator[Record]:
    """One record per shape and arm."""
    shapes = ("tiny",) if session.quick else session.shapes or tuple(MODELS)
    completion, window = (96, 32) if session.quick else (COMPLETION, WINDOW)
    for shape in shapes:
        case = PeakCase(shape, completion, prompt=32 if session.quick else PROMPT, window=window, rank=RANK)
        config = shape_config(shape)
        for arm, fields in ARMS.items():
            where = {"shape": shape, "arm": arm, "prompt": case.prompt, "completion": completion}
            if session.results.has(where):
                continue
            scoring = Counted.of(case, fields).at(config.num_hidden_layers)
            decoded = [_decoding(layers, fields, window) for layers in DECODED_LAYERS]
            slope = (decoded[1] - decoded[0]) / (DECODED_LAYERS[1] - DECODED_LAYERS[0])
            yield {
                **where,
                "window": None if fields is None else window,
                "trained": _trained(shape, fields, window),
                **{f"scoring_{name}": value for name, value in asdict(scoring).items()},
                "decoding_launches": decoded[0] + slope * (config.num_hidden_layers - DECODED_LAYERS[0]),
                "layers": config.num_hidden_layers,
            }


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
