"""The backbone's forward under the cache policy: one call, run segment by segment.

A segment ends where an eviction is due: ``[prompt] [first W thoughts] [m thoughts] [m thoughts] ...``. Decoding is the
case of one token per call, so a rollout and its replay run the same code on the same slots, positions and states.

With gradients, a prompt or a first window longer than ``m`` comes in pieces. With gradient checkpointing the
segment is the unit that is recomputed, evictions and encoding included; memory is then one segment's activations and the
keys and values of the scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from .cache import PTECache, check_cache
from .config import SHORTEST_SEGMENT
from .decode import announce, step
from .layout import Layout, PromptSpec, lay_out
from .recompute import Offload, layers_recomputed, recomputed
from .state import LayerState, Reading, bind
from .static_cache import StaticPTECache

if TYPE_CHECKING:
    from .seam import Seam

# Inputs with one entry per token, which are cut where a segment ends.
_PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids")
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclass
class Call:
    """One call of the backbone, its arguments sorted by what happens to them."""

    tokens: dict[str, Tensor]
    """Inputs ``[B, N]`` or ``[B, N, hidden]``."""
    mask: Tensor | None
    """``[B, seen + N]``, False for padding."""
    positions: Tensor | None
    """``[B, N]``, absolute."""
    cache: PTECache | None
    use_cache: bool
    return_dict: bool
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, N)``."""
        rows = next(iter(self.tokens.values()))
        return rows.shape[0], rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return next(iter(self.tokens.values())).device


def run(seam: Seam, adapter: str, arguments: dict[str, Any], prompt: PromptSpec) -> Any:
    """The forward of an adapted backbone; what a caller sees is what the backbone itself returns.

    Raises:
        ValueError: An argument contradicts the cache or the adapter.
        NotImplementedError: The call asks for what cannot be had under a bounded cache.
    """
    config = seam.config(adapter)
    call = _sort_arguments(seam, arguments)
    if call.cache is not None:
        check_cache(call.cache, config, adapter)
    batch, columns = call.shape
    fresh = call.cache is None or call.cache.get_seq_length() == 0
    boundaries = prompt.boundaries(batch, columns, call.mask, call.device) if fresh else None
    limit = columns if call.cache is None or call.cache.prompt_limit is None else call.cache.prompt_limit
    if fresh and boundaries is None and limit < columns:
        boundaries = torch.full((batch,), limit, device=call.device)
    if fresh and call.cache is None and (config.cache_window is None or boundaries is None) and not call.use_cache:
        output = _run_whole(seam, adapter, call)
    else:
        cache = call.cache if call.cache is not None else seam.new_cache(adapter)
        if config.cache_window is None:
            output = _run_unbounded(seam, adapter, call, cache)
        else:
            output = _run_segments(seam, adapter, call, cache, boundaries)
        output.past_key_values = cache if call.use_cache else None
    return output if call.return_dict else output.to_tuple()


def _sort_arguments(seam: Seam, arguments: dict[str, Any]) -> Call:
    rest = dict(arguments)
    rest.pop("cache_position", None)
    if any(rest.get(name) is not None for name in _PACKING):
        raise NotImplementedError(
            "Packed sequences cannot be scored under a bounded cache: each row needs its own window and state. Use one "
            "sequence per row (packing=False, padding_free=False)."
        )
    tokens = {name: rest.pop(name) for name in _PER_TOKEN if rest.get(name) is not None}
    if ("input_ids" in tokens) == ("inputs_embeds" in tokens):
        raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
    batch, columns = next(iter(tokens.values())).shape[:2]
    cache = rest.pop("past_key_values", None)
    mask = rest.pop("attention_mask", None)
    seen = cache.get_seq_length() if isinstance(cache, PTECache) else 0
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise NotImplementedError(
                "`attention_mask` must be a 2D padding mask under a bounded cache, which makes its own causal masks; got "
                f"{type(mask).__name__}{tuple(getattr(mask, 'shape', ()))}."
            )
        if mask.shape != (batch, seen + columns):
            raise ValueError(
                f"`attention_mask` must cover the {seen} tokens seen and the {columns} new ones, so have shape "
                f"{(batch, seen + columns)}; got {tuple(mask.shape)}."
            )
        mask = mask.bool()
    positions = rest.pop("position_ids", None)
    if positions is not None and positions.ndim != 2:
        raise NotImplementedError(f"`position_ids` must be 2D, got shape {tuple(positions.shape)}.")
    use_cache = rest.pop("use_cache", None)
    if use_cache is None:
        use_cache = bool(getattr(seam.text_config, "use_cache", False))
    if seam.checkpoints_layers() and torch.is_grad_enabled():
        use_cache = False
    return_dict = rest.pop("return_dict", None)
    return Call(
        tokens=tokens,
        mask=mask,
        positions=None if positions is None else positions.expand(batch, -1),
        cache=cache,
        use_cache=use_cache or cache is not None,
        return_dict=True if return_dict is None else return_dict,
        rest={name: value for name, value in rest.items() if value is not None},
    )


