"""One call of an adapted backbone under the cache policy.

The rows are laid side by side, the plan is made (:mod:`peft_pte.passes.plan`), and the backbone runs once per pass, as its host wrote it; what
happens to the window happens inside its layers (:mod:`peft_pte.passes.block`). Decoding is the call of one token per row, on slots in place of
columns. A call with gradients and gradient checkpointing is cut into passes, each a checkpoint that keeps keys, values and states alone; a
call without is one pass.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

from ..cache.cache import PTECache, check_cache
from ..cache.rows import Rows
from ..cache.store import Choice, Departing
from ..eviction.records import Evictions
from ..host.compat import CACHE
from ..seam import Generation, OuterCall, Seam
from .block import Pass, Work, running
from .boundary import OpenPrompt, PromptEnds, PromptSpec
from .call import (
    OUT_OF_STEP,
    Call,
    check_continuation,
    check_last_column,
    hide_what_ended,
    mask_by_column,
    positions_of,
    refuse_packed,
    refuse_recording,
    seen_together,
    sort_arguments,
)
from .ends import find_ends
from .layout import Layout, lay_out
from .masks import ChunkMasks
from .plan import Counts, Plan, Sizes, make_plan
from .recompute import Offload, recomputed
from .recorded import at_eviction, check_evictions, refuse_continued
from .statistics import Scored
from .token import run_token
from .turn import Turn


def run(seam: Seam, adapter: str, arguments: dict[str, Any], prompt: PromptSpec, outer: OuterCall | None = None) -> Any:
    """The forward of an adapted backbone, called by a model around it if there is an ``outer`` call; what a caller sees is what the backbone itself returns.

    Raises:
        ValueError: An argument contradicts the cache or the adapter.
        NotImplementedError: The call asks for what cannot be had under a bounded cache.
    """
    config = seam.config(adapter)
    call = sort_arguments(seam, arguments, outer)
    generation = seam.generation(call.cache)
    if call.cache is not None:
        check_cache(call.cache, config, adapter)
        call.cache.move_rows(call.device)
        if outer is not None:
            call.cache.mask_columns = None
        if generation is None or not generation.started:
            check_continuation(call, generation)
    begins = generation is not None and not generation.started
    if begins:
        check_last_column(call)
    ends = None if config.cache_window is None else find_ends(seam, adapter, call, prompt, generation)
    cache = call.cache
    if prompt.evictions is not None and cache is not None:
        refuse_continued()
    if call.shape[1] == 1 and cache is not None and cache.rows is not None and ends is None:
        output = run_token(seam, adapter, call, generation)
    else:
        if cache is not None and cache.rows is not None and not begins:
            hide_what_ended(call, cache.rows)
        evictions = (
            prompt.evictions if prompt.evictions is not None else seam.recall(adapter, call.ids, call.mask, call.cache)
        )
        output, cache = _run_passes(seam, adapter, call, ends, generation, evictions)
        # A row may end while the prompts of others go on.
        if generation is not None and generation.started and cache.rows is not None and call.shape[1] == 1:
            generation.note_ends(cache.rows, call.ids)
    if generation is not None:
        generation.started = True
    setattr(output, CACHE, cache if call.use_cache else None)
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
    """The same of the columns that were written before; ``None``: no padding."""
    seen: int
    rows: Rows | None
    """Their clocks; ``None``: nothing is bounded."""
    turn: Turn | None
    """What rows do; ``None``: nothing is bounded."""
    masks: ChunkMasks
    checkpointed: bool
    """Whether gradients are checkpointed."""
    recompute: bool
    """Whether the chunks of layers are checkpoints."""
    again: bool
    """Whether layers may run again after the pass."""
    keep: int | None
    """Columns of the call if what is written is to be kept."""
    rest: dict[str, Any]
    host_masks: dict[str, Any] | None
    """By kind of attention, where tokens see later ones."""
    evictions: Evictions | None
    """What is to leave; ``None``: what the policy gives up."""
    complete: bool
    """Whether that is known of all rows."""


def _run_passes(
    seam: Seam,
    adapter: str,
    call: Call,
    ends: PromptEnds | None,
    generation: Generation | None,
    evictions: Evictions | None,
) -> tuple[Any, PTECache]:
    """Several tokens of each row."""
    seam.stacks.forget()
    cache = call.cache if call.cache is not None else seam.new_cache(adapter)
    config, seen = seam.config(adapter), call.seen
    rows = None if cache.window is None else cache.rows_for(call.shape[0], call.device)
    sharded = call.cache is None and seam.sharded()
    layout = _lay_out(seam, adapter, call, cache, ends, generation, sharded)
    past = call.mask[:, :seen] if rows is None and call.mask is not None else None if rows is None else rows.past
    positions = layout.pack(positions_of(seam, call, generation))
    turn, counts = None, Counts(0, 0, 0, layout.columns, 0)
    if rows is not None:
        if ends is not None:
            seam.check_positions(seen + layout.prompt)
        if cache.shared is not None and config.impl != "reference":
            cache.shared.devices = tuple(seam.layer_devices)
        window = cache.unroll()
        columns = layout.columns - layout.prompt
        turn = Turn(rows.clocks, layout.thoughts, layout.offsets, columns, call.device, sharded)
        counts = turn.counts(rows.prompt, layout.prompt, window)
        if ends is not None:
            rows.begin(layout.prompt, None if layout.mask is None else layout.mask[:, : layout.prompt])
            _note_prompt_ends(cache, ends, seen, call.shape[1])
    if not seam.rotary:
        seam.check_positions(seen + layout.columns)
    gradients = torch.is_grad_enabled()
    checkpointed = seam.checkpoints_layers() and gradients
    together = None if turn is None else seen_together(call, layout)
    sizes = _sizes(seam, adapter, turn, checkpointed)
    plan = make_plan(counts, replace(sizes, whole_prompt=together is not None, spare=cache.spare))
    complete = False
    if evictions is not None:
        complete = check_evictions(evictions, cache, turn, positions[:, layout.prompt :])
    if len(plan.chunks) > 1:
        refuse_recording(seam, call)
    # What the model around has made for layers that are not bounded is over all columns.
    host_masks = None if together is None else call.masks
    longest = seam.pass_length(adapter) if checkpointed and cache.continuable and host_masks is None else None
    passes = list(plan.passes(longest))
    run = _Run(
        seam,
        adapter,
        {name: layout.pack(rows) for name, rows in call.tokens.items()},
        positions,
        layout.mask,
        past,
        seen,
        # As they are now: a pass may run again after they have moved on.
        None if rows is None else rows.fork(),
        turn,
        ChunkMasks(seam.text_config, seam.model.dtype, cache.window or 0, plan.step, seam.found.wants_masks, together),
        checkpointed,
        checkpointed and config.recompute_layers,
        gradients and len(passes) == 1,
        plan.stop if call.use_cache else None,
        call.rest,
        host_masks,
        None if evictions is None else evictions.to(call.device),
        complete,
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
            cache.become(after)
        outputs.append(output)
    if rows is not None and cache.slot_positions is not None:
        rows.positions = functional.pad(cache.slot_positions, (0, 1))
    cache.column_positions = cache.slot_positions = None
    if rows is not None:
        rows.write(layout.thoughts)
        cache.count(rows, call.shape[1])
    if cache.fixed is not None:
        cache.fixed.stale = True
    cache.interrupted = False
    if cache.window is not None and (call.use_cache or layout.columns > layout.prompt):
        seam.observe(cache, layout, evicted=cache.evictions > before)
        if seam.statistics.keep_text and call.cache is None and call.ids is not None and ends is not None:
            seam.statistics.text = Scored(call.ids, call.mask, ends.first)
    return _join(outputs, layout), cache


def _lay_out(
    seam: Seam,
    adapter: str,
    call: Call,
    cache: PTECache,
    ends: PromptEnds | None,
    generation: Generation | None,
    sharded: bool,
) -> Layout:
    """Rows side by side, prompts ending in one column.

    Raises:
        NotImplementedError: A row holds several sequences, or rows that are out of step have layers that count columns.
    """
    columns, rows = call.columns, cache.rows
    batch, width = columns.shape
    refuse_packed(call.positions, columns.mask)
    if rows is None or (ends is not None and ends.first is None):
        return Layout(width, width, (0,) * batch, (0,) * batch, mask=columns.mask)
    if ends is None and columns.mask is None and len(set(rows.bound)) == 1:
        return Layout(0, width, (width,) * batch, (0,) * batch)
    first = (
        torch.zeros(batch, dtype=torch.long, device=call.device) if ends is None or ends.first is None else ends.first
    )
    agree = partial(_widest, call.device) if sharded else None
    by_column = seam.counts_columns or not cache.bounds_all
    if call.cache is not None and by_column:
        agree = partial(_as_wide, width)
    layout = lay_out(first, columns.mask, width, rows.clocks, agree)
    marked = ends is not None and ends.open is not None and isinstance(seam.config(adapter).prompt_end, list)
    if generation is not None and marked:
        seam.prompt_watch.check_prefill(layout.columns - layout.prompt, cache.window or 0)
    if seam.counts_columns and (layout.source is not None or layout.ragged):
        raise NotImplementedError(OUT_OF_STEP)
    if by_column:
        padded = call.seen > 0 and layout.mask is not None and bool((~layout.mask[:, : layout.prompt]).any())
        if call.cache is not None and (padded or layout.ragged):
            raise NotImplementedError(OUT_OF_STEP)
        # A cache in another layout than its caller's columns cannot be continued by the caller's masks.
        call.use_cache = call.use_cache and (layout.source is None or call.cache is not None) and not layout.ragged
    return layout


def _as_wide(width: int, prompt: int, thoughts: int) -> tuple[int, int]:
    """As many columns as the caller gave: what counts columns goes on in the caller's."""
    return max(prompt, width - thoughts), thoughts


