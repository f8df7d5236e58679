"""One call of the backbone: its arguments sorted, and what they may not say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..cache.cache import PTECache
from ..cache.rows import Rows
from ..host.compat import CACHE, COLUMNS, FORMER_CACHE, FULL_ATTENTION, UNUSED
from ..seam import Generation, OuterCall, Seam
from .boundary import Columns
from .layout import Layout

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
    ids: Tensor | None = None
    """``[B, N]``, where a model around the backbone has embedded them too; ``None``: not known."""
    masks: dict[str, Any] | None = None
    """By kind of attention, as such a model has made them."""

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
    def bounded(self) -> tuple[PTECache, Rows]:
        """The cache, and the clocks of its rows.

        Raises:
            RuntimeError: There is no cache, or nothing was written to it.
        """
        if self.cache is None or self.cache.rows is None:
            raise RuntimeError("A thought needs a cache that holds a prompt.")
        return self.cache, self.cache.rows

    @property
    def columns(self) -> Columns:
        """What the rule for the end of a prompt reads."""
        mask = None if self.mask is None else self.mask[:, self.seen :]
        return Columns(self.ids, mask, self.shape, self.device, self.seen)


def sort_arguments(seam: Seam, arguments: dict[str, Any], outer: OuterCall | None) -> Call:
    """Sort what the backbone was called with, by a model around it if there is an ``outer`` call.

    Raises:
        ValueError: Tokens are given twice or not at all, or the mask does not cover them.
        NotImplementedError: Packed rows, a mask that is no padding mask, a cache that cannot be continued.
    """
    rest = dict(arguments)
    rest.pop("cache_position", None)
    tokens: dict[str, Tensor] = {}
    for name in UNUSED:
        rest.pop(name, None)
    for name in _PACKING:
        if rest.get(name) is None:
            continue
        raise NotImplementedError(
            "Packed sequences cannot be scored under a bounded cache: each row needs its own window and state. Use one "
            "sequence per row (packing=False, padding_free=False)."
        )
    for name in COLUMNS:
        if rest.get(name) is not None:
            tokens[name] = rest.pop(name)
    if ("input_ids" in tokens) == ("inputs_embeds" in tokens):
        raise ValueError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
    batch, columns = next(iter(tokens.values())).shape[:2]
    former = rest.pop(FORMER_CACHE, None)
    cache = rest.pop(CACHE, former)
    mask, masks = rest.pop("attention_mask", None), None
    if outer is not None and isinstance(mask, dict):
        mask, masks = outer.mask, mask
    seen = 0
    if isinstance(cache, PTECache):
        if cache.interrupted:
            refuse_interrupted()
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
    if outer is not None and outer.positions is None and positions is not None and positions.shape[0] == 1:
        # Counted by the model around, which knows of no padding.
        counted = torch.arange(seen, seen + columns, device=positions.device)
        positions = None if torch.equal(positions[0], counted) else positions
    if positions is not None and positions.ndim != 2:
        raise NotImplementedError(f"`position_ids` must be 2D, got shape {tuple(positions.shape)}.")
    use_cache = rest.pop("use_cache", None)
    if use_cache is None:
        # What a training step wrote nobody goes on with, and to keep it would cost what the window saves.
        training = seam.backbone.training and torch.is_grad_enabled()
        use_cache = bool(getattr(seam.text_config, "use_cache", False)) and not training
    if torch.is_grad_enabled() and seam.checkpoints_layers():
        use_cache = False
    return_dict = rest.pop("return_dict", None)
    for name in [*rest]:
        if rest[name] is None:
            del rest[name]
    return Call(
        tokens=tokens,
        mask=mask,
        positions=None if positions is None else positions.expand(batch, -1),
        cache=cache,
        use_cache=use_cache or cache is not None,
        return_dict=True if return_dict is None else return_dict,
        rest=rest,
        ids=tokens.get("input_ids") if outer is None else outer.ids,
        masks=masks,
    )


def seen_together(call: Call, layout: Layout) -> Tensor | None:
    """``[B, P, P]``, where a token of the prompt sees a later one too: those of an image do; ``None``: nowhere.

    A model around the backbone says so by the mask that it has made for full attention.

    Raises:
        NotImplementedError: Tokens that see later ones are no part of the first prompt, or rows would have to be moved.
    """
    mask = None if call.masks is None else call.masks.get(FULL_ATTENTION)
    if not isinstance(mask, Tensor) or mask.ndim != 4 or call.shape[1] == 1:
        return None
    sees = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0, :, -call.shape[1] :]
    later = sees.triu(1)
    if not bool(later.any()):
        return None
    if call.seen or layout.source is not None or bool(later[:, :, layout.prompt :].any()):
        raise NotImplementedError(
            "Tokens that see later ones (those of an image) must be part of the first prompt, and prompts must end in one column: pad them "
            "on the left, or take one row at a time."
        )
    return later[:, : layout.prompt, : layout.prompt].expand(call.shape[0], -1, -1)


def positions_of(seam: Seam, call: Call, generation: Generation | None) -> Tensor:
    """``[B, N]``: the k-th real token of a row has position k, whatever was evicted and however it is padded.

    A model that takes no positions numbers columns.
    """
    if seam.counts_columns:
        return torch.arange(call.seen, call.seen + call.shape[1], device=call.device).expand(call.shape[0], -1)
    if call.positions is not None:
        shift = None if generation is None else generation.shift
        return call.positions if shift is None else (call.positions - shift[:, None]).clamp(min=0)
    batch, columns = call.shape
    rows = None if call.cache is None else call.cache.rows
    new = None if call.mask is None else call.mask[:, call.seen :].long()
    if rows is None and new is not None and call.mask is not None:
        return (call.mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -columns:]
    if rows is None:
        return torch.arange(call.seen, call.seen + columns, device=call.device).expand(batch, -1)
    rank = torch.arange(columns, device=call.device) if new is None else (new.cumsum(dim=-1) - 1).clamp(min=0)
    return rows.lengths[:, None] + rank


def mask_by_column(past: Tensor | None, new: Tensor | None, seen: int, like: Tensor) -> Tensor | None:
    """``[B, seen + T]``, False for padding, by the column: what layers that evict nothing count; ``None``: no padding.

    Args:
        past: ``[B, .]``, of the first columns; those behind them up to ``seen`` hold tokens.
        new: ``[B, T]``, of the new ones.
        seen: Columns before.
        like: ``[B, T, ...]``.
    """
    if past is None and new is None:
        return None
    real = torch.ones(like.shape[0], seen + like.shape[1], dtype=torch.long, device=like.device)
    if past is not None:
        real[:, : past.shape[1]] = past
    if new is not None:
        real[:, seen:] = new
    return real


def refuse_interrupted() -> NoReturn:
    """Refuse to go on from what a call left half done.

    Raises:
        RuntimeError: A call that wrote to the cache was interrupted.
    """
    raise RuntimeError(
        "A call that wrote to this cache was interrupted, so its layers hold different tokens. Prefill again: with "
        "`cache.reset()`, or a new cache."
    )


def check_continuation(call: Call, generation: Generation | None) -> None:
    """Let each row go on from its own end, and refuse a mask that contradicts what was written. `generate` is looked at once.

    Columns behind a row's own end-of-sequence token are padding, whether the mask shows them or not. A row that ended otherwise can be told
    by a mask that hides its last columns: they are taken back, where they have not evicted anything.

    Raises:
        ValueError: The mask is missing, or hides what cannot be taken back, or shows padding.
        NotImplementedError: A row ended, and layers of the model that are not bounded have read on.
    """
    cache = call.cache
    rows = None if cache is None else cache.rows
    if cache is None or rows is None or (generation is not None and generation.started):
        return
    cache.synchronize()
    empty, unused = rows.empty, rows.unused
    if unused is not None and not cache.bounds_all and bool(unused.any()):
        raise NotImplementedError(_ENDED_IN_A_HYBRID)
    if call.mask is None:
        if call.positions is None and rows.padded and bool((empty if unused is None else empty - unused).any()):
            raise ValueError(
                f"`attention_mask` must go on covering the {call.seen} tokens seen, some of which are padding; got None. Append "
                "ones for the new tokens, as `generate` does."
            )
        if generation is not None and unused is not None:
            generation.shift = empty
        _hide_last_padding(call, rows, generation, torch.zeros_like(empty))
        return
    past = call.mask[:, : call.seen]
    hidden = (~past).sum(dim=1)
    least = empty if unused is None else empty - unused
    back = (hidden - empty).clamp(min=0)
    trailing = (~past).flip(1).long().cumprod(dim=1).sum(dim=1)
    wrong, some, shown = torch.stack(
        [((hidden < least) | (back > trailing)).any(), (back > 0).any(), (hidden < empty).any()]
    ).tolist()
    if wrong or (some and not cache.bounds_all) or (some and not cache.take_back(back.tolist())):
        raise ValueError(
            "`attention_mask` hides tokens that were cached as real and cannot be taken back, or shows padding. A row that ended "
            "without its end-of-sequence token can go on from there while what came behind has evicted nothing: generate with that "
            "`eos_token_id`, or prefill the conversation again without the cache."
        )
    if generation is not None and shown:
        # `generate` counts positions by its mask, which shows what a row was given behind its end.
        generation.shift = (empty - hidden).clamp(min=0)
    _hide_last_padding(call, rows, generation, hidden)


def _hide_last_padding(call: Call, rows: Rows, generation: Generation | None, hidden: Tensor) -> None:
    """Take what the generation before appended last, and never fed, for what it is in rows that had ended: padding.

    A caller whose mask hides a row's end (``hidden [B]`` columns in all) knows of it, and is believed.
    """
    ended, rows.ended = rows.ended, None
    ids = call.ids
    if ended is None or ids is None or rows.padding_token is None:
        return
    batch, columns = call.shape
    mask = call.mask
    if mask is None:
        mask = torch.ones(batch, call.seen + columns, dtype=torch.bool, device=call.device)
    padding = ended & (ids[:, 0] == rows.padding_token) & mask[:, call.seen]
    if rows.unused is not None:
        padding &= (rows.unused == 0) | (hidden < rows.empty)
    if not bool(padding.any()):
        return
    call.mask = mask.clone()
    call.mask[:, call.seen] &= ~padding
    rows.note_unused(padding.long())
    if generation is not None:
        more = padding.long()
        generation.shift = more if generation.shift is None else generation.shift + more


def check_last_column(call: Call) -> None:
    """Refuse a later turn of `generate` in which a row has nothing to go on from in the last column.

    Raises:
        ValueError: It is padding there: what comes next would be sampled from it.
    """
    if call.mask is None or call.cache is None or not call.seen:
        return
    real: list[bool] = call.mask[:, -1].tolist()
    if not all(real):
        rows = [row for row, there in enumerate(real) if not there]
        raise ValueError(
            f"`generate` goes on from the last column, which is padding in rows {rows} of this turn. Pad turns on the left, and give every row "
            "a token; rows that are done can be left out (cache.batch_select_indices), or replaced (model.replace_rows)."
        )


def hide_what_ended(call: Call, rows: Rows) -> None:
    """Let what `generate` gives to rows that have ended be padding."""
    if rows.running is None:
        return
    batch, columns = call.shape
    if call.mask is None:
        call.mask = torch.ones(batch, call.seen + columns, dtype=torch.bool, device=call.device)
    call.mask = call.mask.clone()
    call.mask[:, call.seen :] &= rows.running[:, None]
    rows.note_unused((~rows.running).long() * columns)


OUT_OF_STEP = (
    "Rows of this batch differ in the number of tokens after the end of their prompts, or a later part of a prompt is padded, and this model "
    "(its sliding or linear attention, or its positions) would count the padding. Take rows of one length together (one row at a time always works), or give "
    "`prompt_length` so that all of the input is prompt."
)
_ENDED_IN_A_HYBRID = (
    "Rows of this cache have ended before others, and the sliding or linear attention of this model has read the padding that came behind "
    "their ends, which cannot be taken back. Prefill these conversations again without the cache."
)


def refuse_packed(positions: Tensor | None, mask: Tensor | None) -> None:
    """Refuse rows that hold several sequences.

    Raises:
        NotImplementedError: Positions start again within a row.
    """
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


def refuse_recording(seam: Seam, call: Call) -> None:
    """Refuse what hosts gather by hooks inside their layers, once per chunk.

    Raises:
        NotImplementedError: It is asked for.
    """
    for name, remedy in (
        ("output_attentions", "Score without it, or decode token by token."),
        ("output_router_logits", "Train without the auxiliary loss (router_aux_loss_coef=0)."),
    ):
        if call.rest.get(name, getattr(seam.text_config, name, False)):
            raise NotImplementedError(
                f"`{name}` cannot be joined over the chunks of a call, which see different slots. {remedy}"
            )
