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

from .boundary import Columns, PromptEnds, PromptSpec, find_prompt_ends, prompt_columns, shown_length
from .cache import PTECache, check_cache
from .config import SHORTEST_SEGMENT
from .decode import announce, step
from .layout import Layout, lay_out
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

    @property
    def seen(self) -> int:
        """Columns of earlier calls."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def columns(self) -> Columns:
        """What the rule for the end of a prompt reads."""
        mask = None if self.mask is None else self.mask[:, self.seen :]
        return Columns(self.tokens.get("input_ids"), mask, self.shape, self.device, self.seen)


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
    if config.cache_window is None:
        output, cache = _run_unbounded(seam, adapter, call)
    else:
        ends = _find_ends(seam, adapter, call, prompt)
        if call.cache is None and not call.use_cache and (ends is None or ends.first is None):
            output, cache = _run_whole(seam, adapter, call), None
        else:
            output, cache = _run_segments(seam, adapter, call, ends)
    output.past_key_values = cache if call.use_cache else None
    return output if call.return_dict else output.to_tuple()


def _find_ends(seam: Seam, adapter: str, call: Call, prompt: PromptSpec) -> PromptEnds | None:
    """Where the prompts of this call end; ``None``: no rule was asked, since all of it is thoughts, or prompt.

    Raises:
        ValueError: They cannot be told and must be, or ``prompt_length`` contradicts what was written.
        NotImplementedError: Rows are to be decoded together whose prompts end at different steps.
    """
    cache, generation = call.cache, seam.generation(call.cache)
    if generation is not None:
        prompt = generation.take()
    if cache is not None and cache.prompt_length is not None and cache.open_prompt is None:
        if prompt.length is not None and cache.holds_thoughts:
            _check_known_length(cache, prompt.length, call)
        if prompt.length is None or cache.holds_thoughts:
            return None
    config = seam.config(adapter)
    rule = config.prompt_end
    ends = find_prompt_ends(rule, prompt, call.columns, None if cache is None else cache.open_prompt)
    if generation is not None:
        _check_generation(rule, ends)
    elif cache is None:
        training = seam.model.training and torch.is_grad_enabled()
        window = config.cache_window or 0
        seam.prompt_watch.check(rule, prompt, ends.unseen, call.columns, window, training, adapter)
    return ends


def _check_known_length(cache: PTECache, length: Any, call: Call) -> None:
    given = prompt_columns(length, call.shape[0], call.device)
    known = cache.prompt_ends
    if known is not None and bool((given != known.to(given.device)).any()):
        raise ValueError(
            f"`prompt_length` must be {shown_length(known)} for this cache, whose thoughts start there, got "
            f"{shown_length(given)}. Leave it out, or prefill again without the cache."
        )


def _check_generation(rule: Any, ends: PromptEnds) -> None:
    """Refuse a prefill after which the rows would not be in step, or would never come to an eviction."""
    if ends.open is None:
        return
    open_rows = ends.open.rows
    if isinstance(rule, int):
        missing = (rule - ends.open.real).clamp(min=0)
        if bool((missing != missing[0]).any()):
            raise NotImplementedError(_RAGGED)
        return
    if bool(open_rows.any()):
        raise ValueError(
            f"`generate` got a prompt without its marker in rows {open_rows.nonzero().flatten().tolist()}: `prompt_end` {rule} does "
            "not occur there, so all that follows would be prompt and nothing would ever be evicted. Apply the chat template "
            "(add_generation_prompt=True), or say where the prompt ends: generate(..., prompt_length=input_ids.shape[1])."
        )


_RAGGED = (
    "Rows of this batch differ in the number of tokens after the end of their prompts, and rows that are decoded together share one "
    "clock: an eviction comes to all of them at once. Generate rows of one number of thoughts together (one row at a time always "
    "works), or give `prompt_length` so that all of the input is prompt."
)


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
    seen = 0
    if isinstance(cache, PTECache):
        _refuse_ragged(cache)
        seen = cache.get_seq_length()
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


def _run_unbounded(seam: Seam, adapter: str, call: Call) -> tuple[Any, PTECache | None]:
    """Nothing is ever evicted: one pass."""
    if call.cache is None and not call.use_cache:
        return _run_whole(seam, adapter, call), None
    cache = call.cache if call.cache is not None else seam.new_cache(adapter)
    with bind(_Reader(seam, adapter, cache, call.shape)), _layers_uncheckpointed(seam):
        output = seam.inner(
            **call.tokens,
            attention_mask=None if call.mask is None else call.mask.long(),
            position_ids=_positions(call, cache.get_seq_length()),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **call.rest,
        )
    return output, cache


def _run_segments(seam: Seam, adapter: str, call: Call, ends: PromptEnds | None) -> tuple[Any, PTECache]:
    cache = call.cache if call.cache is not None else seam.new_cache(adapter)
    seen, columns = call.seen, call.columns
    if seen:
        _check_continuation(call, cache, seen, later_turn=ends is None, unwatched=seam.generation(cache) is not None)
    layout = Layout(columns.shape[1], columns.shape[1], mask=columns.mask)
    positions = _positions(call, seen)
    boundaries = None if ends is None else ends.first
    if boundaries is not None:
        _refuse_packed(call.positions, columns.mask)
        layout = lay_out(boundaries, columns.mask, columns.shape[1], _agreement(seam, call))
        if seam.generation(cache) is not None:
            if layout.ragged:
                raise NotImplementedError(_RAGGED)
            if ends is not None and ends.open is not None and isinstance(seam.config(adapter).prompt_end, list):
                seam.prompt_watch.check_prefill(layout.columns - layout.prompt, cache.window or 0)
        # A cache in another layout than its caller's columns cannot be continued by the caller's masks.
        call.use_cache = call.use_cache and (layout.source is None or call.cache is not None)
    past, sliding = cache.prompt_mask, any(cache.is_sliding)
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
    if ends is not None:
        seam.check_positions(seen + layout.prompt)
        prompt_mask = None if layout.mask is None else layout.mask[:, : layout.prompt]
        if isinstance(cache, StaticPTECache) and config.impl == "triton":
            cache.share_blocks(seam.layer_devices)
        cache.begin(layout.prompt, prompt_mask, call.shape[0], call.device)
        cache.note_prompt_ends(ends, seen, columns.shape[1])
    while start < layout.columns:
        length, evictions = _next_segment(seam, cache, layout, start, most, config.segment_length)
        valid = None if layout.mask is None else layout.mask[:, start : start + length]
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
            _column_mask(past, layout.mask, call.shape[0], seen, start + length) if sliding else None,
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
    cache.ragged = layout.ragged
    if call.use_cache and cache.functional and not gradients:
        cache.make_in_place()
    seam.observe(cache, layout, evicted=cache.evictions > before)
    return _join(outputs, layout), cache


def _column_mask(past: Tensor | None, new: Tensor | None, batch: int, seen: int, columns: int) -> Tensor | None:
    """``[B, seen + columns]``, False for padding, by the column: what sliding layers count; ``None``: no padding."""
    if past is None and new is None:
        return None
    like = past if past is not None else new
    real = torch.ones(batch, seen + columns, dtype=torch.bool, device=None if like is None else like.device)
    if past is not None:
        real[:, : min(past.shape[1], seen)] = past[:, :seen]
    if new is not None:
        real[:, seen:] = new[:, :columns]
    return real


def _refuse_ragged(cache: PTECache) -> None:
    """Refuse to continue sequences of which some ended before others when they were scored.

    Raises:
        NotImplementedError: What was padding behind their ends stands in the window.
    """
    if cache.ragged:
        raise NotImplementedError(
            "This cache holds scored sequences of different lengths, and padding took slots of the window in the shorter "
            "ones. Continue sequences of one length, one conversation per call, or prefill again without the cache."
        )


def _check_continuation(call: Call, cache: PTECache, seen: int, later_turn: bool, unwatched: bool) -> None:
    """Refuse a mask that contradicts the cache, or padding that would take the window's slots.

    ``later_turn``: the new columns are thoughts; ``unwatched``: `generate` calls, which pads no single column, and no token
    of it waits for the device.

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
    if call.shape[1] == 1 and unwatched:
        return
    padding = torch.zeros(call.shape[0], device=call.device) if cache.padding is None else cache.padding
    if bool(((~call.mask[:, :seen]).sum(dim=1) != padding).any()):
        raise ValueError(
            "`attention_mask` hides tokens that were cached as real, or shows padding: what was written cannot be taken "
            "back. (After an end of sequence `generate` writes padding as real tokens.) Continue the rows that ended "
            "together, or prefill the conversation again without the cache."
        )
    if later_turn and bool((~call.mask[:, seen:]).any()):
        raise NotImplementedError(
            "`attention_mask` pads a later turn (or a row that ended): padding would take slots of the window, which all rows "
            "share, and evict thoughts earlier than without it. Use turns of one length, one conversation per call, or prefill "
            "again without the cache."
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
        cache.evict(seam.encoded_layers(adapter), evictions)
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


def _agreement(seam: Seam, call: Call) -> Callable[[int, int], tuple[int, int]] | None:
    """What a layout must have beyond its rows' own columns: ``(prompt, thoughts)`` to ``(prompt, thoughts)``.

    Sharded weights are gathered once per segment, by all processes together; one that has fewer would be waited for. A cache
    of the caller's goes on in the caller's columns, so it has to have as many.
    """
    if call.cache is None:
        return partial(_widest, call.device) if seam.sharded() else None

    def all_columns(prompt: int, thoughts: int) -> tuple[int, int]:
        if seam.sharded():
            _, longest = _widest(call.device, 0, thoughts)
            _, shortest = _widest(call.device, 0, -thoughts)
            if longest != -shortest:
                raise NotImplementedError(
                    f"Processes that share their weights must prefill one number of thoughts, got {-shortest} to {longest}: each "
                    "eviction gathers the weights. Give `prompt_length` so that all of the input is prompt."
                )
        return max(prompt, call.shape[1] - thoughts), thoughts

    return all_columns


def _widest(device: torch.device, prompt: int, thoughts: int) -> tuple[int, int]:
    """The most columns of prompt and of thoughts that a process has."""
    columns = torch.tensor([prompt, thoughts], device=device)
    distributed.all_reduce(columns, op=distributed.ReduceOp.MAX)
    prompt, thoughts = columns.tolist()
    return prompt, thoughts


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