def _sizes(seam: Seam, adapter: str, turn: Turn | None, checkpointed: bool) -> Sizes:
    """What the chunks of a call are made by."""
    config = seam.config(adapter)
    if config.cache_window is None or turn is None:
        return Sizes(sys.maxsize, 1, sys.maxsize, 1)
    window, step = config.cache_window, config.tokens_per_eviction
    chunk = config.chunk_length or window
    if checkpointed:
        chunk = min(chunk, seam.pass_length(adapter))
    # Rows that start late do so in the first block.
    return Sizes(window, step, chunk if turn.in_step else max(chunk, step), seam.most_evictions(adapter))


def _run_pass(run: _Run, plan: Plan, cache: PTECache, _: dict[str, Any]) -> tuple[Any, PTECache]:
    """The backbone over the columns of one pass."""
    seam, part = run.seam, slice(plan.start, plan.stop)
    positions = run.positions[:, part]
    valid = None if run.mask is None else run.mask[:, part]
    this = Pass(
        adapter=run.adapter,
        encoders=seam.encoders(run.adapter),
        rows=positions.shape[0],
        columns=positions.shape[1],
        prompt=0 if run.rows is None else run.rows.prompt,
        detach=not seam.config(run.adapter).backprop_through_cache,
        functional=torch.is_grad_enabled(),
        again=run.again,
        work=() if run.turn is None or run.rows is None else _work(run, run.turn, run.rows, plan, cache, positions),
        recompute=run.recompute,
        keep=plan.stop == run.keep,
        bounds=run.turn is not None,
        mask=_mask_of_all(run, run.turn, run.rows, plan)
        if seam.borrows and run.turn is not None and run.rows is not None
        else None,
    )
    arguments = {
        **{name: rows[:, part] for name, rows in run.tokens.items()},
        # Where all layers are bounded nothing counts columns, and no token is to cost more than the one before it.
        "attention_mask": run.host_masks
        if run.host_masks is not None
        else valid
        if cache.bounds_all
        else mask_by_column(
            run.past, None if run.mask is None else run.mask[:, : plan.stop], run.seen, run.positions[:, : plan.stop]
        ),
        **({} if seam.counts_columns else {"position_ids": positions}),
        # Hosts that checkpoint would say that it cannot be; they hand on the cache they are given all the same.
        "use_cache": not run.checkpointed,
        "return_dict": True,
        **run.rest,
    }
    output = running(seam.inner, cache, this, arguments)
    cache.note_seen(run.seen + plan.stop)
    return output, cache


