"""One call of an adapted backbone under the cache policy.

The rows are laid side by side, the plan is made (:mod:`peft_pte.passes.plan`), and the backbone runs once per pass, as its host wrote it; what
happens to the window happens inside its layers (:mod:`peft_pte.passes.block`). Decoding is the call of one token, so a rollout and its
scoring run the same code. A call with gradients and gradient checkpointing is cut into passes, each a checkpoint that keeps keys,
values and states alone; a call without is one pass.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from ..cache.cache import PTECache, check_cache
from ..cache.static_cache import StaticPTECache
from ..method.state import Departing
from ..seam import Seam
from .block import Pass, running
from .boundary import OpenPrompt, PromptEnds, PromptSpec
from .call import Call, check_continuation, positions_of, refuse_packed, refuse_recording, sort_arguments
from .decode import announce, step, step_mask
from .ends import RAGGED, find_ends
from .layout import Layout, lay_out
from .masks import ChunkMasks
from .plan import Counts, Plan, Sizes, make_plan
from .recompute import Offload, recomputed


def run(seam: Seam, adapter: str, arguments: dict[str, Any], prompt: PromptSpec) -> Any:
    """The forward of an adapted backbone; what a caller sees is what the backbone itself returns.

    Raises:
        ValueError: An argument contradicts the cache or the adapter.
        NotImplementedError: The call asks for what cannot be had under a bounded cache.
    """
    config = seam.config(adapter)
    call = sort_arguments(seam, arguments)
    if call.cache is not None:
        check_cache(call.cache, config, adapter)
    ends = None if config.cache_window is None else find_ends(seam, adapter, call, prompt)
    output, cache = _run_passes(seam, adapter, call, ends)
    output.past_key_values = cache if call.use_cache else None
    return output if call.return_dict else output.to_tuple()


@dataclass
class _Run:
    """What all passes of a call share."""

    seam: Seam
    adapter: str
    tokens: dict[str, Tensor]
    """Inputs, rows side by side."""
    positions: Tensor
    mask: Tensor | None
    """``[B, columns]``, False for padding; ``None``: no padding."""
    past: Tensor | None
    """The same of the columns that were written before, all of them prompt; ``None``: no padding."""
    seen: int
    masks: ChunkMasks
    checkpointed: bool
    """Whether gradients are checkpointed."""
    recompute: bool
    """Whether the chunks of layers are checkpoints."""
    again: bool
    """Whether layers may run again after the pass."""
    rest: dict[str, Any]


def _run_passes(seam: Seam, adapter: str, call: Call, ends: PromptEnds | None) -> tuple[Any, PTECache]:
    cache = call.cache if call.cache is not None else seam.new_cache(adapter)
    config = seam.config(adapter)
    layout = _lay_out(seam, adapter, call, cache, ends)
    seen, past = call.seen, cache.prompt_mask
    if cache.window is None and call.mask is not None:
        past = call.mask[:, :seen]
    new_prompt = layout.prompt if ends is not None else 0
    if ends is not None:
        seam.check_positions(seen + layout.prompt)
        if isinstance(cache, StaticPTECache) and config.impl == "triton":
            cache.share_blocks(seam.layer_devices)
        prompt_mask = None if layout.mask is None else layout.mask[:, : layout.prompt]
        cache.begin(layout.prompt, prompt_mask, call.shape[0], call.device)
        _note_prompt_ends(cache, ends, seen, call.shape[1])
    if not seam.rotary:
        seam.check_positions(seen + layout.columns)
    gradients = torch.is_grad_enabled()
    checkpointed = seam.checkpoints_layers() and gradients
    if isinstance(cache, StaticPTECache) and cache.prompt_length == 0:
        raise ValueError(
            "`prompt_length` must be at least 1 on a static cache, got 0. Give the first token as prompt, or leave "
            "`cache_implementation` unset."
        )
    # On slots at fixed addresses thoughts come one at a time, behind the prompt.
    new_thoughts = 0 if isinstance(cache, StaticPTECache) else layout.columns - new_prompt
    plan = make_plan(_counts(cache, new_prompt, new_thoughts), _sizes(seam, adapter, cache, checkpointed))
    if len(plan.chunks) > 1:
        refuse_recording(seam, call)
    # A cache of the caller's is decoded with, and decoding writes in place, one eviction at a time.
    if gradients or (call.cache is None and layout.columns > 1) or any(chunk.evictions > 1 for chunk in plan.chunks):
        cache.make_functional()
    longest = seam.pass_length(adapter) if checkpointed and cache.continuable else None
    passes = list(plan.passes(longest))
    run = _Run(
        seam,
        adapter,
        {name: layout.pack(rows) for name, rows in call.tokens.items()},
        layout.pack(positions_of(call, seen)),
        layout.mask,
        past,
        seen,
        ChunkMasks(seam.text_config, seam.model.dtype, plan.step),
        checkpointed,
        checkpointed and config.recompute_layers,
        gradients and len(passes) == 1,
        call.rest,
    )
    # With the inputs of layers on the CPU nothing is left to save by recomputing whole passes as well.
    by_pass = checkpointed and not (config.recompute_layers and config.offload)
    saving = Offload().hooks if checkpointed and config.offload else nullcontext
    outputs: list[Any] = []
    before = cache.evictions
    cache.interrupted = True
    for number, part in enumerate(passes):
        last = number == len(passes) - 1
        one = partial(_run_pass, run, part)
        with saving():
            # The backward pass begins with the last one, whose activations would be made again at once.
            output, after = (
                recomputed(one, cache, {}) if by_pass and not (last and config.recompute_layers) else one(cache, {})
            )
        if after is not cache:
            cache.adopt(after)
        outputs.append(output)
    if isinstance(cache, StaticPTECache):
        outputs += _step_by_step(run, cache, new_prompt, layout.columns)
    cache.ragged, cache.interrupted = layout.ragged, False
    if call.use_cache and cache.functional and not gradients:
        cache.make_in_place()
    if cache.window is not None and (call.use_cache or (ends is not None and ends.first is not None)):
        seam.observe(cache, layout, evicted=cache.evictions > before)
    return _join(outputs, layout), cache


def _lay_out(seam: Seam, adapter: str, call: Call, cache: PTECache, ends: PromptEnds | None) -> Layout:
    """Rows side by side, prompts ending in one column.

    Raises:
        ValueError: The mask contradicts the cache.
        NotImplementedError: Rows that are decoded together differ in their number of thoughts, or a row holds several sequences.
    """
    columns, generation = call.columns, seam.generation(cache)
    if call.seen and cache.window is not None:
        check_continuation(call, cache, call.seen, later_turn=ends is None, unwatched=generation is not None)
    if ends is None or ends.first is None:
        return Layout(columns.shape[1], columns.shape[1], mask=columns.mask)
    refuse_packed(call.positions, columns.mask)
    layout = lay_out(ends.first, columns.mask, columns.shape[1], _agreement(seam, call))
    if generation is not None:
        if layout.ragged:
            raise NotImplementedError(RAGGED)
        if ends.open is not None and isinstance(seam.config(adapter).prompt_end, list):
            seam.prompt_watch.check_prefill(layout.columns - layout.prompt, cache.window or 0)
    padded = call.seen > 0 and layout.mask is not None and bool((~layout.mask[:, : layout.prompt]).any())
    if padded and len(cache.thought_layers) < len(cache.layers):
        raise NotImplementedError(
            "`attention_mask` pads a later part of a prompt, and the sliding or linear attention of this model would count the padding. "
            "Prefill prompts that end in one column, without padding behind the first part, or all of the prompt at once."
        )
    # A cache in another layout than its caller's columns cannot be continued by the caller's masks.
    call.use_cache = call.use_cache and (layout.source is None or call.cache is not None)
    return layout


def _sizes(seam: Seam, adapter: str, cache: PTECache, checkpointed: bool) -> Sizes:
    """What the chunks of a call are made by."""
    config = seam.config(adapter)
    if config.cache_window is None:
        return Sizes(sys.maxsize, 1, sys.maxsize, 1)
    window, step = config.cache_window, config.tokens_per_eviction
    if isinstance(cache, StaticPTECache):
        return Sizes(window, step, window, 1)
    chunk = config.chunk_length or window
    if checkpointed:
        chunk = min(chunk, seam.pass_length(adapter))
    return Sizes(window, step, chunk, seam.most_evictions(adapter))


def _run_pass(run: _Run, plan: Plan, cache: PTECache, _: dict[str, Any]) -> tuple[Any, PTECache]:
    """The backbone over the columns of one pass."""
    seam, part = run.seam, slice(plan.start, plan.stop)
    positions = run.positions[:, part]
    valid = None if run.mask is None else run.mask[:, part]
    rows = positions.shape[0]
    this = Pass(
        run.adapter,
        {index: seam.encoder(index) for index in seam.encoded_layers(run.adapter)},
        rows,
        plan.chunks,
        [
            None if cache.window is None else run.masks.of(chunk, cache.prompt_mask, rows, positions.device)
            for chunk in plan.chunks
        ],
        _departures(cache, plan, positions, valid),
        positions,
        valid,
        not seam.config(run.adapter).backprop_through_cache,
        run.recompute,
        torch.is_grad_enabled(),
        run.again,
    )
    bounded = len(cache.thought_layers) == len(cache.layers)
    # The layers' caches are those of `cache`; what runs is known to this call alone.
    view = copy.copy(cache)
    view.running = this
    with running(view):
        output = seam.inner(
            **{name: rows[:, part] for name, rows in run.tokens.items()},
            # Where all layers are bounded nothing counts columns, and no token is to cost more than the one before it.
            attention_mask=valid if bounded else _column_mask(run, plan.stop),
            position_ids=positions,
            past_key_values=view,
            # Hosts that checkpoint would say that it cannot be; they hand on the cache they are given all the same.
            use_cache=not run.checkpointed,
            return_dict=True,
            **run.rest,
        )
    if output.get("past_key_values") is not None:
        output["past_key_values"] = None
    cache.layers, cache.state = view.layers, view.state
    return output, cache


def _step_by_step(run: _Run, cache: StaticPTECache, start: int, stop: int) -> list[Any]:
    """Thoughts that came together, on slots at fixed addresses: one at a time."""
    outputs = []
    for column in range(start, stop):
        part = slice(column, column + 1)
        positions = run.positions[:, part]
        announce(run.seam, run.adapter, cache, positions, None if run.mask is None else run.mask[:, part])
        cache.step_prepared = True
        try:
            output = step(
                run.seam,
                **{name: rows[:, part] for name, rows in run.tokens.items()},
                attention_mask=step_mask(run.seam, cache, positions),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **run.rest,
            )
        finally:
            cache.step_prepared = False
        outputs.append(output)
    return outputs


def _counts(cache: PTECache, new_prompt: int, new_thoughts: int) -> Counts:
    """What was written, beside what comes."""
    prompt = cache.prompt_length or 0
    return Counts(prompt - new_prompt, max(cache.get_seq_length() - prompt, 0), new_prompt, new_thoughts)


def _note_prompt_ends(cache: PTECache, ends: PromptEnds, seen: int, columns: int) -> None:
    """Keep where prompts end, of ``columns`` behind ``seen``, and what the rule must know to go on where they do not."""
    first = torch.full_like(ends.unseen, columns, dtype=torch.long) if ends.first is None else ends.first
    before, known = cache.open_prompt, cache.prompt_ends
    if isinstance(before, OpenPrompt) and known is not None:
        cache.prompt_ends = torch.where(before.rows, seen + first, known)
    else:
        cache.prompt_ends = seen + first
    cache.open_prompt = ends.open if ends.open is not None and bool(ends.open.rows.any()) else None


def _departures(cache: PTECache, plan: Plan, positions: Tensor, valid: Tensor | None) -> list[Departing | None]:
    """Note which thoughts a pass writes and which leave; returns those that leave in each of its chunks.

    Where heads choose for themselves each layer notes its own, and nothing is returned.

    Args:
        cache: What the pass starts from.
        plan: The chunks of the pass.
        positions: ``[B, columns]``, absolute positions of its columns.
        valid: ``[B, columns]``, False for padding; ``None``: no padding.
    """
    cache.evictions += plan.evictions
    if cache.window is None or not cache.policy.uniform:
        return [None] * len(plan.chunks)
    table, departing = cache.thought_layers[0][1].table, []
    for chunk in plan.chunks:
        leaving = None
        if chunk.evictions:
            gone, gone_valid, table = table.evict_oldest(chunk.evictions * cache.tokens_per_eviction)
            leaving = Departing(gone, gone_valid)
        departing.append(leaving)
        if chunk.thoughts:
            thoughts = slice(chunk.stop - chunk.thoughts - plan.start, chunk.stop - plan.start)
            table = table.append(positions[:, thoughts], None if valid is None else valid[:, thoughts])
    for _, layer in cache.thought_layers:
        layer.hold(table)
    return departing


def _column_mask(run: _Run, stop: int) -> Tensor | None:
    """``[B, seen + stop]``, False for padding, by the column: what layers that evict nothing count; ``None``: no padding."""
    if run.past is None and run.mask is None:
        return None
    rows, device = run.positions.shape[0], run.positions.device
    real = torch.ones(rows, run.seen + stop, dtype=torch.long, device=device)
    if run.past is not None:
        real[:, : run.past.shape[1]] = run.past
    if run.mask is not None:
        real[:, run.seen :] = run.mask[:, :stop]
    return real


def _agreement(seam: Seam, call: Call) -> Callable[[int, int], tuple[int, int]] | None:
    """What a layout must have beyond its rows' own columns: ``(prompt, thoughts)`` to ``(prompt, thoughts)``.

    Sharded weights are gathered once per pass, by all processes together; one that has fewer would be waited for. A cache
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


def _join(outputs: list[Any], layout: Layout) -> Any:
    """One output of the whole call from those of its passes, in the columns of the caller."""
    joined = outputs[-1]
    if len(outputs) > 1:
        joined["last_hidden_state"] = torch.cat([output.last_hidden_state for output in outputs], dim=1)
    if len(outputs) > 1 and joined.get("hidden_states") is not None:
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        joined["hidden_states"] = tuple(torch.cat(parts, dim=1) for parts in layers)
    joined["last_hidden_state"] = layout.unpack(joined["last_hidden_state"])
    if joined.get("hidden_states") is not None:
        joined["hidden_states"] = tuple(layout.unpack(part) for part in joined["hidden_states"])
    return joined
