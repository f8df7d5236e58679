"""Where the prompts of a call end: the rule of :mod:`peft_pte.passes.boundary`, asked of a call, a cache and a generation."""

from __future__ import annotations

from typing import Any

import torch

from ..cache.cache import PTECache
from ..seam import Generation, Seam
from .boundary import OpenPrompt, PromptEnds, PromptSpec, find_prompt_ends, prompt_columns, shown_length
from .call import Call


def find_ends(
    seam: Seam, adapter: str, call: Call, prompt: PromptSpec, generation: Generation | None
) -> PromptEnds | None:
    """Where the prompts of this call end; ``None``: no rule was asked, since all of it is thoughts, or prompt.

    Raises:
        ValueError: They cannot be told and must be, or ``prompt_length`` contradicts what was written.
    """
    cache = call.cache
    if generation is not None:
        prompt = generation.take()
    if cache is not None and cache.rows is not None and cache.open_prompt is None:
        if prompt.length is not None and cache.holds_thoughts:
            _check_known_length(cache, prompt.length, call)
        if prompt.length is None or cache.holds_thoughts:
            return None
    config = seam.config(adapter)
    rule = config.prompt_end
    before = None if cache is None else cache.open_prompt
    ends = find_prompt_ends(rule, prompt, call.columns, before if isinstance(before, OpenPrompt) else None)
    if generation is not None:
        check_prompts(rule, ends)
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


def check_prompts(rule: Any, ends: PromptEnds) -> None:
    """Refuse a prefill after which a row would never come to an eviction.

    Raises:
        ValueError: The marker of ``rule`` does not occur in a row.
    """
    if ends.open is None:
        return
    open_rows = ends.open.rows
    if isinstance(rule, int):
        return
    if bool(open_rows.any()):
        raise ValueError(
            f"`generate` got a prompt without its marker in rows {open_rows.nonzero().flatten().tolist()}: `prompt_end` {rule} does "
            "not occur there, so all that follows would be prompt and nothing would ever be evicted. Apply the chat template "
            "(add_generation_prompt=True), or say where the prompt ends: generate(..., prompt_length=input_ids.shape[1])."
        )