def _run_whole(seam: Seam, adapter: str, call: Call) -> Any:
    """Without a cache: every token is prompt (or the cache is unbounded), so every adapter reads ``S0``."""

    def fresh() -> _Reader:
        return _Reader(seam, adapter, seam.new_cache(adapter), call.shape)

    positions = _positions(call, 0)
    with bind(fresh()), _checkpoints_bound(seam, fresh):
        return seam.inner(
            **call.tokens,
            attention_mask=None if call.mask is None else call.mask.long(),
            position_ids=positions,
            use_cache=False,
            return_dict=True,
            **call.rest,
        )


def _run_unbounded(seam: Seam, adapter: str, call: Call, cache: PTECache) -> Any:
    with bind(_Reader(seam, adapter, cache, call.shape)), _layers_uncheckpointed(seam):
        return seam.inner(
            **call.tokens,
            attention_mask=None if call.mask is None else call.mask.long(),
            position_ids=_positions(call, cache.get_seq_length()),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **call.rest,
        )


def _run_segments(seam: Seam, adapter: str, call: Call, cache: PTECache, boundaries: Tensor | None) -> Any:
    seen = cache.get_seq_length()
    if seen:
        _check_continuation(call, cache, seen)
    layout = Layout(call.shape[1], call.shape[1], mask=call.mask)
    positions = _positions(call, seen)
    if boundaries is not None:
        _refuse_packed(call.positions, call.mask)
        layout = lay_out(boundaries, call.mask, call.shape[1], _agreement(call.device) if seam.sharded() else None)
        # A cache in another layout than its caller's columns cannot be continued by the caller's masks.
        call.use_cache = call.use_cache and (layout.source is None or call.cache is not None)
    tokens = {name: layout.pack(rows) for name, rows in call.tokens.items()}
    positions = layout.pack(positions)
    config = seam.config(adapter)
    gradients = torch.is_grad_enabled()
    # A cache of the caller's is decoded with, and decoding writes in place.
    if gradients or (call.cache is None and layout.columns > 1):
        cache.make_functional()
    recompute = seam.checkpoints_layers() and gradients
    # With the inputs of layers on the CPU nothing is left to save by recomputing whole segments as well.
    by_segment = recompute and not (config.recompute_layers and config.offload)
    saving = Offload().hooks if recompute and config.offload else nullcontext
    most = seam.most_evictions(adapter) if cache.functional else 1
    outputs: list[Any] = []
    start, before = 0, cache.evictions
    while start < layout.columns:
        if cache.prompt_length is None:
            seam.check_positions(layout.prompt)
            prompt_mask = None if layout.mask is None else layout.mask[:, : layout.prompt]
            if isinstance(cache, StaticPTECache) and config.impl == "triton":
                cache.share_blocks(seam.layer_devices)
            cache.begin(layout.prompt, prompt_mask, call.shape[0], call.device)
        length, evictions = _next_segment(seam, cache, layout, start, most, config.segment_length)
        valid = None if layout.mask is None else layout.mask[:, seen + start : seen + start + length]
        if evictions and not config.backprop_through_cache:
            cache.detach_keys_and_values()
        part = slice(start, start + length)
        segment = partial(
            _run_segment,
            seam,
            adapter,
            {name: rows[:, part] for name, rows in tokens.items()},
            positions[:, part],
            valid,
            None if layout.mask is None else layout.mask[:, : seen + start + length],
            evictions,
            recompute and config.recompute_layers,
            call.rest,
        )
        with saving():
            output, after = recomputed(segment, cache) if by_segment else segment(cache)
        if after is not cache:
            cache.adopt(after)
        outputs.append(output)
        start += length
    if call.use_cache and cache.functional and not gradients:
        cache.make_in_place()
    seam.observe(cache, layout, evicted=cache.evictions > before)
    return _join(outputs, layout)