def _work(run: _Run, turn: Turn, rows: Rows, plan: Plan, cache: PTECache, positions: Tensor) -> tuple[Work, ...]:
    """What layers are to do with the chunks of a pass, whose columns are at ``positions [B, columns]``."""
    work: list[Work] = []
    batch, device = positions.shape[0], positions.device
    held = cache.column_positions
    if held is None:
        held = positions[:, :0]
    for chunk in plan.chunks:
        if turn.in_step:
            mask = run.masks.in_step(chunk, rows.prompt_mask, batch, device)
        else:
            mask = run.masks.by_row(chunk, rows.prompt_mask, turn.written(chunk), turn.late(chunk))
        departing, surplus = None, False
        if turn.evicts(chunk):
            surplus = chunk.evictions == 1 and not turn.loses_any(chunk)
            due = turn.due(chunk)
            valid = None if due is None else due.repeat_interleave(turn.clocks.step, dim=1)[:, None]
            choice = None
            if not cache.policy.uniform:
                numbers = turn.numbers(chunk)
                recorded = None if run.evictions is None else at_eviction(run.evictions, numbers, run.complete)
                choice = Choice(rows.prompt_mask, numbers, turn.first(chunk), turn.loses(chunk), recorded)
            departing = Departing(held[:, None, : chunk.evictions * turn.clocks.step], valid, choice)
        stop = chunk.stop - plan.start
        thoughts = positions[:, stop - chunk.thoughts : stop]
        held = torch.cat([held[:, chunk.drop :], thoughts], dim=1)
        realigned, ending = turn.realigned(chunk), None
        if realigned is not None:
            held = held.gather(1, realigned)
        if run.keep is not None:
            ending = turn.ending(chunk)
        if ending is not None:
            slots = rows.positions[:, :-1] if cache.slot_positions is None else cache.slot_positions
            these = held if ending.rows is None else held.index_select(0, ending.rows)
            taken = these.gather(1, ending.columns)
            cache.slot_positions = taken if ending.rows is None else slots.index_copy(0, ending.rows, taken)
        held = held[:, held.shape[1] - chunk.kept :]
        of_heads = None
        if cache.spare:
            of_heads = partial(run.masks.of_heads, chunk, rows.prompt_mask, turn.written(chunk), turn.late(chunk))
        work.append(Work(chunk, mask, departing, thoughts, realigned, ending, of_heads, surplus))
    cache.column_positions = held
    return tuple(work)


