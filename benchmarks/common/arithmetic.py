"""Bytes by arithmetic: what the measured figures are held against, and what true shapes would need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from .models import TRUE_SHAPES


def kv_bytes_per_token(config: PreTrainedConfig, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * heads * head_dim * itemsize


def full_cache_bytes(config: PreTrainedConfig, *, batch: int, prompt: int, length: int, itemsize: int) -> int:
    """A cache that keeps everything."""
    return batch * (prompt + length) * kv_bytes_per_token(config, itemsize)


def pte_cache_bytes(
    config: PreTrainedConfig,
    *,
    batch: int,
    prompt: int,
    window: int,
    r: int,
    num_global_tokens: int,
    itemsize: int,
    masked: bool,
) -> int:
    """``P + W`` slots and one that is written next, a float32 state per layer, and where thoughts stand, for all layers; the oldest leave."""
    slots = batch * (prompt + window + 1) * kv_bytes_per_token(config, itemsize)
    states = config.num_hidden_layers * batch * num_global_tokens * r * 4
    # Positions by slot; the order of slots; of each row its thoughts, the end of its prompt, the next slot.
    places = 8 * (batch * (window + 1) + window + 3 * batch)
    return slots + states + places + (batch * prompt if masked else 0)


def true_shape_bytes(window: int, prompt: int, lengths: list[int], rank: int) -> Iterator[dict[str, Any]]:
    """At the true shapes with rotary positions, bfloat16, one sequence: cache bytes, and bytes kept per scored token."""
    for name, shape in TRUE_SHAPES.items():
        config = shape.config_class(**shape.fields)
        if not hasattr(config, "rope_parameters"):
            continue  # Learned positions end where a window of this size does.
        adapter = {"r": rank, "num_global_tokens": rank}
        layers, hidden = config.num_hidden_layers, config.hidden_size
        yield {
            "model": name,
            "prompt": prompt,
            "window": window,
            "pte_cache_bytes": pte_cache_bytes(
                config, batch=1, prompt=prompt, window=window, itemsize=2, masked=False, **adapter
            ),
            "base_cache_bytes": {
                str(length): full_cache_bytes(config, batch=1, prompt=prompt, length=length, itemsize=2)
                for length in lengths
            },
            "pte_kept_per_token": kv_bytes_per_token(config, 2),
            "lora_kept_per_token": layers * hidden * 2,
            "hidden_per_token": hidden * 2,
        }
