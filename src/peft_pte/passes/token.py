"""One thought of each row: decoding. What rows do is counted, what left is encoded, and the backbone runs on slots.

On a cache at fixed addresses everything but the backbone happens between two steps: the window makes room, what left is encoded, the
slot that each row writes and the mask are made. Inside is nothing but the model's own layers, which can be traced as one graph that is the
same for every step. Neither depends on the value of a tensor, so no token waits for a device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from ..cache.cache import PTECache, check_cache
from ..cache.fixed import FixedAddresses
from ..cache.heads import ChoosingLayer
from ..cache.rows import Rows
from ..cache.store import Leaving, Step
from ..host.compat import CACHE, FULL_ATTENTION, cache_in
from ..ops import compress_, resolve_impl
from ..seam import Generation, Seam
from .block import Pass, running
from .call import OUT_OF_STEP, Call, mask_by_column, positions_of
from .masks import ChunkMasks


class Token(NamedTuple):
    """The next thought of each row."""

    step: Step
    departing: Tensor | None
    """``[B', 1, m]``, positions of what leaves, where heads do not choose; ``None``: nothing leaves."""
    mask: Any
    """Over the slots."""
    mask_of_heads: Any
    """The same of a layer whose heads hold different numbers of thoughts; ``None``: there is none."""


def run_token(seam: Seam, adapter: str, call: Call, generation: Generation | None) -> Any:
    """The backbone on one thought of each row.

    Raises:
        ValueError: The model has learned positions, and none for this thought.
        NotImplementedError: A row gets padding, which layers of the model that are not bounded would count.
    """
    cache, rows = call.bounded
    if torch.is_grad_enabled():
        seam.stacks.forget()
    positions = positions_of(seam, call, generation)
    real, writes = None, None
    # `generate` pads no single column.
    if call.mask is not None and (generation is None or not generation.started):
        real, writes = _padding(call.mask)
    if real is not None and (seam.counts_columns or not cache.bounds_all):
        raise NotImplementedError(OUT_OF_STEP)
    bounds_all = cache.bounds_all
    past = None if bounds_all else rows.past
    token = _count(seam, cache, rows, positions[:, 0], real, writes)
    valid = None if call.mask is None else call.mask[:, -1:]
    arguments = {
        **call.tokens,
        "attention_mask": valid if bounds_all else mask_by_column(past, valid, call.seen, positions),
        **({} if seam.counts_columns else {"position_ids": positions}),
        "use_cache": True,
        "return_dict": True,
        **call.rest,
    }
    cache.interrupted = True
    if cache.fixed is not None:
        _make_ready(seam, adapter, cache, rows, cache.fixed, token)
        cache.fixed.ready = True
        cache.count(rows, 1)
        try:
            mask = _masks(seam, cache, token, arguments["attention_mask"], positions)
            output = step(seam, **{**arguments, "attention_mask": mask, CACHE: cache})
        finally:
            cache.fixed.ready = False
    else:
        this = Pass(
            adapter=adapter,
            encoders=seam.encoders(adapter),
            rows=call.shape[0],
            columns=1,
            step=token.step,
            mask=token.mask,
            mask_of_heads=token.mask_of_heads,
            departing=token.departing,
            prompt=rows.prompt,
            detach=token.step.leaving is not None and not seam.config(adapter).backprop_through_cache,
            functional=torch.is_grad_enabled(),
            again=torch.is_grad_enabled(),
            stacks=None if torch.is_grad_enabled() else seam.stacks,
            groups=seam.groups,
        )
        output = running(seam.inner, cache, this, arguments)
        cache.count(rows, 1)
    cache.interrupted = False
    if generation is not None and generation.started:
        generation.note_ends(rows, call.ids)
    if token.step.leaving is not None:
        seam.observe(cache, None, evicted=True)
    return output


def _padding(mask: Tensor) -> tuple[Tensor | None, list[bool] | None]:
    """Rows that get a token, ``[B]`` and on the host; ``None``: all do."""
    real = mask[:, -1]
    writes: list[bool] = real.tolist()
    return (None, None) if all(writes) else (real, writes)


def _count(
    seam: Seam, cache: PTECache, rows: Rows, positions: Tensor, real: Tensor | None, writes: list[bool] | None
) -> Token:
    """Count one more thought of each row."""
    if real is None and rows.paused is not None:
        real, writes = rows.paused
    if not seam.found.rotary:
        seam.check_positions(cache.get_seq_length() + 1 if seam.counts_columns else rows.longest + 1)
    now = rows.next_step(positions, real, writes)
    departing = None
    if cache.policy.uniform:
        departing = None if now.leaving is None else rows.positions_of(now.leaving)
        rows.note_positions(now)
    slots = now.slots if cache.fixed is None else cache.thought_layers[0][1].at_rest.length
    visible = None
    if cache.fixed is not None or not rows.all_visible:
        visible = rows.visible_slots(slots)
    if visible is not None and cache.fixed is not None:
        # One shape for all steps and generations.
        visible = visible.expand(positions.shape[0], -1).contiguous()
    masks = ChunkMasks(seam.text_config, seam.model.dtype, rows.window, rows.step, seam.found.wants_masks)
    of_heads = functools.partial(masks.of_heads_at_step, rows.prompt_mask) if cache.spare else None
    return Token(now, departing, masks.of_step(visible, slots, positions.shape[0], positions.device), of_heads)


def prepare(seam: Seam, cache: PTECache, positions: Tensor | None, attention_mask: Tensor | None, like: Tensor) -> Any:
    """What ``generate`` is to pass as ``attention_mask``, before every forward pass on tokens ``like [B, T, ...]``.

    For a thought the cache is made ready and the mask is over its slots; the prompt, and what begins a later turn, goes as it is.

    Raises:
        ValueError: The cache is of another adapter, or none is active.
    """
    generation, rows, fixed = seam.generation(cache), cache.rows, cache.fixed
    if like.shape[1] != 1 or rows is None or fixed is None or cache.open_prompt is not None:
        return attention_mask
    if generation is not None and not generation.started:
        return attention_mask
    adapter = seam.require_adapter()
    check_cache(cache, seam.config(adapter), adapter)
    if seam.counts_columns:
        positions = torch.full((like.shape[0], 1), rows.columns, device=rows.device)
    elif positions is None:
        positions = rows.lengths[:, None]
    elif generation is not None and generation.shift is not None:
        positions = (positions - generation.shift[:, None].to(positions.device)).clamp(min=0)
    # Where layers are spread over devices, the rows are where the model wants its inputs.
    positions = positions.to(rows.device).expand(like.shape[0], 1)
    if seam.keeps_positions:
        fixed.write_positions(positions)
    token = _count(seam, cache, rows, positions[:, 0], None, None)
    _make_ready(seam, adapter, cache, rows, fixed, token)
    mask = _masks(seam, cache, token, attention_mask, positions)
    fixed.ready = True
    if generation is not None:
        generation.note_ends(rows, generation.ids)
    cache.count(rows, 1)
    if token.step.leaving is not None:
        seam.observe(cache, None, evicted=True)
    return mask


def _masks(seam: Seam, cache: PTECache, token: Token, attention_mask: Tensor | None, positions: Tensor) -> Any:
    """The mask over slots; beside layers that are not bounded by the kind of layer, theirs as the host makes it."""
    if cache.bounds_all:
        return token.mask
    masks = create_masks_for_generate(
        seam.text_config,
        torch.empty(*positions.shape, 0, dtype=seam.model.dtype, device=positions.device),
        None if attention_mask is None else attention_mask.to(positions.device),
        cache,
        positions,
    )
    return {**masks, FULL_ATTENTION: token.mask}


def step(seam: Seam, *args: Any, **kwargs: Any) -> Any:
    """The backbone's forward after :func:`prepare`; traced as it stands."""
    if seam.keeps_positions and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = cache_in(kwargs).fixed.positions
    return seam.inner(*args, **kwargs)


def _make_ready(seam: Seam, adapter: str, cache: PTECache, rows: Rows, fixed: FixedAddresses, token: Token) -> None:
    """Encode what leaves, and write what the step reads to where it reads it."""
    encoders = seam.encoders(adapter)
    if fixed.stale:
        for index, encoder in encoders.items():
            value = cache.state.layers[index].value
            if value is None:
                value = encoder.initial_state(adapter).expand(len(rows.bound), -1, -1)
            dtype = seam.adapter_dtype(index, adapter)
            fixed.write_state(cache.state, index, value, dtype)
            # Inside of a graph nothing could be timed.
            resolve_impl(encoder.settings[adapter].impl, value.device, "delta_token", dtype, len(rows.bound))
        fixed.stale = False
    for index in encoders:
        fixed.write_downs(index, seam.stacks.of(seam.groups[index], adapter))
    if token.step.leaving is not None:
        _evict(seam, adapter, cache, fixed, token.step.leaving, token.departing)
    for _, layer in cache.thought_layers:
        write, seen = fixed.counters(layer.at_rest.keys.device, len(rows.bound))
        layer.ready(token.step, write)
        layer.seen_tensor = seen
        if isinstance(layer, ChoosingLayer) and layer.watched:
            layer.write_at(*fixed.written(token.step, write.device))
    for device, (write, seen) in fixed.all_counters():
        write.copy_(token.step.place.to(device))
        seen.fill_(rows.columns)


def _evict(
    seam: Seam, adapter: str, cache: PTECache, fixed: FixedAddresses, leaving: Leaving, positions: Tensor | None
) -> None:
    """Let what is ``leaving`` go, which was at ``positions [B', 1, m]`` where heads do not choose, and encode it."""
    layers, encoders = dict(cache.thought_layers), seam.encoders(adapter)
    by_device: dict[torch.device, list[int]] = {}
    for index in layers:
        by_device.setdefault(layers[index].at_rest.keys.device, []).append(index)
    for here in by_device.values():
        indices = tuple(index for index in here if index in encoders)
        if positions is not None and _compress(seam, adapter, cache, fixed, leaving, positions, indices):
            continue
        for index in here:
            evicted = layers[index].lose(leaving, positions)
            state = cache.state.layers[index].value
            if index in encoders and state is not None:
                after = encoders[index].forward_rows(adapter, state, evicted, leaving.rows)
                fixed.write_state(cache.state, index, after, state.dtype)


def _compress(
    seam: Seam,
    adapter: str,
    cache: PTECache,
    fixed: FixedAddresses,
    leaving: Leaving,
    positions: Tensor,
    indices: tuple[int, ...],
) -> bool:
    """Encode what leaves all of the layers in one launch, where the kernel was asked for and can; whether it was."""
    if not indices or cache.shared is None:
        return False
    encoders = [seam.encoder(index) for index in indices]
    settings = encoders[0].settings[adapter]
    layers = dict(cache.thought_layers)
    block = cache.shared.block_of([layers[index].at_rest for index in indices])
    rotations = {encoder.applied_rotations(adapter) for encoder in encoders}
    rotation, of_values = next(iter(rotations))
    if (
        block is None
        or resolve_impl(settings.impl, block.keys.device, "compress", block.keys.dtype, positions.shape[0]) != "triton"
        or settings.state_update != "progressive"
        or any(encoder.settings[adapter] != settings for encoder in encoders)
        or len(rotations) > 1
        # What latent attention caches, the kernel does not read.
        or of_values is not None
        or any(encoder.key_width != encoder.value_width for encoder in encoders)
        or (rotation is not None and rotation.start > 0)
    ):
        return False
    state = fixed.stacked(cache.state, indices)
    there = state.device
    cos, sin = (None, None)
    if rotation is not None:
        cos, sin = rotation.inverse_cos_sin(positions[:, 0].to(there), state.dtype)
    query, key_projection, value_projection = (
        torch.stack(parts) for parts in zip(*(encoder.projections(adapter) for encoder in encoders), strict=True)
    )
    compress_(
        state,
        block.keys,
        block.values,
        (leaving.slots + layers[indices[0]].prompt_slots).to(there),
        query,
        key_projection,
        value_projection,
        cos,
        sin,
        None if leaving.over is None else ~leaving.over[:, None].expand_as(leaving.slots).to(there),
        rows=None if leaving.rows is None else leaving.rows.to(there),
        gain=settings.gain,
        attention=settings.attention,
        rotary_style="half" if rotation is None else rotation.style,
        impl="triton",
    )
    for place, index in enumerate(indices):
        fixed.states[index].copy_(state[place])
    return True
