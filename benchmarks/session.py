"""What every case is given, and the two kinds of row it answers with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .timing import Budget

Row = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """One run of one case."""

    device: torch.device
    dtype: torch.dtype
    quick: bool
    budget: Budget
    ceilings: dict[str, float]
    """``bytes_per_second`` and ``flop_per_second`` of this device, measured in this run."""
    shapes: tuple[str, ...]
    peers: tuple[str, ...] | None = None
    """Peers that were asked for; ``None``: all."""

    @property
    def gpu(self) -> bool:
        """Whether this runs on a GPU."""
        return self.device.type == "cuda"

    def wants(self, peer: str) -> bool:
        """Whether ``peer`` was asked for."""
        return self.peers is None or peer in self.peers


def attempt(case: Any, peer: str, measure: Callable[[], Row], session: Session, expected: float = 0.0) -> Row:
    """The row of ``peer`` in ``case``: what ``measure`` found, or in ``not_available`` why there is nothing.

    What a peer refuses (`NotImplementedError`), lacks (`ImportError`) or has no memory for is a result. Anything else
    is a fault of the benchmark and is raised.
    """
    row = {**asdict(case), "peer": peer}
    refused = session.budget.refuses(expected)
    if refused is not None:
        return {**row, "not_available": refused}
    try:
        return {**row, **measure()}
    except (NotImplementedError, ImportError) as error:
        return {**row, "not_available": f"{type(error).__name__}: {error}"}
    except torch.OutOfMemoryError as error:
        message = str(error).split(". ")[0]
    # Outside the handler, whose traceback would keep the tensors alive.
    release(session.device)
    return {**row, "not_available": f"out of memory: {message}"}


def skipped(case: Any, peer: str, reason: str) -> Row:
    """The row of a peer that was not tried."""
    return {**asdict(case), "peer": peer, "not_available": reason}


def release(device: torch.device) -> None:
    """Give memory back that nothing refers to."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_bytes(device: torch.device) -> int | None:
    """Memory of the GPU; ``None`` on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


Rows = Iterator[Row]
