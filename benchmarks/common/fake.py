"""Peak memory of scoring and backward at the true shapes, counted on fake tensors: no numbers, no GPU.

The real code runs, `accounting.PeakMemory` sees every storage it makes and loses. Counted is what one sequence needs above the
weights: activations, keys and values, states, gradients of the adapters. The head is left out (TRL's fused head never makes
all logits, whatever the adapter), and so are weights and optimizer, which are arithmetic.

What is alive at one point of the step is affine in the number of layers. Where the most is alive is not the same point in few
layers as in many, so peaks are taken by phase, from one attention of the bottom or the top layer to the next, and each phase is
continued in a straight line: two counts of few layers say what all need. `overhead`, `footprint` and `protocol` count with it.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from peft_pte.passes import run

from .accounting import Launches, PeakMemory
from .models import LINEARS, forget_numbers, shaped_base, with_lora, with_pte

COUNTED_LAYERS = (2, 3)


@dataclass(frozen=True)
class PeakCase:
    """One sequence of one shape."""

    shape: str
    completion: int
    prompt: int = 256
    window: int = 1024
    rank: int = 32


@dataclass(frozen=True)
class Step:
    """Bytes of one step above the weights."""

    layers: int
    kept: int
    """Alive between forward and backward, beside what was returned."""
    peak: int
    """Alive at once."""
    phases: dict[tuple[str, Any], int]
    """The same by phase, which the n-th attention of a layer begins; layers in the middle lie between those of the ends."""

    def peak_of(self, layers: int, other: Step) -> int:
        """The peak of ``layers`` layers, given ``other``, a step of another number of them."""
        share = (layers - self.layers) / (other.layers - self.layers)
        ends = [key for key in self.phases if key[0] != "middle"]
        return round(max(self.phases[key] + share * (other.phases[key] - self.phases[key]) for key in ends))


def counted_step(
    case: PeakCase, fields: dict[str, Any] | None, layers: int, beside: AbstractContextManager[Any] | None = None
) -> Step:
    """The bytes of forward and backward under PTE with ``fields`` (``None``: LoRA), which run within ``beside``."""
    model = build(case, fields, layers)
    with FakeTensorMode():
        forget_numbers(model)
        ids = torch.zeros(1, case.prompt + case.completion, dtype=torch.long)
        backbone = model.get_base_model().model
        gc.collect()
        with beside or nullcontext(), PeakMemory() as memory, offloaded_is_elsewhere(memory):
            note_phases(memory, backbone.layers)
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
            gc.collect()
            between = memory.live - hidden.nbytes
            hidden.backward(torch.empty_like(hidden))
    return Step(layers, between, memory.peak, memory.phases)


def note_phases(memory: PeakMemory, layers: Any) -> None:
    """Let each attention of each layer begin a phase."""
    ends = {0: "bottom", len(layers) - 1: "top"}
    for index, layer in enumerate(layers):
        calls = itertools.count()

        def begin(*_: Any, index: int = index, calls: Any = calls) -> None:
            call = next(calls)
            memory.begin((ends[index], call) if index in ends else ("middle", (index, call)))

        layer.self_attn.register_forward_pre_hook(begin)


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


@dataclass(frozen=True)
class Costs:
    """One step of one sequence."""

    launches: float
    """Operations that are not views."""
    flop: float
    """Of matmuls and attention; under a mask attention is all pairs of its chunk, without one those that are causal."""
    kept_bytes: float
    """Alive between forward and backward, beside what the backbone returned."""
    peak_bytes: float
    """Alive at once above the weights."""

    def toward(self, other: Costs, share: float) -> Costs:
        """On the straight line through both, ``share`` of the way; 1 is ``other``."""
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return Costs(**{name: mine + share * (theirs - mine) for (name, mine), theirs in pairs})


@dataclass(frozen=True)
class Counted:
    """One case with few layers and with more."""

    few: Costs
    more: Costs
    steps: tuple[Step, Step]

    @classmethod
    def of(cls, case: PeakCase, fields: dict[str, Any] | None) -> Counted:
        """Count both."""
        pairs = [count(case, fields, layers) for layers in COUNTED_LAYERS]
        return cls(*(costs for costs, _ in pairs), steps=tuple(step for _, step in pairs))

    def at(self, layers: int) -> Costs:
        """What ``layers`` layers cost."""
        few, more = self.steps
        line = self.few.toward(self.more, (layers - few.layers) / (more.layers - few.layers))
        return replace(line, peak_bytes=few.peak_of(layers, more))


def count(case: PeakCase, fields: dict[str, Any] | None, layers: int) -> tuple[Costs, Step]:
    """One step of ``layers`` layers under PTE with ``fields`` (``None``: LoRA)."""
    work = Work()
    step = counted_step(case, fields, layers, work)
    return Costs(work.number, work.flop, step.kept, step.peak), step


class Work(Launches):
    """Launches and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        if packet in _ATTENTION:
            place, products = _ATTENTION[packet]
            self.flop += products * _of_attention(
                *args[place : place + 2], masked=(kwargs or {}).get("attn_mask") is not None
            )
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}
"""Where the queries stand among the arguments, and how many products are taken."""


def _of_attention(query: torch.Tensor, key: torch.Tensor, masked: bool) -> int:
    """Operations of one product of attention."""
    batch, heads, queries, head_dim = query.shape
    pairs = queries * key.shape[2] if masked else queries * (queries + 1) // 2
    return 2 * batch * heads * pairs * head_dim
