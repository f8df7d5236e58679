"""`ThoughtLayer`: one bounded layer of the cache, ``P`` prompt slots and then ``W`` slots for thoughts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .eviction import EvictionPolicy
from .slots import KeyValue, SlotBuffer, SlotChunks, SlotTable
from .state import Evicted


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
        self.differentiable = False
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

    def hold(self, table: SlotTable) -> None:
        """From now on ``table`` says which thoughts are where."""
        self._table = table

    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values held, for counting bytes."""
        return () if self._store is None else self._store.tensors()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all ``P + W`` slots for tensors like these (with gradients: none, they are kept as they come)."""
        like = KeyValue(key_states, value_states)
        self._store = SlotChunks() if self.differentiable else SlotBuffer(like, self.prompt + self.window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, G, T, head_dim]`` and return all that attention may see.

        Raises:
            RuntimeError: The window cannot take ``T`` more tokens: the model was called past its adapted backbone.
        """
        if self._store is None:
            self.lazy_initialization(key_states, value_states)
        new = KeyValue(key_states, value_states)
        if self.slots + new.length > self.prompt + self.window:
            raise RuntimeError(
                f"A PTECache of {self.prompt + self.window} slots got {new.length} tokens beside the {self.slots} it "
                "holds. Call the adapted model itself: it evicts before it writes."
            )
        self.store.append(new)
        self.seen += new.length
        view = self.store.view()
        return view.keys, view.values

    def make_differentiable(self) -> None:
        """From now on keep tensors as they come, so that gradients flow through them."""
        self.differentiable = True
        if isinstance(self._store, SlotBuffer):
            self._store = SlotChunks((self._store.view(),))

    def evict(self, policy: EvictionPolicy, evict: int) -> Evicted:
        """Let ``evict`` thoughts leave, as ``policy`` says."""
        if policy.uniform:
            positions, valid, self._table = self.table.evict_oldest(evict)
            dropped = self.store.evict_oldest(self.prompt, evict)
            return Evicted(dropped.keys, dropped.values, positions, valid)
        keys = self.store.view().keys[:, :, self.prompt :]
        table = self.table.map(lambda part: part.expand(-1, keys.shape[1], -1).to(keys.device))
        leave, stay = policy.select(keys, table.used()[1], evict)
        positions, valid, self._table = table.evict_at(leave, stay)
        dropped = self.store.evict_at(self.prompt, leave, stay)
        return Evicted(dropped.keys, dropped.values, positions, valid)

    def fork(self) -> ThoughtLayer:
        """An independent layer with the same content; no tensor is copied, so only one may write to a buffer."""
        other = copy.copy(self)
        if isinstance(self._store, SlotChunks):
            other._store = SlotChunks(self._store.chunks)
        return other

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function``, which acts on the batch axis or on the device, to keys and values, in place."""
        if self._store is not None:
            self._store.map(function)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in use after ``query_length`` more, and the first of them, 0."""
        return self.slots + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones and padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.prompt = self.seen = 0
        self._store = self._table = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove != 0 and self._store is not None:
            self._store.crop(-tokens_to_remove)
            self.seen += tokens_to_remove
