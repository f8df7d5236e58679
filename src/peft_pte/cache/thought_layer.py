"""`ThoughtLayer`: one bounded layer of the cache, ``P`` prompt slots and then ``W`` slots for thoughts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..method.state import Departing, Evicted
from .eviction import EvictionPolicy
from .slots import KeyValue, SlotBuffer, SlotChunks, SlotTable


class ThoughtLayer(CacheLayerMixin):
    """One full-attention layer: ``P`` prompt slots, then ``W`` slots for thoughts."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int) -> None:
        self.window = window
        self.prompt = 0
        self.seen = 0
        self.functional = False
        self.departing = 0
        self._store: SlotBuffer | SlotChunks | None = None
        self._table: SlotTable | None = None

    # The base class has these as plain attributes, which a store of slots does not.
    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether anything was written."""
        return self._store is not None

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys in use, ``[B, G, slots, head_dim]``."""
        return None if self._store is None else self._store.view().keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values in use, ``[B, G, slots, head_dim]``."""
        return None if self._store is None else self._store.view().values

    @property
    def store(self) -> SlotBuffer | SlotChunks:
        """Where keys and values are.

        Raises:
            RuntimeError: Nothing was written yet.
        """
        if self._store is None:
            raise RuntimeError("This cache layer is empty: nothing was written to it yet.")
        return self._store

    @property
    def table(self) -> SlotTable:
        """Which thoughts are where.

        Raises:
            RuntimeError: The prompt is not known yet.
        """
        if self._table is None:
            raise RuntimeError("This cache layer has no prompt yet: call `PTECache.begin` first.")
        return self._table

    @property
    def has_table(self) -> bool:
        """Whether the prompt is known, so that there is a :attr:`table`."""
        return self._table is not None

    @property
    def slots(self) -> int:
        """Slots in use."""
        return 0 if self._store is None else self._store.length

    @property
    def thoughts(self) -> int:
        """Thoughts in the window."""
        return 0 if self._table is None else self._table.count

    def begin(self, prompt: int, table: SlotTable) -> None:
        """Reserve ``prompt`` slots for the prompt; ``table`` will say what the others hold."""
        self.prompt, self._table = prompt, table
        if isinstance(self._store, SlotBuffer):
            self._store.reserve(self.prompt + self.window)

    def hold(self, table: SlotTable) -> None:
        """From now on ``table`` says which thoughts are where."""
        self._table = table

    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values held, for counting bytes."""
        return () if self._store is None else self._store.tensors()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all ``P + W`` slots for tensors like these (in a functional layer none: they are kept as they come)."""
        like = KeyValue(key_states, value_states)
        self._store = SlotChunks() if self.functional else SlotBuffer(like, self.prompt + self.window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, G, T, head_dim]`` and return all that attention may see.

        Raises:
            RuntimeError: The window cannot take ``T`` more tokens: the model was called past its adapted backbone.
        """
        if self._store is None:
            self.lazy_initialization(key_states, value_states)
        new = KeyValue(key_states, value_states)
        if self.slots - self.departing + new.length > self.prompt + self.window:
            raise RuntimeError(
                f"A PTECache of {self.prompt + self.window} slots got {new.length} tokens beside the {self.slots} it "
                "holds. Call the adapted model itself: it evicts before it writes."
            )
        self.store.append(new)
        self.seen += new.length
        view = self.store.view()
        return view.keys, view.values

    def make_functional(self) -> None:
        """From now on keep tensors as they come and overwrite none, so that gradients flow through them."""
        self.functional = True
        if isinstance(self._store, SlotBuffer):
            self._store = SlotChunks((self._store.view(),))

    def make_in_place(self) -> None:
        """From now on write into slots of fixed size again."""
        self.functional = False
        if isinstance(self._store, SlotChunks):
            held = self._store.view()
            self._store = SlotBuffer(held, self.prompt + self.window)
            self._store.append(held)

    def record(self, positions: Tensor, valid: Tensor | None) -> None:
        """Note which thoughts are about to be written: ``positions [B, T]``, ``valid [B, T]`` or ``None``."""
        self._table = self.table.append(positions, valid)

    def evict(self, policy: EvictionPolicy, step: int, times: int, departing: Departing | None) -> Evicted:
        """Let ``step`` thoughts leave, ``times`` times over; returns all of them, in order.

        What leaves after the first time stays in its slots until :meth:`settle`, for the tokens that may still see it.

        Args:
            policy: What leaves.
            step: ``m``.
            times: Evictions ``N``.
            departing: Which tokens those are, where all heads lose the same ones.

        Raises:
            RuntimeError: ``times`` is more than one where slots are written in place or heads choose for themselves.
        """
        if departing is not None:
            if times > 1 and isinstance(self._store, SlotBuffer):
                raise RuntimeError(
                    "Several evictions at once need a store that grows: slots are written in place here."
                )
            evicted = (
                self.store.evict_oldest(self.prompt, step) if times == 1 else self.store.peek(self.prompt, step * times)
            )
            if times > 1:
                self.store.drop(self.prompt, step)
                self.departing = step * (times - 1)
            return Evicted(*evicted, *departing)
        if times > 1:
            raise RuntimeError("A policy that looks at keys evicts once at a time.")
        keys = self.store.view().keys[:, :, self.prompt :]
        table = self.table.map(lambda part: part.expand(-1, keys.shape[1], -1).to(keys.device))
        leave, stay = policy.select(keys, table.used()[1], step)
        positions, valid, self._table = table.evict_at(leave, stay)
        dropped = self.store.evict_at(self.prompt, leave, stay)
        return Evicted(dropped.keys, dropped.values, positions, valid)

    def settle(self) -> None:
        """Drop what was evicted and kept for the tokens of this chunk."""
        if self.departing:
            self.store.drop(self.prompt, self.departing)
        self.departing = 0

    def fork(self, with_table: bool = True) -> ThoughtLayer:
        """An independent layer with the same content; no tensor is copied, so only one may write to a buffer."""
        other = copy.copy(self)
        if isinstance(self._store, SlotChunks):
            other._store = SlotChunks(self._store.chunks)
        if not with_table:
            other._table = None
        return other

    def take(self, other: ThoughtLayer) -> None:
        """Hold what ``other``, a fork of this layer, was written."""
        self._store, self.seen = other._store, other.seen
        if other._table is not None:
            self._table = other._table

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, to keys and values, in place."""
        if self._store is not None:
            self._store.map(function)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One slot: the masks of bounded layers are made chunk by chunk, and what the host makes for them is not used."""
        return 1, 0

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones and padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.prompt = self.seen = self.departing = 0
        self._store = self._table = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove != 0 and self._store is not None:
            self._store.crop(-tokens_to_remove)
            self.seen += tokens_to_remove
