"""The rows of `generate_batch`: requests join them, a token is written to each, and whoever ends makes room for the next."""

from __future__ import annotations

import inspect
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..host.compat import CACHE, step_of
from ..passes.boundary import PromptSpec
from ..seam import Generation, Seam
from .choice import Chooser
from .requests import Request

PREFILLED_TOKENS = 8192
"""Of one prefill, at most, unless it is one prompt: rows join in several where there are more."""

_BROKEN = (
    "There is no next token: logits processors have ruled out all of them, or a score is not a number. Let a processor leave one, or look for "
    "infinite weights and overflow in half precision."
)


@dataclass(frozen=True)
class Sizes:
    """What does not change while a batch is written."""

    rows: int
    prompt: int
    """Slots of prompts."""
    length: int
    """Tokens of the longest row: what it goes on from, and what it may write."""
    written: int
    """Tokens that a row may write."""
    prefilled: int = PREFILLED_TOKENS
    """Tokens of a prefill, at most."""
    share_prompts: bool = True
    """Whether equal prompts that join together are read once."""
    record: bool = False
    """Whether it is noted what leaves."""


@dataclass(frozen=True)
class _Written:
    """Tokens that were written, and which the host has not looked at."""

    flags: Tensor
    """``[2, B']``, rows that ended with them and rows in which they mean nothing; on the host by the time that ``there`` says so."""
    there: Any
    requests: list[tuple[int, Request, int]]
    """By column of ``flags``: the row, its request, and how many tokens that had then."""


