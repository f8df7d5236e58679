"""Peak memory of scoring and backward at the true shapes, counted on fake tensors: no numbers, no GPU.

The real code runs, `accounting.PeakMemory` sees every storage it makes and loses. Counted is what one sequence needs above the
weights: activations, keys and values, states, gradients of the adapters. The head is left out (TRL's fused head never makes
all logits, whatever the adapter), and so are weights and optimizer, which are arithmetic.

Peaks are affine in the number of layers and, some windows in, in the length of the completion. Two numbers of layers and two
lengths are counted and say what others need; ``layers_checked`` and ``lengths_checked`` hold the prediction of a third.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_pte.passes import run

from .accounting import PeakMemory
from .cases import GPU_SHAPES, LINEARS, SHAPES, shape_config, shaped_base, with_lora, with_pte
from .flops import forget_numbers
from .session import Row, Session

METHODS: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "pte": {},
    "pte_whole_segments": {"recompute_layers": False},
    "pte_offload": {"offload": True},
}
"""By name the further fields of `PTEConfig`; LoRA has its own full attention and layers checkpointed. What is offloaded does
not count."""
LENGTHS = (3072, 16384, 65536)
"""Completions whose peaks are predicted; the shortest is counted too, up to the layers."""
COUNTED_LENGTHS = (2048, 3072)
COUNTED_LAYERS = (2, 3)
MICRO_BATCHES = (1, 8)


@dataclass(frozen=True)
class PeakCase:
    """One sequence of one shape."""

    shape: str
    completion: int
    prompt: int = 256
    window: int = 1024
    rank: int = 32


def measure(session: Session) -> Iterator[Row]:
    """One row per shape, method and length."""
    shapes = [shape for shape in session.shapes if shape in GPU_SHAPES] or list(GPU_SHAPES)
    for shape in shapes:
        for method in filter(session.wants, METHODS):
            yield from predictions(shape, method)


def predictions(shape: str, method: str) -> Iterator[Row]:
    """Rows of all lengths, from four counts and two more that check them."""
    layers: int = shape_config(shape).num_hidden_layers
    few, more = COUNTED_LAYERS
    short, long = (PeakCase(shape, length) for length in COUNTED_LENGTHS)
    counts = {(case, number): counted_peak(case, method, number) for case in (short, long) for number in COUNTED_LAYERS}

    def at(case: PeakCase) -> float:
        per_layer = counts[case, more] - counts[case, few]
        return counts[case, few] + per_layer * (layers - few)

    per_token = (at(long) - at(short)) / (long.completion - short.completion)
    third_layer = counts[short, more] + counts[short, more] - counts[short, few]
    third_length = 2 * counts[long, few] - counts[short, few]
    longer = replace(long, completion=2 * long.completion - short.completion)
    checks = {
        "layers_checked": counted_peak(short, method, more + 1) / third_layer,
        "lengths_checked": counted_peak(longer, method, few) / third_length,
    }
    fixed = fixed_bytes(shape, method)
    for length in LENGTHS:
        peak = at(long) + per_token * (length - long.completion)
        whole = {f"whole_bytes_batch_{batch}": round(fixed + batch * peak) for batch in MICRO_BATCHES}
        yield {
            **asdict(PeakCase(shape, length)),
            "peer": method,
            "peak_bytes": round(peak),
            "bytes_per_token": per_token,
            "fixed_bytes": fixed,
            **whole,
            **checks,
        }


def counted_peak(case: PeakCase, method: str, layers: int) -> int:
    """Bytes alive at once above the weights, for a model of ``layers`` layers."""
    return peak_of(case, fields_of(case, method), layers)


def fields_of(case: PeakCase, method: str) -> dict[str, Any] | None:
    """The further fields of ``method``."""
    fields = METHODS[method]
    if fields is None or fields.get("recompute_layers", True):
        return fields
    # The activations of all layers of a pass are alive together, so passes are as short as they can be.
    return {**fields, "segment_length": case.window // 4}


def peak_of(case: PeakCase, fields: dict[str, Any] | None, layers: int) -> int:
    """The same of PTE with ``fields``; ``None``: LoRA."""
    model = build(case, fields, layers)
    with FakeTensorMode():
        forget_numbers(model)
        ids = torch.zeros(1, case.prompt + case.completion, dtype=torch.long)
        backbone = model.get_base_model().model
        gc.collect()
        with PeakMemory() as memory, offloaded_is_elsewhere(memory):
            if fields is None:
                with no_packing():
                    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
            else:
                # Where the prompt ends is found by looking at labels, and fake ones cannot be looked at. As two calls on one
                # cache the segments are the same.
                kept = model.base_model.new_cache()
                pieces = ids.split([case.prompt, case.completion], dim=1)
                hidden = torch.cat(
                    [backbone(input_ids=part, past_key_values=kept).last_hidden_state for part in pieces], 1
                )
                del kept
            hidden.backward(torch.empty_like(hidden))
    return memory.peak


def no_packing() -> AbstractContextManager[Any]:
    """Within the block, transformers sees one sequence as one: fake positions it takes for packed, and masks all pairs."""
    return patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)


@contextmanager
def offloaded_is_elsewhere(memory: PeakMemory) -> Iterator[None]:
    """Within the block, what is offloaded does not count."""
    original = run.Offload

    class Elsewhere(original):  # type: ignore[misc, valid-type]
        def _pack(self, tensor: torch.Tensor) -> Any:
            packed = super()._pack(tensor)
            if packed is not tensor:
                memory.leave_out(packed.values)
            return packed

    run.Offload = Elsewhere  # type: ignore[misc]
    try:
        yield
    finally:
        run.Offload = original  # type: ignore[misc]


def build(case: PeakCase, fields: dict[str, Any] | None, layers: int) -> Any:
    """The adapted model on the meta device, as a trainer has it: bfloat16, checkpointing on."""
    base = shaped_base(case.shape, "meta", torch.bfloat16, "sdpa", layers)
    if fields is None:
        model = with_lora(base, case.rank, LINEARS, meta=True, autocast=False)
    else:
        adapter = {"r": case.rank, "num_global_tokens": case.rank, "cache_window": case.window}
        model = with_pte(base, meta=True, autocast=False, **adapter, **fields)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


@cache
def fixed_bytes(shape: str, method: str) -> int:
    """Weights in bfloat16, and adapters in float32 with two moments of Adam; their gradients are in the peak."""
    model = build(PeakCase(shape, 0), METHODS[method], shape_config(shape).num_hidden_layers)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return 2 * SHAPES[shape].parameters + 3 * 4 * trained
