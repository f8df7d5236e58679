"""Where the prompt of each row ends: one rule, for scoring, for prefill and for every later turn.

The rule looks at tokens and is prefix-stable, so that cutting a sequence into calls never moves the boundary: what the call says
(``prompt_length=``), then a marker in the tokens or a number of tokens (``PTEConfig.prompt_end``), then what the caller shows:
the first labelled column, or the prefill of ``generate``. The last is a guess of one call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..eviction.records import Evictions

PromptRule = list[int] | int | None
"""``PTEConfig.prompt_end``."""


@dataclass(frozen=True)
class PromptSpec:
    """What a call said about where its prompts end, and about what leaves."""

    labels: Tensor | None = None
    """``[B, N]``; the first column that is not -100 starts the thoughts, if it is not the row's first token."""
    shift_labels: Tensor | None = None
    """``[B, N]``, labels already shifted by one column."""
    length: int | Sequence[int] | Tensor | None = None
    """Prompt columns, counted from the first column of the sequence, for all rows or ``[B]``."""
    prefill: int | None = None
    """Columns of the input of ``generate``, where its first call holds more (an assistant's first candidates)."""
    evictions: Evictions | None = None
    """What is to leave; ``None``: what the policy gives up."""


@dataclass(frozen=True)
class OpenPrompt:
    """What must be known of the prompts of a batch that have not come to their end yet."""

    rows: Tensor
    """``[B]``, True where the prompt goes on."""
    real: Tensor
    """``[B]``, tokens so far, padding apart."""
    recent: Tensor
    """``[B, len(marker) - 1]``, the last tokens: a marker may lie across two calls; -1 before the first token."""

    def map(self, function: Callable[[Tensor], Tensor]) -> OpenPrompt:
        """Apply ``function``, which acts on the batch axis or on the device, to every tensor."""
        return OpenPrompt(*map(function, self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held, for counting bytes."""
        return self.rows, self.real, self.recent


class PromptEnds(NamedTuple):
    """Where the prompts of a call end."""

    first: Tensor | None
    """``[B]``, the first thought column of each row, or the number of columns; ``None``: all columns are prompt."""
    unseen: Tensor
    """``[B]``, rows that show no end of their prompt, so that all of it counts as prompt."""
    open: OpenPrompt | None
    """What the next call has to know; ``None``: the rule has nothing to look for in it."""


@dataclass(frozen=True)
class Columns:
    """The columns of one call, as the rule reads them."""

    ids: Tensor | None
    """``[B, N]``; ``None`` where the call gives embeddings."""
    mask: Tensor | None
    """``[B, N]``, False for padding; ``None``: no padding."""
    shape: tuple[int, int]
    device: torch.device
    seen: int = 0
    """Columns of earlier calls."""

    @property
    def real(self) -> Tensor:
        """``[B, N]``, True for tokens."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.shape, dtype=torch.bool, device=self.device)


def find_prompt_ends(rule: PromptRule, spec: PromptSpec, columns: Columns, before: OpenPrompt | None) -> PromptEnds:
    """Apply the rule to the next columns of sequences whose prompts are ``before`` (``None``: the first columns).

    Raises:
        TypeError: ``prompt_length`` is not made of integers.
        ValueError: ``prompt_length`` is outside the input, or inside what was written before.
    """
    batch = columns.shape[0]
    if spec.length is not None:
        first = _given_length(spec.length, columns)
        return PromptEnds(first, _no_rows(columns), None)
    if rule is None or (columns.ids is None and not isinstance(rule, int)):
        return _shown(spec, columns)
    if before is None:
        tail = 0 if isinstance(rule, int) else len(rule) - 1
        before = OpenPrompt(
            torch.ones(batch, dtype=torch.bool, device=columns.device),
            torch.zeros(batch, dtype=torch.long, device=columns.device),
            torch.full((batch, tail), -1, device=columns.device),
        )
    if isinstance(rule, int):
        first, found, after = _count(rule, columns, before)
        unseen = _no_rows(columns)
    else:
        first, found, after = _search(rule, columns, before)
        unseen = ~found & columns.real.any(dim=1)
        if spec.labels is not None:
            unseen = unseen & (spec.labels.to(columns.device) != -100).any(dim=1)
    first = torch.where(before.rows, first, 0)
    return PromptEnds(first, unseen & before.rows, replace(after, rows=before.rows & ~found))


def _no_rows(columns: Columns) -> Tensor:
    return torch.zeros(columns.shape[0], dtype=torch.bool, device=columns.device)


def prompt_columns(length: int | Sequence[int] | Tensor, batch: int, device: torch.device) -> Tensor:
    """``prompt_length`` as ``[B]``; that of a row goes for all the rows that ``generate`` makes of it.

    Raises:
        TypeError: It is not made of integers.
        ValueError: There is not one for each row.
    """
    wrong = TypeError(
        f"`prompt_length` must be an integer or one per row, got {length!r}. Count columns, padding included."
    )
    try:
        given = torch.as_tensor(length, device=device)
    except (TypeError, ValueError) as error:
        raise wrong from error
    if given.ndim > 1 or (given.ndim == 1 and (len(given) == 0 or batch % len(given))):
        raise ValueError(f"`prompt_length` must be one number, or one for each of {batch} rows, got {length!r}.")
    if given.dtype not in (torch.int32, torch.int64):
        raise wrong
    return given.expand(batch) if given.ndim == 0 else given.repeat_interleave(batch // given.shape[0])


def shown_length(given: Tensor) -> int | list[int]:
    """Lengths ``[B]`` as an error shows them."""
    lengths: list[int] = given.unique().tolist()
    return lengths[0] if len(lengths) == 1 else lengths


def _given_length(length: int | Sequence[int] | Tensor, columns: Columns) -> Tensor:
    given = prompt_columns(length, columns.shape[0], columns.device)
    last = columns.seen + columns.shape[1]
    if bool(((given < columns.seen) | (given > last)).any()):
        known = f", of which the first {columns.seen} are in the cache" if columns.seen else ""
        raise ValueError(
            f"`prompt_length` must be between {columns.seen} and {last} columns{known}, got {shown_length(given)}. Count the "
            "columns from the first of the sequence to the last of the prompt, padding included."
        )
    return given - columns.seen


def _count(tokens: int, columns: Columns, before: OpenPrompt) -> tuple[Tensor, Tensor, OpenPrompt]:
    """The first ``tokens`` real tokens of a row are its prompt."""
    real = columns.real
    rank = before.real[:, None] + real.cumsum(dim=1)
    first = _first_column(real & (rank > tokens))
    after = before.real + real.sum(dim=1)
    return first, after >= tokens, replace(before, real=after)


def _search(marker: list[int], columns: Columns, before: OpenPrompt) -> tuple[Tensor, Tensor, OpenPrompt]:
    """The prompt of a row ends with the first occurrence of ``marker`` among its real tokens."""
    ids = columns.ids
    if ids is None:
        raise ValueError("`prompt_end` is a marker of tokens, and this call has none: pass `prompt_length`.")
    real, width = columns.real, columns.shape[1]
    order = (~real).long().argsort(dim=1, stable=True)
    count = real.sum(dim=1)
    packed = ids.gather(1, order).masked_fill(torch.arange(width, device=columns.device) >= count[:, None], -1)
    joined = torch.cat([before.recent, packed], dim=1)
    wanted = torch.tensor(marker, device=columns.device)
    # The window that ends with the n-th token of this call has index n.
    rank = _first_column((joined.unfold(1, len(marker), 1) == wanted).all(dim=-1))
    found = rank < width
    last = order.gather(1, rank.clamp(max=width - 1)[:, None])[:, 0]
    recent = joined.gather(1, count[:, None] + torch.arange(len(marker) - 1, device=columns.device))
    return torch.where(found, last + 1, width), found, OpenPrompt(before.rows, before.real + count, recent)


def _shown(spec: PromptSpec, columns: Columns) -> PromptEnds:
    """The first labelled column of each row, if it is not its first token; a row that shows none is prompt to its end."""
    real, width = columns.real, columns.shape[1]
    labels = spec.labels if spec.labels is not None else spec.shift_labels
    if labels is None:
        rows = columns.shape[0]
        first = None if spec.prefill is None else torch.full((rows,), spec.prefill, device=columns.device)
        return PromptEnds(first, real.any(dim=1), None)
    # Shifted labels cannot tell a labelled first token from a prompt of one token, so they show neither.
    shift = 0 if spec.labels is not None else 1
    labelled = labels.to(columns.device) != -100
    first, start = _first_column(labelled) + shift, _first_column(real) + shift
    end = width - _first_column(real.flip(1))
    shows = labelled.any(dim=1) & (first > start)
    # A row without a label takes no part in the loss.
    unseen = labelled.any(dim=1) & ~shows
    return PromptEnds(torch.where(shows, torch.minimum(first, end), end), unseen, None)


def _first_column(flags: Tensor) -> Tensor:
    """The first column of each row of ``flags [B, N]`` that is set; ``N`` where none is."""
    column = torch.arange(flags.shape[1], device=flags.device)
    return torch.where(flags, column, flags.shape[1]).amin(dim=1)


# What to write, by whether a marker is known already.
_WAYS_OUT = """Tell where thinking starts in one of three ways:
  1. by the tokens: PTEConfig(prompt_end=peft_pte.prompt_end(tokenizer)) for {model}, if it is a chat model, or prompt_end=4 for text
     without prompts (model.peft_config[{adapter!r}].prompt_end = ... on a model that has its adapter);
  2. by the call: model(input_ids, attention_mask, prompt_length=P), P columns of prompt, or one number per row;
  3. by labels that are -100 on the prompt: model(input_ids, attention_mask, labels=labels)."""
_NOTHING_SHOWN = "a call without `labels`, `prompt_length` or PTEConfig(prompt_end=...) shows no end of its prompt"
_LABELLED_FROM_THE_START = "`labels` start with the first token of a row (TRL does so for `text` and `messages`), so they do not show where its prompt ends"
_NO_MARKER = (
    "`prompt_end` {rule} does not occur in {rows} (a prompt without its chat template, another template, or truncation that cut "
    "the marker off: see `max_length` and `truncation_mode` of the trainer)"
)


@dataclass
class PromptWatch:
    """Says where the end of a prompt cannot be told: once where it does no harm yet, and by an error where it would.

    What shows no end counts as prompt, so nothing of it is ever evicted: trained on, that is another policy than the one that decodes.
    """

    model_name: str
    warned: bool = False
    warned_of_prefill: bool = False

    def check(
        self,
        rule: PromptRule,
        spec: PromptSpec,
        unseen: Tensor,
        columns: Columns,
        window: int,
        training: bool,
        adapter: str,
    ) -> None:
        """Look at a scoring call.

        Args:
            rule: ``PTEConfig.prompt_end``.
            spec: What the call said.
            unseen: ``[B]``, rows that show no end of their prompt.
            columns: The columns of the call.
            window: ``W``.
            training: Whether gradients of a model in training mode are taken.
            adapter: The adapter in use.

        Raises:
            ValueError: Such a row of a training call is longer than the window.
        """
        if self.warned and not training:
            return
        too_long = unseen & (columns.real.sum(dim=1) > window)
        some, harmful = torch.stack([unseen.any(), too_long.any()]).tolist()
        if not (harmful or (some and training and not self.warned)):
            return
        if rule is not None and columns.ids is not None:
            rows = too_long if harmful else unseen
            reason = _NO_MARKER.format(rule=rule, rows=f"rows {rows.nonzero().flatten().tolist()}")
        else:
            reason = _NOTHING_SHOWN if spec.labels is None and spec.shift_labels is None else _LABELLED_FROM_THE_START
        ways = _WAYS_OUT.format(model=self.model_name, adapter=adapter)
        text = f"All tokens count as prompt and none is evicted: {reason}. {ways}"
        if harmful and training:
            raise ValueError(
                f"This call trains on more than a window of {window} tokens as if they were prompt. {text}"
            )
        self.warned = True
        warnings.warn(text, UserWarning, stacklevel=2)

    def check_prefill(self, thoughts: int, window: int) -> None:
        """Say once that the input of ``generate`` holds more thoughts than the window."""
        if self.warned_of_prefill or thoughts <= window:
            return
        self.warned_of_prefill = True
        warnings.warn(
            f"The input of `generate` holds {thoughts} tokens after the first marker `prompt_end`, more than the window of {window}: "
            "they count as thoughts (later turns and tool results do, as if the model had generated them), and the oldest were "
            "evicted. To keep all of the input as prompt instead, pass generate(..., prompt_length=input_ids.shape[1]).",
            UserWarning,
            stacklevel=2,
        )