class Batch:
    """Some rows, and the requests that are written in them.

    Args:
        seam: The adapted model.
        adapter: The adapter in use.
        chooser: What chooses tokens.
        config: The options of the generation.
        sizes: Rows, and what they must hold.
        given_lengths: Whether the caller said where prompts end; if not the rule of the adapter is asked.
    """

    def __init__(
        self, seam: Seam, adapter: str, chooser: Chooser, config: Any, sizes: Sizes, given_lengths: bool
    ) -> None:
        self.seam, self.adapter, self.chooser, self.config, self.sizes = seam, adapter, chooser, config, sizes
        self.given_lengths = given_lengths
        self.model: Any = seam.model
        device = self.device = self.model.device
        self.cache = seam.new_cache(adapter, static=config.cache_implementation == "static")
        if sizes.record:
            self.cache.record()
        self.cache.make_rows(sizes.rows, sizes.prompt, device)
        self.generation = Generation(PromptSpec(), cache=self.cache, started=True)
        self.requests: list[Request | None] = [None] * sizes.rows
        self.ids = torch.zeros(sizes.rows, sizes.length + 2, dtype=torch.long, device=device)
        # Tokens of each row, and those of them that its request came with.
        self.lengths = torch.zeros(sizes.rows, dtype=torch.long, device=device)
        self.given = torch.zeros(sizes.rows, dtype=torch.long, device=device)
        self.draws = (
            torch.zeros(sizes.rows, sizes.written, dtype=torch.float64, device=device) if config.do_sample else None
        )
        self.log_probs = torch.zeros(sizes.rows, sizes.written + 2, device=device) if chooser.log_probs else None
        self.logits: Tensor | None = None
        inputs = inspect.signature(type(self.model).forward).parameters
        self._takes_positions, self._takes_logits_to_keep = "position_ids" in inputs, "logits_to_keep" in inputs
        self._forward = step_of(self.model, self.cache, config)
        self._ended = 0
        self._unseen: deque[_Written] = deque()
        # Where a look at a tensor waits for the device, the look at a step comes when the next is under way.
        self._ahead = 0 if device.type == "cpu" else 1
        # Rows that the cache knows to go on; ``None``: it is to be told.
        self._going: list[bool] | None = None

    @property
    def live(self) -> int:
        """Rows that are written."""
        return sum(request is not None for request in self.requests)

    @property
    def full(self) -> bool:
        """Whether every row has a request."""
        return all(self.requests)

    def take_ended(self) -> int:
        """Requests that have ended since it was asked last."""
        ended, self._ended = self._ended, 0
        return ended

    def join(self, waiting: deque[Request]) -> None:
        """Let requests that are ``waiting`` have the rows that are free, and write a token of each."""
        free = [row for row, request in enumerate(self.requests) if request is None]
        while free and waiting:
            joining: list[Request] = []
            columns = 0
            while waiting and len(joining) < len(free):
                columns = max(columns, len(waiting[0].tokens))
                if joining and columns * (len(joining) + 1) > self.sizes.prefilled:
                    break
                if joining and not self.cache.bounds_all and not joining[0].alike(waiting[0]):
                    # Layers of the model's own would count the padding.
                    break
                joining.append(waiting.popleft())
            rows, free = free[: len(joining)], free[len(joining) :]
            self._prefill(rows, joining)
            self._write(rows)

    def step(self) -> None:
        """Read the last token of each row, and write the next."""
        going = [request is not None and request.written < request.limit for request in self.requests]
        rows = self.cache.rows
        if rows is None or not any(going):
            self.look(ahead=False)
            return
        if going != self._going:
            rows.pause(going)
            self._going = going
        last = self.ids.gather(1, (self.lengths - 1)[:, None])
        inputs: dict[str, Any] = {CACHE: self.cache, "use_cache": True, "attention_mask": None}
        if self._takes_positions:
            inputs["position_ids"] = rows.lengths[:, None]
        inputs = self.model.prepare_inputs_for_generation(last, next_sequence_length=1, **inputs)
        output = self._forward(**inputs, return_dict=True)
        self.logits = output.logits[:, -1].to(self.device, torch.float32, copy=True)
        self._write([row for row, goes_on in enumerate(going) if goes_on])

    def look(self, ahead: bool = True) -> None:
        """See which rows have ended; ``ahead``: but for the last step, where the device is still at it."""
        while len(self._unseen) > (self._ahead if ahead else 0):
            written = self._unseen.popleft()
            if written.there is not None:
                written.there.synchronize()
            for end, broken, (row, request, count) in zip(*written.flags.tolist(), written.requests, strict=True):
                if request.over:
                    continue
                if broken:
                    request.fail(ValueError(_BROKEN), count - 1)
                if end or count == request.limit or request.error is not None:
                    self._finish(row, request, count)

    def shrink(self) -> None:
        """Drop rows that nobody waits for, down to a power of two."""
        live = [row for row, request in enumerate(self.requests) if request is not None]
        size = 1 << (len(live) - 1).bit_length()
        if size >= len(self.requests):
            return
        self.look(ahead=False)
        idle = [row for row, request in enumerate(self.requests) if request is None]
        live = [row for row, request in enumerate(self.requests) if request is not None]
        kept = sorted([*live, *idle[: size - len(live)]])
        index = torch.tensor(kept, device=self.device)
        self.cache.batch_select_indices(index)
        self.requests = [self.requests[row] for row in kept]
        self.ids, self.lengths, self.given = self.ids[index], self.lengths[index], self.given[index]
        self.draws = None if self.draws is None else self.draws[index]
        self.log_probs = None if self.log_probs is None else self.log_probs[index]
        self.logits = None
        self._going = None

    def _drop_columns(self) -> None:
        """Let columns in which no row has a token be forgotten, where layers keep masks of them."""
        rows = self.cache.rows
        if rows is not None and not self.cache.bounds_all:
            self.cache.drop_columns(rows.columns - rows.longest)

    def _prefill(self, rows: list[int], joining: list[Request]) -> None:
        """Read what the requests that are ``joining`` go on from, and let ``rows`` hold it."""
        different = list(dict.fromkeys((request.tokens, request.prompt) for request in joining))
        if not self.sizes.share_prompts:
            different = [(request.tokens, request.prompt) for request in joining]
        width = max(len(tokens) for tokens, _ in different)
        padding = [width - len(tokens) for tokens, _ in different]
        ids = torch.tensor([[0] * more + list(tokens) for more, (tokens, _) in zip(padding, different, strict=True)])
        mask = torch.arange(width)[None] >= torch.tensor(padding)[:, None]
        lengths = [more + prompt for more, (_, prompt) in zip(padding, different, strict=True)]
        fresh = self.seam.new_cache(self.adapter)
        if self.sizes.record:
            fresh.record()
        inputs: dict[str, Any] = {CACHE: fresh, "use_cache": True, "is_first_iteration": True}
        if any(padding):
            inputs["attention_mask"] = mask.long().to(self.device)
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        generations = self.seam.calls.generations
        generations.append(Generation(PromptSpec(length=lengths if self.given_lengths else None), cache=fresh))
        try:
            inputs = self.model.prepare_inputs_for_generation(ids.to(self.device), **inputs)
            logits = self.model(**inputs, return_dict=True).logits[:, -1].to(self.device, torch.float32)
        finally:
            generations.pop()
        if len(different) < len(joining):
            index = torch.tensor([different.index((request.tokens, request.prompt)) for request in joining])
            fresh.batch_select_indices(index.to(self.device))
            logits = logits[index.to(self.device)]
        self.cache.replace_rows(rows, fresh)
        self._drop_columns()
        self._going = None
        if self.logits is None:
            self.logits = logits.new_zeros(len(self.requests), logits.shape[1])
        there = torch.tensor(rows, device=self.device)
        self.logits[there] = logits
        self.lengths[there] = self.given[there] = torch.tensor(
            [len(request.tokens) for request in joining], device=self.device
        )
        for row, request in zip(rows, joining, strict=True):
            self._begin(row, request)

    def _begin(self, row: int, request: Request) -> None:
        self.requests[row] = request
        request.started = time.perf_counter()
        self.ids[row, : len(request.tokens)] = torch.tensor(request.tokens, device=self.device)
        if self.draws is not None:
            self.draws[row, : request.limit] = request.draws().to(self.device)
        self.chooser.begin(request)

    def _write(self, rows: list[int]) -> None:
        """Choose the next token of each of ``rows``."""
        if self.logits is None or not rows:
            return
        there = torch.arange(len(rows), device=self.device)
        lengths, given, logits, draws = self.lengths, self.given, self.logits, self.draws
        if len(rows) < len(self.requests):
            there = torch.tensor(rows, device=self.device)
            lengths, given, logits = lengths[there], given[there], logits[there]
        written = lengths - given
        if draws is not None:
            draws = draws[there, written.clamp(max=self.sizes.written - 1)]
        requests = [request for row in rows if (request := self.requests[row]) is not None]
        ids = [self._ids_of(row) for row in rows] if self.chooser.reads_tokens else []
        chosen = self.chooser.choose(logits, requests, ids, draws)
        self.ids[there, lengths] = chosen.tokens
        if self.log_probs is not None and chosen.log_probs is not None:
            self.log_probs[there, written] = chosen.log_probs
        self.lengths[there] = lengths + 1
        ends = chosen.ends
        for place, (row, request) in enumerate(zip(rows, requests, strict=True)):
            request.note_token()
            if request.criteria:
                ends[place] |= self.chooser.stops(request, self._ids_of(row))
        counts = [(row, request, request.written) for row, request in zip(rows, requests, strict=True)]
        self._unseen.append(_on_host(torch.stack([ends, chosen.broken]), counts))

    def _ids_of(self, row: int) -> Tensor:
        """``[1, N]``, the tokens of a row so far."""
        request = self.requests[row]
        assert request is not None
        return self.ids[row : row + 1, : len(request.tokens) + request.written]

    def _finish(self, row: int, request: Request, count: int) -> None:
        first = len(request.tokens)
        log_probs = [] if self.log_probs is None else self.log_probs[row, :count].tolist()
        if self.sizes.record:
            # Its last token was never read.
            request.evictions = self.cache.evicted_of(row, first - request.prompt + count - 1)
        request.finish(self.ids[row, first : first + count].tolist(), log_probs)
        self._ended += 1
        self.requests[row] = None


def _on_host(flags: Tensor, requests: list[tuple[int, Request, int]]) -> _Written:
    """Send ``flags`` to the host, without waiting for it."""
    if flags.device.type == "cpu":
        return _Written(flags, None, requests)
    device, flags = flags.device, flags.to("cpu", non_blocking=True)
    there = torch.Event(device)
    there.record()
    return _Written(flags, there, requests)
