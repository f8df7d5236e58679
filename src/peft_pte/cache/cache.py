"""`PTECache`: a KV cache of fixed size, and the thought state of its rows.

The prompt is never evicted. Thoughts live in ``W`` slots per row; before one is written to a full window, ``m`` leave together and
are encoded. Each row has its own clock (:mod:`peft_pte.cache.rows`); what a layer holds is in :mod:`peft_pte.cache.store`. The cache
knows nothing of who encodes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticSlidingWindowLayer,
)

from ..config import PTEConfig
from ..eviction.budgets import HeadClock
from ..eviction.policy import EvictionPolicy, make_policy
from ..eviction.records import Evictions
from ..method.state import LayerState, Reading, ThoughtState
from .fixed import FixedAddresses
from .heads import ChoosingLayer
from .own import fork_own, map_own, own_tensors, renumber_own, repeat_own, replace_own, select_own
from .ragged import RaggedLayer
from .rows import Rows
from .schedule import evictions_before, held_after, is_due, until_due
from .store import SharedSlots, ThoughtLayer


class RowTensors(Protocol):
    """What is kept of the rows, in tensors whose first axis they are."""

    def map(self, function: Callable[[Tensor], Tensor]) -> RowTensors:
        """The same with ``function`` applied to every tensor."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""


