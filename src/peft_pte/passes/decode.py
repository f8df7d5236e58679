"""One step of decoding on a :class:`StaticPTECache`: what happens between two forward passes, and what inside.

Between: the window makes room, what left is encoded, the next slot is announced, the mask is made. Inside, nothing but the
model's own layers, which write to the announced slot and read the published states. The inside can be traced as one graph
that is the same for every step; the between depends on Python's count of thoughts and never on a value of a tensor, so it
waits for no device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ..cache.cache import check_cache
from ..cache.static_cache import Leaving, StaticPTECache
from ..ops import compress_
from ..seam import Seam
from .layout import Layout


def announce(seam: Seam, adapter: str, cache: StaticPTECache, positions: Tensor, valid: Tensor | None) -> None:
    """Make the cache ready for one more thought: ``positions [B, 1]``, ``valid [B, 1]`` or ``None``.

    Raises:
        ValueError: The model has learned positions, and none for this thought.
    """
    if not seam.rotary:
        seam.check_positions(cache.get_seq_length() + 1)
    if cache.written == 0:
        for index in seam.encoded_layers(adapter):
            encoder = seam.encoder(index)
            value = cache.state.layers[index].value
            if value is None:
                value = encoder.initial_state(adapter).expand(positions.shape[0], -1, -1)
            cache.publish(index, value, seam.adapter_dtype(index, adapter))
    elif cache.room == 0:
        _evict(seam, adapter, cache)
    cache.record(positions, valid)


def _evict(seam: Seam, adapter: str, cache: StaticPTECache) -> None:
    by_device: dict[torch.device, list[int]] = {}
    for index in seam.encoded_layers(adapter):
        by_device.setdefault(cache.device_of(index), []).append(index)
    leaving = cache.leaving()
    for indices in by_device.values():
        if not _compress(seam, adapter, cache, leaving, tuple(indices)):
            for index in indices:
                value = cache.value_of(index)
                after = seam.encoder(index)(adapter, value, cache.evicted(index, leaving))[:, -1]
                cache.publish(index, after, value.dtype)
    cache.release(leaving)


def _compress(seam: Seam, adapter: str, cache: StaticPTECache, leaving: Leaving, indices: tuple[int, ...]) -> bool:
    """Encode what leaves all of the layers in one launch, where the kernel was asked for and can; whether it was."""
    encoders = [seam.encoder(index) for index in indices]
    settings = encoders[0].settings[adapter]
    block = cache.block_of(indices)
    rotations = {encoder.applied_rotation(adapter) for encoder in encoders}
    rotation = next(iter(rotations))
    if (
        settings.impl != "triton"
        or block is None
        or settings.state_update != "progressive"
        or any(encoder.settings[adapter] != settings for encoder in encoders)
        or len(rotations) > 1
        or (rotation is not None and rotation.style is None)
    ):
        return False
    state = cache.stack_states(indices)
    there = state.device
    cos, sin = (None, None)
    if rotation is not None:
        cos, sin = rotation.inverse_cos_sin(leaving.positions[:, 0].to(there), state.dtype)
    query, key_projection, value_projection = (
        torch.stack(parts) for parts in zip(*(encoder.projections(adapter) for encoder in encoders), strict=True)
    )
    compress_(
        state,
        block.keys,
        block.values,
        leaving.slots.to(there),
        query,
        key_projection,
        value_projection,
        cos,
        sin,
        None if leaving.valid is None else leaving.valid[:, 0].to(there),
        gain=settings.gain,
        attention=settings.attention,
        rotary_style=(rotation.style if rotation is not None else None) or "half",
        impl=settings.impl,
    )
    for place, index in enumerate(indices):
        cache.read_states[index].copy_(state[place])
    return True


def prepare(
    seam: Seam, cache: StaticPTECache, positions: Tensor | None, attention_mask: Tensor | None, like: Tensor
) -> Any:
    """What ``generate`` is to pass as ``attention_mask``, before every forward pass on tokens ``like [B, T, ...]``.

    For a thought the cache is made ready and the mask is over its slots; the prompt goes as it is.

    Raises:
        ValueError: The cache is of another adapter, or none is active.
    """
    batch, length = like.shape[:2]
    generation = seam.generation(cache)
    prompted = generation is not None and generation.spec.length is not None
    if (
        length != 1
        or cache.prompt_length is None
        or cache.open_prompt is not None
        or (prompted and not cache.holds_thoughts)
    ):
        return attention_mask
    adapter = seam.require_adapter()
    check_cache(cache, seam.config(adapter), adapter)
    valid = None if attention_mask is None else attention_mask[:, -1:].bool()
    if positions is None:
        seen = torch.full((batch, 1), cache.get_seq_length(), device=like.device)
        positions = seen if cache.padding is None else seen - cache.padding[:, None]
    positions = positions.expand(batch, 1)
    evictions = cache.evictions
    announce(seam, adapter, cache, positions, valid)
    cache.step_prepared = True
    seam.observe(cache, Layout(1, 1), evicted=cache.evictions > evictions)
    return step_mask(seam, cache, positions)


def step_mask(seam: Seam, cache: StaticPTECache, positions: Tensor) -> Any:
    """The mask over all slots, in the form the attention takes, for thoughts at ``positions [B, 1]``."""
    return create_causal_mask(
        config=seam.text_config,
        inputs_embeds=torch.empty(*positions.shape, 0, dtype=seam.model.dtype, device=positions.device),
        attention_mask=cache.slot_valid,
        past_key_values=cache,
        position_ids=positions,
    )


def step(seam: Seam, *args: Any, **kwargs: Any) -> Any:
    """The backbone's forward after :func:`announce`; traced as it stands."""
    return seam.inner(*args, **kwargs)
