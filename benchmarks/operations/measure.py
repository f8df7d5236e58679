"""Floating-point operations of one GRPO step at the true shapes, counted on fake tensors: no numbers, no GPU.

A step is a rollout, a forward for the old policy, and a scoring forward with its backward pass, recomputation included.
`torch.utils.flop_counter` sees every matmul that runs. A model of one and of two layers is counted, and layers are equal,
so all layers follow exactly; decoding is linear in the tokens held, so two lengths say what all others cost.

Two readings of attention: ``dense`` counts every query against every key of its call, masked or not, as a kernel without
knowledge of the mask computes; ``visible`` counts the pairs that the mask lets through, which is the least a kernel may do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..common.models import GPU_SHAPES, LINEARS, forget_numbers, shape_config, shaped_base, with_lora, with_pte
from ..common.records import Record
from ..common.session import Row, Session
from ..common.session import add_options as add_shared

METHODS = ("lora", "lora_bounded", "pte", "pte_whole_segments", "pte_offload")
"""LoRA on a full cache; LoRA under the window (`state_update="off"`, the paper's LoRA_c); PTE; PTE with whole segments
recomputed and not their layers one by one (`recompute_layers=False`); PTE with what the backward pass starts from offloaded,
where layers are recomputed once."""
PARTS = ("prefill", "decode", "old_policy", "scoring", "backward")


@dataclass(frozen=True)
class FlopsCase:
    """One sequence of one shape."""

    shape: str
    prompt: int = 256
    completion: int = 3072
    window: int = 1024
    rank: int = 32

    @property
    def evict(self) -> int:
        """``m``, a quarter of the window."""
        return self.window // 4


@dataclass(frozen=True)
class Count:
    """Operations of one part."""

    dense: int
    """All of them, as counted."""
    attention: int
    """Of them, attention's scores and weighted sums over all pairs."""
    visible_attention: int
    """The same over the pairs that a causal mask lets through."""

    def __add__(self, other: Count) -> Count:
        return Count(*(mine + theirs for mine, theirs in zip(self._fields(), other._fields(), strict=True)))

    def times(self, factor: int) -> Count:
        """``factor`` of them."""
        return Count(*(factor * mine for mine in self._fields()))

    def __sub__(self, other: Count) -> Count:
        return self + other.times(-1)

    def _fields(self) -> tuple[int, int, int]:
        return self.dense, self.attention, self.visible_attention

    @property
    def visible(self) -> int:
        """All of them with attention over visible pairs."""
        return self.dense - self.attention + self.visible_attention


NOTHING = Count(0, 0, 0)


KEY = ("part", "shape", "prompt", "completion", "window", "rank", "peer", "device")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    add_shared(parser, "shapes", "peers", peers=METHODS)


def measure(session: Session) -> Iterator[Record]:
    """One row per shape and method."""
    for shape in ("tiny",) if session.quick else session.shapes or GPU_SHAPES:
        case = FlopsCase(shape, 32, 192, 64, 4) if session.quick else FlopsCase(shape)
        for method in session.missing("step", case, METHODS):
            yield {**session.where("step", case, method), **count(case, method)}


def count(case: FlopsCase, method: str) -> Row:
    """Operations of one step for one sequence, by part; the whole is the sum of the parts."""
    layers: int = shape_config(case.shape).num_hidden_layers
    parts = extrapolate(*(count_parts(case, method, number) for number in (1, 2)), layers)
    total = sum(parts.values(), start=NOTHING)
    return {
        "parts": {name: {**asdict(part), "visible": part.visible} for name, part in parts.items()},
        "dense_total": total.dense,
        "visible_total": total.visible,
    }


def extrapolate(one: dict[str, Count], two: dict[str, Count], layers: int) -> dict[str, Count]:
    """The parts of a model of ``layers`` layers, from those of one and of two."""
    return {name: one[name] + (two[name] - one[name]).times(layers - 1) for name in one}


def count_parts(case: FlopsCase, method: str, layers: int, *, fake: bool = True) -> dict[str, Count]:
    """The parts of a step of a model of ``layers`` layers; with ``fake`` nothing is computed, only counted."""
    model = build(case, method, layers, fake)
    if not fake:
        return _count_parts(model, case, method)
    with FakeTensorMode():
        forget_numbers(model)
        return _count_parts(model, case, method)


def build(case: FlopsCase, method: str, layers: int, fake: bool) -> Any:
    """The adapted model, checkpointing on."""
    base = shaped_base(
        case.shape, "meta" if fake else "cpu", torch.bfloat16 if fake else torch.float32, _ATTENTION, layers
    )
    if method == "lora":
        model = with_lora(base, case.rank, LINEARS, meta=fake, autocast=False)
    else:
        fields = {"r": case.rank, "num_global_tokens": case.rank, "cache_window": case.window}
        fields |= {"state_update": "off" if method == "lora_bounded" else "progressive"}
        fields |= {"recompute_layers": method != "pte_whole_segments", "offload": method == "pte_offload"}
        model = with_pte(base, meta=fake, autocast=False, **fields)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _count_parts(model: Any, case: FlopsCase, method: str) -> dict[str, Count]:
    found: dict[str, Count] = {}
    model.eval()
    with torch.no_grad():
        found["prefill"], found["decode"] = _rollout(model, case, method)
        found["old_policy"] = counted(lambda: _score(model, case, method))
    model.train()
    scored: list[torch.Tensor] = []
    found["scoring"] = counted(lambda: scored.append(_score(model, case, method)))
    backward = counted(scored[0].backward)
    # Two matmuls of the backward pass for each of the forward pass; what is recomputed counted itself.
    once = found["scoring"]
    found["backward"] = backward + Count(0, 2 * once.attention, 2 * once.visible_attention)
    return found


def counted(function: Callable[[], Any]) -> Count:
    """Operations of ``function``; of a backward pass, attention is what it recomputes."""
    _pairs.clear()
    # The counter does not know the product that is written onto what it is added to.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        function()
    return Count(counter.get_total_flops(), sum(dense for dense, _ in _pairs), sum(visible for _, visible in _pairs))


_pairs: list[tuple[int, int]] = []


def _addmm_flops(base: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Of ``base += left @ right``, whose shapes these are."""
    (rows, inner), (_, columns) = left, right
    return int(2 * rows * inner * columns)


def _counted_attention(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Eager attention, which is made of matmuls that the counter sees on every device, with a note of its pairs."""
    batch, heads, queries, head_dim = query.shape
    slots = key.shape[2]
    per_pair = 4 * batch * heads * head_dim
    _pairs.append((per_pair * queries * slots, per_pair * (queries * slots - queries * (queries - 1) // 2)))
    return eager_attention_forward(module, query, key, *args, **kwargs)


_ATTENTION = "peft_pte_counted"
AttentionInterface.register(_ATTENTION, _counted_attention)
AttentionMaskInterface.register(_ATTENTION, eager_mask)


def _score(model: Any, case: FlopsCase, method: str) -> torch.Tensor:
    """The sum of the log-probs of the completion: backbone, then the head on the tokens that predict it."""
    ids = torch.zeros(1, case.prompt + case.completion, dtype=torch.long)
    inner = model.get_base_model()
    if method == "lora":
        hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state
    else:
        # Where the prompt ends is found by looking at labels, and fake ones cannot be looked at. As two calls on one
        # cache the segments are the same.
        cache = model.base_model.new_cache()
        pieces = ids.split([case.prompt, case.completion], dim=1)
        hidden = torch.cat(
            [inner.model(input_ids=part, past_key_values=cache).last_hidden_state for part in pieces], dim=1
        )
    logits = inner.lm_head(hidden[0, case.prompt - 1 : -1])
    return logits.float().log_softmax(dim=-1).sum()


def _rollout(model: Any, case: FlopsCase, method: str) -> tuple[Count, Count]:
    """Prefill, and all steps after it; each feeds one token, and the last token is fed to none."""
    inner = model.get_base_model()
    bounded = method != "lora"
    cache = model.base_model.new_cache() if bounded else DynamicCache(config=inner.config)

    def write(tokens: int) -> Count:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return counted(lambda: inner(input_ids=ids, past_key_values=cache, logits_to_keep=1))

    prefill = write(case.prompt)
    first, second = write(1), write(1)
    per_slot = second - first

    def step(thoughts: int) -> Count:
        """A step that writes the token that makes them ``thoughts``."""
        return first + per_slot.times(thoughts - 1)

    steps = case.completion - 1
    held = list(range(1, steps + 1))
    evictions = NOTHING
    if bounded and steps > case.window:
        write(case.window - 2)
        evicting = write(1) - step(case.window - case.evict + 1)
        after = steps - case.window
        held = [*held[: case.window], *(case.window - case.evict + 1 + index % case.evict for index in range(after))]
        evictions = evicting.times(-(-after // case.evict))
    return prefill, first.times(steps) + per_slot.times(sum(thoughts - 1 for thoughts in held)) + evictions
