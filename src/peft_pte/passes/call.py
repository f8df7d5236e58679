"""One call of the backbone: its arguments sorted, and what they may not say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache.cache import PTECache
from ..seam import Seam
from .boundary import Columns

# Inputs with one entry per token.
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


def sort_arguments(seam: Seam, arguments: dict[str, Any]) -> Call:
    """Sort what the backbone was called with.

    Raises:
        ValueError: Tokens are given twice or not at all, or the mask does not cover them.
        NotImplementedError: Packed rows, a mask that is no padding mask, a cache that cannot be continued.
    """
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
        refuse_ragged(cache)
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


def positions_of(call: Call, seen: int) -> Tensor:
    """The k-th real token of a row has position k, whatever was evicted and however it is padded."""
    if call.positions is not None:
        return call.positions
    batch, columns = call.shape
    if call.mask is not None:
        return (call.mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -columns:]
    return torch.arange(seen, seen + columns, device=call.device).expand(batch, -1)


def refuse_ragged(cache: PTECache) -> None:
    """Refuse to continue sequences of which some ended before others when they were scored.

    Raises:
        NotImplementedError: What was padding behind their ends stands in the window.
    """
    if cache.interrupted:
        raise RuntimeError(
            "A call that wrote to this cache was interrupted, so its layers hold different tokens. Prefill again: with "
            "`cache.reset()`, or a new cache."
        )
    if cache.ragged:
        raise NotImplementedError(
            "This cache holds scored sequences of different lengths, and padding took slots of the window in the shorter "
            "ones. Continue sequences of one length, one conversation per call, or prefill again without the cache."
        )


def check_continuation(call: Call, cache: PTECache, seen: int, later_turn: bool, unwatched: bool) -> None:
    """Refuse a mask that contradicts the cache, or padding that would take the window's slots.

    ``later_turn``: the new columns are thoughts; ``unwatched``: `generate` calls, which pads no single column, and no token
    of it waits for the device.

    Raises:
        ValueError: The mask is missing, or hides what was cached as real (or the other way round).
        NotImplementedError: Some of several new columns are padding.
    """
    if call.mask is None:
        if cache.padding is not None and call.positions is None and bool(cache.padding.any()):
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