def _check_continuation(call: Call, cache: PTECache, seen: int) -> None:
    """Refuse a mask that contradicts the cache, or padding that would take the window's slots.

    Raises:
        ValueError: The mask is missing, or hides what was cached as real (or the other way round).
        NotImplementedError: Some of several new columns are padding.
    """
    if call.mask is None:
        if cache.padding is not None and call.positions is None:
            raise ValueError(
                f"`attention_mask` must go on covering the {seen} tokens seen, some of which are padding; got None. Append "
                "ones for the new tokens, as `generate` does."
            )
        return
    new_columns = call.shape[1]
    if new_columns == 1:
        return
    padding = torch.zeros(call.shape[0], device=call.device) if cache.padding is None else cache.padding
    if bool(((~call.mask[:, :seen]).sum(dim=1) != padding).any()):
        raise ValueError(
            "`attention_mask` hides tokens that were cached as real, or shows padding: what was written cannot be taken "
            "back. (After an end of sequence `generate` writes padding as real tokens.) Continue the rows that ended "
            "together, or prefill the conversation again without the cache."
        )
    if bool((~call.mask[:, seen:]).any()):
        raise NotImplementedError(
            "`attention_mask` pads a later turn: padding would take slots of the window, which all rows share, and evict "
            "thoughts earlier than without it. Use turns of one length, one conversation per call, or prefill again "
            "without the cache."
        )


