"""How many rows there are: as many as fit, of the constant bytes that each holds."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from ..seam import Seam

# Logits of a row, and what processors and the choice make of them, in float32.
_COPIES_OF_LOGITS = 6
# Of what is free, as transformers takes it where its caller does not say.
_SHARE = 0.9


def rows_that_fit(
    seam: Seam, adapter: str, prompt: int, written: int, asked: int | None, share: float | None, static: bool
) -> int:
    """Rows of a batch.

    Args:
        seam: The adapted model.
        adapter: The adapter in use.
        prompt: Tokens of the longest prompt.
        written: Tokens of the longest request, and of what it may write.
        asked: The number that was asked for; ``None``: as many as fit.
        share: Of the memory that is free; ``None``: 0.9.
        static: Whether the cache stands at fixed addresses, with copies of its states.

    Raises:
        ValueError: Fewer than one was asked for.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(
                f"`max_requests_per_batch` must be at least 1, got {asked}. Leave it out to fill the memory."
            )
        return asked
    free = free_memory(seam.model.device) * (_SHARE if share is None else share)
    return max(1, int(free // row_bytes(seam, adapter, prompt, written, static)))


def row_bytes(seam: Seam, adapter: str, prompt: int, written: int, static: bool) -> int:
    """Bytes that a row holds, its logits and its tokens included, whatever it writes."""
    config = seam.config(adapter)
    element = torch.finfo(seam.model.dtype).bits // 8
    slots = prompt + (config.cache_window or 0) + (64 if static else 1)
    held = 0
    policy, text_config = seam.policy(adapter), seam.text_config
    heads = text_config.num_attention_heads
    width: int = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    for site in seam.sites.values():
        if site.evicts:
            held += slots * (site.key_width + site.value_width) * element
            if not policy.uniform:
                # Positions by head, and queries of the last thoughts.
                held += slots * site.key_width // width * 8 + policy.observed * heads * width * element
    states = sum(encoder.settings[adapter].rank for encoder in seam.encoders(adapter).values()) * config.num_queries
    vocabulary: Any = seam.text_config.vocab_size
    return held + states * 4 * (2 if static else 1) + vocabulary * 4 * _COPIES_OF_LOGITS + written * 20


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on ``device``."""
    accelerator: Any = getattr(torch, device.type)
    if hasattr(accelerator, "mem_get_info"):
        free, _ = accelerator.mem_get_info(device)
        return int(free + accelerator.memory_reserved(device) - accelerator.memory_allocated(device))
    return int(psutil.virtual_memory().available)
