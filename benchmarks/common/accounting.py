"""Bytes, counted where they are allocated: what a cache holds, and the most that a block of code holds at once."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(holder: Any) -> int:
    """Bytes of the storages behind every tensor that ``holder`` (a cache) refers to: slack behind views counts too."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith(("peft_pte", "transformers.cache_utils")) and id(value) not in seen:
            seen.add(id(value))
            visit(vars(value))

    visit(holder)
    return sum(storages.values())


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensor storages alive at once, above what was alive before.

    Every operation, of the backward pass too, comes through a dispatch mode; each storage it makes is counted until its
    finalizer runs. Scratch memory that a kernel takes and gives back by itself is not seen: :func:`allocator_peak` sees
    it, and the two are set side by side in the results.
    """

    def __init__(self, itemise: bool = False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.itemise = itemise
        self.at_peak: Counter[str] = Counter()
        """With ``itemise``: bytes alive at the peak by operation and shape of the tensor it made."""
        self.phases: dict[Any, int] = {}
        """The most bytes alive in each phase that was begun."""
        self._phase: Any = None
        self._known: dict[int, tuple[str, int]] = {}

    def begin(self, phase: Any) -> None:
        """End the phase before, and begin ``phase``."""
        self._phase = phase
        self.phases[phase] = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            # What an operation reads and none was seen to make was there before: the weights.
            self._see(value, func, counts=False)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            self._see(value, func, counts=True)
        return result

    def _see(self, value: Any, func: Any, counts: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes() if counts else 0
        self._known[key] = (f"{func} {tuple(value.shape)}", nbytes)
        weakref.finalize(storage, self._forget, key).atexit = False
        self.live += nbytes
        if self._phase is not None:
            self.phases[self._phase] = max(self.phases[self._phase], self.live)
        if self.live > self.peak:
            self.peak = self.live
            if self.itemise:
                self.at_peak = Counter()
                for label, size in self._known.values():
                    self.at_peak[label] += size

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor`` no longer: it stands for memory elsewhere."""
        key = tensor.untyped_storage()._cdata
        label, nbytes = self._known[key]
        self.live -= nbytes
        self._known[key] = (label, 0)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


class Launches(TorchDispatchMode):
    """Counts operations that are not views: on a GPU each is at least one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func._schema.name.partition("::")[2] not in _VIEWS
        return func(*args, **(kwargs or {}))


_VIEWS = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "expand",
    "lift_fresh",
    "new_empty",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


def allocator_peak(function: Callable[[], Any]) -> int:
    """The most bytes that the allocator had given out at once while ``function`` ran, above what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    live = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