def _mask_of_all(run: _Run, turn: Turn, rows: Rows, plan: Plan) -> Any:
    """Over all columns of a pass and those before it, for layers that read the keys and values of a bounded one."""
    first, chunks = plan.chunks[0], plan.chunks
    whole = first._replace(
        prompt=sum(chunk.prompt for chunk in chunks), thoughts=sum(chunk.thoughts for chunk in chunks), drop=0
    )
    return run.masks.by_row(whole, rows.prompt_mask, turn.written(first), turn.late(first))


def _note_prompt_ends(cache: PTECache, ends: PromptEnds, seen: int, columns: int) -> None:
    """Keep where prompts end, of ``columns`` behind ``seen``, and what the rule must know to go on where they do not."""
    first = torch.full_like(ends.unseen, columns, dtype=torch.long) if ends.first is None else ends.first
    before, known = cache.open_prompt, cache.prompt_ends
    if isinstance(before, OpenPrompt) and known is not None:
        cache.prompt_ends = torch.where(before.rows, seen + first, known)
    else:
        cache.prompt_ends = seen + first
    cache.open_prompt = ends.open if ends.open is not None and bool(ends.open.rows.any()) else None


def _widest(device: torch.device, prompt: int, thoughts: int) -> tuple[int, int]:
    """The most columns of prompt and of thoughts that a process has.

    Sharded weights are gathered once per pass, by all processes together; one that has fewer would be waited for.
    """
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