class PTECache(Cache):
    """The KV cache of Progressive Thought Encoding, with the thought state of its rows.

    ``model.generate`` makes one by itself. Make one yourself to keep a conversation, to save it (``torch.save``), or to
    move it (``.move_to``).

    Args:
        model_config: The config of the (base) model.
        pte_config: The config of the adapter that will use it.
        static: Whether everything stays at its address, so that a decoding step can be compiled and captured in a graph;
            ``generate(cache_implementation="static")`` makes such a one.

    Attributes:
        rows: What each row has written, once there are rows.
        spare: Thoughts beyond ``W`` that a head holds at most: more than none where heads share a window.
        prompt_ends: First thought column of each row among the columns of its caller, ``[B]``, once it is known.
        open_prompt: What the rule must know of prompts that have not come to their end; ``None``: what follows is thoughts.
        interrupted: Whether a call that wrote to it did not come to its end: its layers hold different tokens.
        adapter: Name of the adapter whose states these are, once one used the cache.
        running: The pass that writes to it (:class:`peft_pte.passes.block.Pass`), while one runs.
        state: The thought state of the rows.

    Raises:
        NotImplementedError: A layer of the model keeps something that cannot be bounded, or has no form at fixed addresses.
    """

    def __init__(self, model_config: PreTrainedConfig, pte_config: PTEConfig, static: bool = False) -> None:
        self.window = pte_config.cache_window
        self.tokens_per_eviction = 0 if self.window is None else pte_config.tokens_per_eviction
        self.policy = make_policy(pte_config.eviction, pte_config.eviction_options)
        self.fixed = FixedAddresses() if static else None
        self.shared = SharedSlots() if static else None
        layers: list[Any] = list(DynamicCache(config=model_config).layers)
        if self.window is not None:
            self.policy.check(self.window, self.tokens_per_eviction)
            layers = [_kept(layer, index, static) for index, layer in enumerate(layers)]
            bounded = [index for index, layer in enumerate(layers) if layer is None]
            made = _made(bounded, self.policy, self.window, self.tokens_per_eviction, self.shared)
            layers = [made.get(index, layer) for index, layer in enumerate(layers)]
            if not any(isinstance(layer, ThoughtLayer) for layer in layers):
                raise NotImplementedError(
                    f"`cache_window` has nothing to bound: every layer of {type(model_config).__name__} already has "
                    "memory of fixed size. Use PTEConfig(cache_window=None), or plain LoRA."
                )
        super().__init__(layers=layers)
        longest = [layer.longest for layer in layers if isinstance(layer, RaggedLayer)]
        self.spare = max(longest, default=self.window or 0) - (self.window or 0)
        if static and (self.window is None or not self.continuable):
            raise NotImplementedError(
                f"A static cache needs a bounded window and no linear attention, got cache_window={self.window} and a "
                f"{type(model_config).__name__}. Leave `cache_implementation` unset."
            )
        self.fingerprint = fingerprint(pte_config)
        self.state = ThoughtState(len(layers))
        self._forget()

    def _forget(self) -> None:
        self.adapter: str | None = None
        self.rows: Rows | None = None
        self.prompt_ends: Tensor | None = None
        self.open_prompt: RowTensors | None = None
        # Positions of the columns of thoughts, while a call of several tokens runs; heads that choose have their own.
        self.column_positions: Tensor | None = None
        # Of the slots of rows that have ended in it.
        self.slot_positions: Tensor | None = None
        self.interrupted = False
        self.running: Any = None
        # Of the masks that a model around the backbone makes, while it does.
        self.mask_columns: int | None = None

    def __repr__(self) -> str:
        return (
            f"PTECache(window={self.window}, prompt_length={self.prompt_length}, seen={self.get_seq_length()}, "
            f"evictions={self.evictions})"
        )

    @property
    def static(self) -> bool:
        """Whether everything stays at its address."""
        return self.fixed is not None

    @property
    def prompt_length(self) -> int | None:
        """Slots of the prompts ``P``, as far as they were seen; ``None`` before anything was."""
        return None if self.rows is None else self.rows.prompt

    @property
    def evictions(self) -> int:
        """Evictions of the row that had most."""
        return 0 if self.rows is None else self.rows.evictions

    @property
    def room(self) -> int:
        """Thoughts that can be written before the next eviction of any row."""
        window, counts = self.window or 0, [0] if self.rows is None else self.rows.bound
        return min(window - held_after(count, window, self.tokens_per_eviction) for count in counts)

    def window_positions(self, index: int) -> Tensor:
        """``[B, 1 or G, W]``, absolute positions of the thoughts that a bounded layer holds; -1 where a slot holds none.

        Where heads share a window there are as many as the longest holds.

        Raises:
            RuntimeError: The cache is empty.
        """
        if self.rows is None:
            raise RuntimeError("This cache is empty: nothing was written to it yet.")
        layer = dict(self.thought_layers)[index]
        if isinstance(layer, RaggedLayer):
            return layer.held_positions(self.rows.thoughts)
        own = layer.slot_positions if isinstance(layer, ChoosingLayer) else None
        held = self.rows.positions[:, None, :-1] if own is None else own
        return held.masked_fill(~self.rows.visible()[:, None].to(held.device), -1)

    @property
    def continuable(self) -> bool:
        """Whether every layer can go on from what it holds with gradients: a recurrent state is overwritten in place."""
        return not any(isinstance(layer, LinearAttentionLayer) for layer in self.layers)

    @property
    def bounds_all(self) -> bool:
        """Whether all layers are bounded."""
        return not [layer for layer in self.layers if not isinstance(layer, (ThoughtLayer, DummyLayer))]

    @property
    def refillable(self) -> bool:
        """Whether rows can be replaced: not where layers of the model's own stand at fixed addresses, in the columns of all rows."""
        return self.bounds_all or not self.static

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Columns seen, evicted ones and padding included."""
        if layer_idx is None:
            layer_idx = 0
            for index, layer in enumerate(self.layers):
                if isinstance(layer, ThoughtLayer):
                    layer_idx = index
                    break
        seen = super().get_seq_length(layer_idx)
        # A step that stands ready has been counted; the model that takes it asks for what came before.
        return seen - 1 if self.fixed is not None and self.fixed.ready and not torch.compiler.is_compiling() else seen

    @property
    def thought_layers(self) -> list[tuple[int, ThoughtLayer]]:
        """The bounded layers, with their indices."""
        return [(index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, ThoughtLayer)]

    @property
    def holds_thoughts(self) -> bool:
        """Whether a thought was written."""
        return self.rows is not None and max(self.rows.bound) > 0

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: not once anything was evicted."""
        return self.evictions == 0 and all(layer.is_croppable for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: keys, values, states, bookkeeping."""
        tensors: list[Tensor] = [*self.state.tensors(), *self._row_tensors()]
        if self.fixed is not None:
            tensors.extend(self.fixed.states.values())
        for layer in self.layers:
            tensors.extend(layer.tensors() if isinstance(layer, ThoughtLayer) else own_tensors(layer))
        return sum(map(held_bytes, tensors))

    def full_nbytes(self, token_width: int) -> int:
        """Bytes of a cache that keeps every column of all rows, as the model's own does, in place of the bounded layers.

        Args:
            token_width: Numbers in keys and values of one token, of all bounded layers together.
        """
        rows, bounded = self.rows, [layer for _, layer in self.thought_layers]
        own = [part for layer in self.layers if not isinstance(layer, ThoughtLayer) for part in own_tensors(layer)]
        held = sum(map(held_bytes, own))
        numbers = next((part for layer in bounded for part in layer.tensors() if part.is_floating_point()), None)
        if rows is None or numbers is None:
            return held
        columns = min(rows.columns, rows.prompt + max(rows.bound))
        return held + len(rows.bound) * columns * token_width * numbers.element_size()

    def rows_for(self, batch: int, device: torch.device) -> Rows:
        """The clocks of ``batch`` rows, made when they are first asked for."""
        if self.rows is None:
            self.rows = Rows(batch, self.window or 0, self.tokens_per_eviction, device, self.policy.observed)
            self._begin_logs(batch)
        return self.rows

    def _begin_logs(self, batch: int) -> None:
        for layer in self.layers:
            if isinstance(layer, ChoosingLayer) and layer.log is not None:
                layer.log = [[] for _ in range(batch)]

    def count(self, rows: Rows, columns: int) -> None:
        """Note that ``columns`` more columns of the caller were seen."""
        rows.columns += columns
        self.note_seen(rows.columns)

    def note_seen(self, columns: int) -> None:
        """Let ``columns`` columns have been seen."""
        for layer in self.layers:
            if isinstance(layer, ThoughtLayer):
                layer.seen = columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of a mask that the host makes, and the first of them; of bounded layers one, unless images are looked for in it."""
        if self.mask_columns is not None and isinstance(self.layers[layer_idx], ThoughtLayer):
            return self.mask_columns, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def unroll(self) -> int:
        """Let what stands in slots be columns; returns how many of them are thoughts."""
        if self.rows is None:
            return 0
        how = self.rows.unrolling(self.spare)
        for _, layer in self.thought_layers:
            layer.unroll(how)
        positions = self.rows.positions
        self.column_positions = positions[:, : how.columns] if how.slots is None else positions.gather(1, how.slots)
        return how.columns

    def reading(self, index: int) -> Reading | None:
        """What the adapters of a layer read in a step at fixed addresses; ``None``: it has none."""
        fixed = self.fixed
        state = None if fixed is None else fixed.states.get(index)
        if fixed is None or state is None:
            return None
        return Reading(state, state.shape[0], 1, self.adapter or "", read={}, downs=fixed.downs.get(index, {}))

    def record(self) -> None:
        """From now on note what heads give up, for :attr:`evicted`.

        Raises:
            ValueError: Nothing is chosen, or something has left already.
        """
        chosen = [layer for layer in self.layers if isinstance(layer, ChoosingLayer)]
        if not chosen:
            raise ValueError(
                'Nothing is chosen with eviction="sliding_window": the oldest leave, and scoring knows them by itself. Leave '
                "`return_evictions` and `evictions` out."
            )
        if self.recording:
            return
        if self.evictions:
            raise ValueError(
                "Thoughts have left this cache before its evictions were recorded. Ask for them (`return_evictions=True`) from the first call on."
            )
        batch = 0 if self.rows is None else len(self.rows.bound)
        for layer in chosen:
            layer.log = [[] for _ in range(batch)]

    @property
    def recording(self) -> bool:
        """Whether it is noted what heads give up."""
        return any(isinstance(layer, ChoosingLayer) and layer.log is not None for layer in self.layers)

    def evicted_of(self, row: int, thoughts: int) -> Evictions:
        """What the heads of a row gave up before it had written ``thoughts``, as a batch of one."""
        logs = {index: layer.log for index, layer in self.thought_layers if isinstance(layer, ChoosingLayer)}
        own = {index: None if log is None else [log[row]] for index, log in logs.items()}
        return Evictions.of_rows(own, [self._evictions_of(thoughts)], self.window or 0, self.tokens_per_eviction)

    @property
    def evicted(self) -> Evictions:
        """What heads gave up so far.

        Raises:
            ValueError: Nobody asked for it (:meth:`record`).
        """
        if not self.recording or self.rows is None:
            raise ValueError(
                "Nothing was recorded. Ask for it before: `record()`, or generate(..., return_evictions=True)."
            )
        counts = [self._evictions_of(count) for count in self.rows.thoughts.tolist()]
        logs = {index: layer.log for index, layer in self.thought_layers if isinstance(layer, ChoosingLayer)}
        return Evictions.of_rows(logs, counts, self.window or 0, self.tokens_per_eviction)

    def make_rows(self, batch: int, prompt: int, device: torch.device) -> None:
        """Let an empty cache have ``batch`` rows that hold nothing, with slots for prompts of ``prompt``; each is to be replaced."""
        self.rows = Rows(batch, self.window or 0, self.tokens_per_eviction, device, self.policy.observed)
        self._begin_logs(batch)
        self.rows.begin(prompt, torch.zeros(batch, prompt, dtype=torch.bool, device=device))
        self.prompt_ends = torch.zeros(batch, dtype=torch.long, device=device)

    def synchronize(self) -> None:
        """Let the host know which rows have ended, and forget what was noted of them behind their ends."""
        rows = self.rows
        if rows is None:
            return
        ended = rows.running is not None
        rows.synchronize()
        if not (ended and self.recording):
            return
        counts = [self._evictions_of(count) for count in rows.bound]
        for _, layer in self.thought_layers:
            if isinstance(layer, ChoosingLayer) and layer.log is not None:
                layer.log = [entries[:count] for entries, count in zip(layer.log, counts, strict=True)]

    def _evictions_of(self, thoughts: int) -> int:
        return evictions_before(thoughts - 1, self.window or 0, self.tokens_per_eviction) if thoughts > 0 else 0

    def take_back(self, thoughts: Sequence[int]) -> bool:
        """Forget the last ``thoughts`` of each row; False, and nothing is done, where one of them evicted something.

        Raises:
            ValueError: The policy looks at queries, and would not get those before: they are forgotten.
        """
        rows = self.rows
        if rows is None or not rows.can_take_back(thoughts):
            return False
        for count, back in zip(rows.bound, thoughts, strict=True):
            kept = count - back
            window, step = rows.window, rows.step
            written = 0 if is_due(kept, window, step) else until_due(kept, window, step)
            if back and written < self.policy.observed:
                raise ValueError(
                    f"`attention_mask` hides the last {back} tokens of a row {written} thoughts before its next eviction, and what leaves then is chosen "
                    f"by the queries of the last {self.policy.observed}, of which those before the hidden ones are forgotten. Prefill the conversation again "
                    "without the cache, or use a policy that looks at no queries."
                )
        rows.take_back(thoughts)
        return True

    def replace_rows(self, rows: Sequence[int], other: PTECache) -> None:
        """Let ``rows`` be those of ``other``, states and all: nothing of what they were is seen again.

        To whoever goes on with this cache they are padded in front to the columns that it has seen: the mask of such a row is zero but for
        its last tokens. :meth:`peft_pte.PTEModel.replace_rows` prefills ``other``.

        Args:
            rows: Which rows, ``B'`` of them.
            other: A cache of ``B'`` rows.

        Raises:
            ValueError: A row is not there, or named twice, or ``other`` holds another number of rows or is of another configuration.
            NotImplementedError: Prompts have not come to their end, or layers that are not bounded hold other lengths.
        """
        mine, theirs = self.rows, other.rows
        if mine is None or theirs is None or self.fingerprint != other.fingerprint:
            raise ValueError(
                "`other` must be a cache of the same adapter configuration, and both must hold rows. Feed this one its first prompts before."
            )
        wanted = sorted({int(row) for row in rows})
        if (
            len(wanted) != len(rows)
            or len(rows) != len(theirs.bound)
            or not all(0 <= row < len(mine.bound) for row in wanted)
        ):
            raise ValueError(
                f"`rows` must name {len(theirs.bound)} different rows of {len(mine.bound)}, one for each prompt, got {list(rows)}."
            )
        if not self.refillable or self.open_prompt is not None or other.open_prompt is not None:
            raise NotImplementedError(
                "Rows can be replaced where no layer that is not bounded stands at fixed addresses, and all prompts have come to their end (see "
                "PTEConfig.prompt_end; or give `prompt_length`). Decode the new prompts in a cache of their own."
            )
        if self.recording and not other.recording and other.evictions:
            raise ValueError(
                "This cache records what leaves, and `other` has evicted thoughts without a record. Let it record before its first call (`record()`)."
            )
        self.synchronize()
        self.move_rows(theirs.device)
        there = torch.tensor(list(rows), device=mine.device)
        if self.prompt_ends is not None and other.prompt_ends is not None:
            behind = max(mine.columns, theirs.columns) - theirs.columns
            self.prompt_ends = self.prompt_ends.index_copy(0, there, other.prompt_ends + behind)
        mine.replace(rows, theirs)
        for own, new in zip(self.layers, other.layers, strict=True):
            if not isinstance(own, ThoughtLayer):
                replace_own(own, there, new, len(mine.bound), mine.columns)
        for (index, layer), (_, new) in zip(self.thought_layers, other.thought_layers, strict=True):
            layer.replace(there, new, mine.prompt, len(mine.bound))
            held, state = self.state.layers[index].value, other.state.layers[index].value
            if state is not None:
                held = state.new_zeros(len(mine.bound), *state.shape[1:]) if held is None else held
                self.state.layers[index] = LayerState(held.index_copy(0, there.to(held.device), state))
        if self.fixed is not None:
            self.fixed.stale = True
        self.note_seen(mine.columns)

    def drop_columns(self, columns: int) -> None:
        """Forget the first ``columns`` columns of the caller, which hold no token of any row."""
        rows = self.rows
        if rows is None or not columns:
            return
        self.count(rows, -columns)
        self.prompt_ends = None if self.prompt_ends is None else self.prompt_ends - columns
        for layer in self.layers:
            if not isinstance(layer, ThoughtLayer):
                renumber_own(layer, rows.columns)

    def fork(self) -> PTECache:
        """An independent cache with the same content; no tensor is copied, so only one may write to slots."""
        other = copy.copy(self)
        other.layers = [layer.fork() if isinstance(layer, ThoughtLayer) else fork_own(layer) for layer in self.layers]
        other.state = self.state.fork()
        return other

    def one_layer(self, index: int) -> PTECache:
        """A cache with nothing but the content of one layer, for that layer alone to run with; no tensor is copied."""
        other = copy.copy(self)
        layer = self.layers[index]
        layers: list[Any] = [_NoLayer()] * len(self.layers)
        other.layers = layers
        other.layers[index] = layer.fork() if isinstance(layer, ThoughtLayer) else fork_own(layer)
        other.state = ThoughtState(len(self.layers))
        other.state.layers[index] = self.state.layers[index]
        # Nor the pass, which may keep this one: a circle would hold its masks until the garbage collector comes by.
        other.rows = other.column_positions = other.prompt_ends = other.open_prompt = other.running = None
        return other

    def take_layer(self, index: int, other: PTECache) -> None:
        """Let a layer be what it became in ``other``, made by :meth:`one_layer`."""
        layer, after = self.layers[index], other.layers[index]
        if isinstance(layer, ThoughtLayer) and isinstance(after, ThoughtLayer):
            layer.take(after)
        else:
            self.layers[index] = after
        self.state.layers[index] = other.state.layers[index]

    def map_parts(self, function: Callable[[Any], Any]) -> None:
        """Apply ``function`` to every tensor that layers hold, or to what stands in its place, in place."""
        for layer in self.layers:
            if isinstance(layer, ThoughtLayer):
                layer.map(function)
            else:
                map_own(layer, function)
        self.state.map(function)

    def become(self, other: PTECache) -> None:
        """Become what ``other``, a fork of this cache, became."""
        self.__dict__.update(other.__dict__)

    def reset(self) -> None:
        """Forget everything; the next call starts with a prompt. What stands at fixed addresses is used again."""
        super().reset()
        self.state.reset()
        if self.fixed is not None:
            self.fixed.ready, self.fixed.stale = False, True
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last thoughts of every row back.

        Args:
            tokens_to_remove: Minus their number, as transformers counts.

        Raises:
            ValueError: An evicted token, or a token of the prompt, would have to come back or go.
        """
        # Some versions of `generate` count in 0-d tensors.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove == 0:
            return super().crop(0)
        if self.policy.observed:
            raise ValueError(
                f"`tokens_to_remove` must be 0 with a policy that looks at queries, got {tokens_to_remove}: those before the last are forgotten. "
                'Use eviction="sliding_window", "random" or "key_diff", or generate without an assistant.'
            )
        if self.evictions:
            raise ValueError(
                f"`tokens_to_remove` must be 0 after an eviction, got {tokens_to_remove}: what was evicted cannot be "
                "brought back. Assisted decoding works until the window is full: use a larger cache_window, or "
                "generate without an assistant."
            )
        if self.rows is not None:
            self.synchronize()
            if self.rows.unused is not None and bool(self.rows.unused.any()):
                raise ValueError(
                    f"`tokens_to_remove` must be 0 once rows have ended, got {tokens_to_remove}: the last columns are not the same tokens in "
                    "all rows. Hide them by the mask of the next call instead."
                )
        thoughts = self.get_seq_length() if self.rows is None else min(self.rows.bound)
        if tokens_to_remove > 0 or thoughts < -tokens_to_remove:
            raise ValueError(
                f"`tokens_to_remove` must be at most 0 and leave the prompt alone, got {tokens_to_remove}. To start "
                "again use reset()."
            )
        super().crop(tokens_to_remove)
        if self.rows is not None:
            self.rows.take_back([-tokens_to_remove] * len(self.rows.bound))
            self.count(self.rows, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` be what row ``beam_idx[i]`` was, state and all.

        Args:
            beam_idx: ``[B]``, int64.
        """
        self._map_rows(
            lambda part: part.index_select(0, beam_idx.to(part.device)), lambda layer: layer.reorder_cache(beam_idx)
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, state and all."""
        self._map_rows(lambda part: part.repeat_interleave(repeats, dim=0), lambda layer: repeat_own(layer, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, state and all.

        Args:
            indices: Which, ``[B']``, int64.
        """
        self._map_rows(lambda part: part[indices.to(part.device)], lambda layer: select_own(layer, indices))

    def move_to(self, device: torch.device | str) -> PTECache:
        """Move everything to ``device``; returns the cache itself.

        Not called ``to``: where layers are spread over devices, accelerate calls that of whatever a layer is given, and all layers' content
        would follow each layer around.
        """
        self._map_rows(lambda part: part.to(device), lambda layer: map_own(layer, lambda part: part.to(device)))
        return self

    def move_rows(self, device: torch.device) -> None:
        """Count what rows have written on ``device``; what layers hold stays where it is."""
        if self.rows is None or self.rows.device == device:
            return
        self.rows.map(lambda part: part.to(device))
        self.prompt_ends = None if self.prompt_ends is None else self.prompt_ends.to(device)
        self.open_prompt = None if self.open_prompt is None else self.open_prompt.map(lambda part: part.to(device))

    def _map_rows(self, function: Callable[[Tensor], Tensor], own: Callable[[Any], None]) -> None:
        """Apply ``function`` to every tensor of ours, and ``own`` to every layer that is the model's own."""
        if self.recording and self.rows is not None:
            rows = function(torch.arange(len(self.rows.bound), device=self.rows.device)).tolist()
            for _, choosing in self.thought_layers:
                if isinstance(choosing, ChoosingLayer) and choosing.log is not None:
                    choosing.log = [list(choosing.log[row]) for row in rows]
        for layer in self.layers:
            if isinstance(layer, ThoughtLayer):
                layer.map(function)
            else:
                own(layer)
        self.state.map(function)
        if self.fixed is not None:
            self.fixed.map(function)
        if self.rows is not None:
            self.rows.map(function)
        self.prompt_ends = None if self.prompt_ends is None else function(self.prompt_ends)
        self.open_prompt = None if self.open_prompt is None else self.open_prompt.map(function)

    def _row_tensors(self) -> tuple[Tensor, ...]:
        """What is kept of the rows beside keys, values and states."""
        rows = () if self.rows is None else self.rows.tensors()
        ends = () if self.prompt_ends is None else (self.prompt_ends,)
        return (*rows, *ends, *(() if self.open_prompt is None else self.open_prompt.tensors()))


class _NoLayer:
    """Stands where a layer is not needed."""


def held_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: rows that an expanded tensor repeats are held once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


_SHARED_FIELDS = operator.attrgetter(
    "key_rotation",
    "state_address",
    "cache_window",
    "eviction",
    "eviction_options",
    "r",
    "num_global_tokens",
    "state_update",
    "encoder_attention",
    "update_gain",
)


def fingerprint(config: PTEConfig) -> tuple[Any, ...]:
    """What two adapters must share to be able to use one cache."""
    evict = None if config.cache_window is None else config.tokens_per_eviction
    prompt_end = tuple(config.prompt_end) if isinstance(config.prompt_end, list) else config.prompt_end
    return (evict, tuple(sorted(config.rank_pattern.items())), prompt_end, *_SHARED_FIELDS(config))


def check_cache(cache: Any, config: PTEConfig, adapter: str) -> None:
    """Refuse a cache that the active ``adapter`` cannot use; note that it does.

    Raises:
        TypeError: It is no PTECache.
        ValueError: It is of another adapter, or of another configuration.
        NotImplementedError: It is static, and gradients are on.
    """
    if not isinstance(cache, PTECache):
        raise TypeError(
            f"`past_key_values` must be a PTECache while a PTE adapter is active, got {type(cache).__name__}. Leave it "
            "out in `generate`, or pass PTECache(model.config, pte_config)."
        )
    if cache.fingerprint != fingerprint(config):
        raise ValueError(
            f"`past_key_values` was built for another adapter configuration (window, eviction and its options, prompt end, queries, rank, update): "
            f"{cache.fingerprint}, got {fingerprint(config)} now. Build one with PTECache(model.config, pte_config)."
        )
    if cache.adapter not in (None, adapter):
        raise ValueError(
            f"`past_key_values` holds thoughts of the adapter {cache.adapter!r}, got the adapter {adapter!r} now: neither "
            "can read the other's states. Activate the first again, or start with a cache of its own."
        )
    if cache.fixed is not None and torch.is_grad_enabled():
        raise NotImplementedError(
            "A static cache is written in place, so no gradient can flow through it. Decode under torch.no_grad(), or score "
            "without a cache."
        )
    cache.adapter = adapter


def _kept(layer: Any, index: int, static: bool) -> Any:
    """What stands for a layer that transformers would make; ``None``: one that is bounded."""
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer and static:
        return StaticSlidingWindowLayer(layer.sliding_window, layer.sliding_window)
    if type(layer) in (DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer):
        return layer
    raise NotImplementedError(
        f"`cache_window` cannot bound a model whose layer {index} keeps a {type(layer).__name__}: full attention gets the "
        "window, sliding and linear attention keep what they keep. Use a model of such layers, or "
        "PTEConfig(cache_window=None)."
    )


def _made(
    indices: Sequence[int], policy: EvictionPolicy, window: int, step: int, shared: SharedSlots | None
) -> dict[int, ThoughtLayer]:
    """Bounded layers.

    Raises:
        NotImplementedError: Heads share a window, and are to stand at fixed addresses.
        ValueError: What heads get is no whole window.
    """
    if policy.uniform:
        return {index: ThoughtLayer(window, policy, index, shared) for index in indices}
    budgets = {index: policy.budgets(index, window, step) for index in indices}
    clocks = {index: HeadClock(given, window, step) for index, given in budgets.items() if given is not None}
    if all(size == window for clock in clocks.values() for size in clock.budgets):
        return {index: ChoosingLayer(window, policy, index, shared) for index in indices}
    if shared is not None:
        raise NotImplementedError(
            f"A static cache has heads of one length, and {type(policy).__name__} gives them different ones. Leave `cache_implementation` unset, "
            'or use eviction="attention".'
        )
    for index in indices:
        given = budgets[index]
        if given is None or sum(given) != len(given) * window or min(given) < step:
            raise ValueError(
                f"{type(policy).__name__}.budgets must give each head of layer {index} at least {step} thoughts, and {window} on average, got "
                f"{given}."
            )
    longest = max(clock.most_held for clock in clocks.values())
    return {index: RaggedLayer(window, policy, index, clock=clocks[index], longest=longest) for index in indices}