def _next_segment(
    seam: Seam, cache: PTECache, layout: Layout, start: int, most: int, wanted: int | None
) -> tuple[int, int]:
    """Tokens of the next segment, and the evictions it spans.

    Args:
        seam: The adapted model.
        cache: What the segment starts from.
        layout: Where all tokens are.
        start: First column of the segment.
        most: Evictions that a segment may span.
        wanted: Tokens that a segment with gradients is to have, ``PTEConfig.segment_length``.
    """
    step = cache.tokens_per_eviction
    remaining = layout.columns - start
    piece = (wanted or max(most * step, SHORTEST_SEGMENT)) if torch.is_grad_enabled() else remaining
    if cache.missing_prompt:
        return min(cache.missing_prompt, piece), 0
    if isinstance(cache, StaticPTECache):
        return 1, 0  # `announce` evicts.
    evictions = 0 if cache.room else max(min(most, remaining // step), 1)
    length = min(evictions * step or cache.room, piece, remaining)
    if not seam.rotary:
        seam.check_positions(cache.get_seq_length() + length)
    return length, evictions


def _run_segment(
    seam: Seam,
    adapter: str,
    tokens: dict[str, Tensor],
    positions: Tensor,
    valid: Tensor | None,
    column_mask: Tensor | None,
    evictions: int,
    recompute_layers: bool,
    rest: dict[str, Any],
    cache: PTECache,
) -> tuple[Any, PTECache]:
    writes_prompt = cache.missing_prompt > 0
    if isinstance(cache, StaticPTECache) and not writes_prompt:
        announce(seam, adapter, cache, positions, valid)
        mask = seam.attention_mask(cache, positions, valid, column_mask, 0)
        output = step(
            seam,
            cache,
            **tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **rest,
        )
        return output, cache
    if evictions:
        cache.evict(seam.encoded_layers, evictions)
    mask = seam.attention_mask(cache, positions, valid, column_mask, evictions)
    if not writes_prompt:
        cache.record(positions, valid)
    shape = (positions.shape[0], positions.shape[1])

    @contextmanager
    def binding(target: PTECache) -> Iterator[None]:
        with bind(_Reader(seam, adapter, target, shape, max(evictions, 1))), _layers_uncheckpointed(seam):
            yield

    with binding(cache), layers_recomputed(seam.blocks, cache, binding) if recompute_layers else nullcontext():
        output = seam.inner(
            **tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **rest,
        )
    cache.settle()
    return output, cache


class _Reader:
    """Gives each layer's adapters their states, encoding what the layer lost when they first ask."""

    def __init__(self, seam: Seam, adapter: str, cache: PTECache, shape: tuple[int, int], states: int = 1) -> None:
        self.seam, self.adapter, self.cache, self.states = seam, adapter, cache, states
        self.batch, self.tokens = shape
        self._readings: dict[int, Reading] = {}

    def __call__(self, layer_index: int) -> Reading:
        reading = self._readings.get(layer_index)
        if reading is None:
            reading = self._readings[layer_index] = Reading(self._read(layer_index), self.batch, self.tokens)
        return reading

    def _read(self, layer_index: int) -> Tensor:
        layer = self.cache.state.layers[layer_index]
        if layer.value is not None and not layer.pending:
            return layer.value
        encoder = self.seam.encoder(layer_index)
        value = layer.value
        if value is None:
            value = encoder.initial_state(self.adapter).expand(self.batch, -1, -1)
        values = [value]
        for evicted in layer.pending:
            values.append(encoder(self.adapter, values[-1], evicted))
        self.cache.state.layers[layer_index] = LayerState(values[-1])
        return values[-1] if self.states == 1 else torch.stack(values[-self.states :], dim=1).flatten(0, 1)


@contextmanager
def _layers_uncheckpointed(seam: Seam) -> Iterator[None]:
    """Within a segment no layer checkpoints itself: transformers would drop the cache to do so."""
    switched = [module for module in seam.checkpointable if module.gradient_checkpointing]
    if not (switched and seam.backbone.training):
        yield
        return
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


@contextmanager
def _checkpoints_bound(seam: Seam, reader: Callable[[], _Reader]) -> Iterator[None]:
    """Layers that checkpoint themselves find their state again when the backward pass recomputes them.

    Each run of a layer gets a reader of its own, so that the second run encodes what the first one did.
    """
    if not seam.checkpoints_layers():
        yield
        return

    def rebinding(original: Callable[..., Any]) -> Callable[..., Any]:
        def run_checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def with_state(*inputs: Any, **named: Any) -> Any:
                with bind(reader()):
                    return function(*inputs, **named)

            return original(with_state, *args, **kwargs)

        return run_checkpointed

    originals = [(module, module._gradient_checkpointing_func) for module in seam.checkpointable]
    for module, original in originals:
        module._gradient_checkpointing_func = rebinding(original)
    try:
        yield
    finally:
        for module, original in originals:
            module._gradient_checkpointing_func = original


def _positions(call: Call, seen: int) -> Tensor:
    """The k-th real token of a row has position k, whatever was evicted and however it is padded."""
    if call.positions is not None:
        return call.positions
    batch, columns = call.shape
    if call.mask is not None:
        return (call.mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -columns:]
    return torch.arange(seen, seen + columns, device=call.device).expand(batch, -1)


def _agreement(device: torch.device) -> Callable[[int, int], tuple[int, int]]:
    """Lets every process run as many segments as the one with the most.

    Sharded weights are gathered once per segment, by all processes together; one that has fewer would be waited for.
    """

    def widest(prompt: int, thoughts: int) -> tuple[int, int]:
        columns = torch.tensor([prompt, thoughts], device=device)
        distributed.all_reduce(columns, op=distributed.ReduceOp.MAX)
        prompt, thoughts = columns.tolist()
        return prompt, thoughts

    return widest


def _refuse_packed(positions: Tensor | None, mask: Tensor | None) -> None:
    if positions is None:
        return
    falls = positions[:, 1:] < positions[:, :-1]
    if mask is not None:
        falls = falls & mask[:, 1:] & mask[:, :-1]
    if bool(falls.any()):
        raise NotImplementedError(
            "`position_ids` start again within a row, so the row holds several sequences. Packed sequences cannot be "
            "scored under a bounded cache: use one sequence per row (packing=False, padding_free=False)."
        )


def _join(outputs: list[Any], layout: Layout) -> Any:
    """One output of the whole call from those of its segments."""
    joined = outputs[-1]
    if len(outputs) > 1 and joined.get("attentions") is not None:
        raise NotImplementedError(
            "`output_attentions` cannot be joined over segments, whose caches hold different tokens. Score without it, "
            "or decode token by token."
        )
    joined["last_hidden_state"] = layout.unpack(torch.cat([output.last_hidden_state for output in outputs], dim=1))
    if joined.get("hidden_states") is not None:
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        joined["hidden_states"] = tuple(layout.unpack(torch.cat(parts, dim=1)) for parts in layers)
    if len(outputs) > 1 and joined.get("router_logits") is not None:
        raise NotImplementedError(
            "`output_router_logits` cannot be joined over segments. Train without the auxiliary loss "
            "(router_aux_loss_coef=0)."
        )
    return joined
