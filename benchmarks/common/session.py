"""One run of a question: its device, its options, what is known already, and the rows that a peer gives."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .models import SHAPES
from .records import Record, Results
from .timing import Budget

Row = dict[str, Any]


@dataclass
class Session:
    """What a question is measured with."""

    device: torch.device
    dtype: torch.dtype
    options: argparse.Namespace
    results: Results
    budget: Budget
    ceilings: dict[str, float] = field(default_factory=dict)
    """``bytes_per_second`` and ``flop_per_second`` of this device, where they were measured in this run."""
    shapes: tuple[str, ...] = ()
    """Of the models, by name; empty: those of the question."""

    @property
    def gpu(self) -> bool:
        """Whether this runs on a GPU."""
        return self.device.type == "cuda"

    @property
    def quick(self) -> bool:
        """Whether the small form was asked for."""
        return bool(self.options.quick)

    def wants(self, peer: str) -> bool:
        """Whether ``peer`` was asked for."""
        return self.options.peers is None or peer in self.options.peers

    def wants_part(self, part: str) -> bool:
        """Whether ``part`` of the question was asked for."""
        return self.options.part is None or part in self.options.part

    def has(self, part: str, case: Any, peer: str) -> bool:
        """Whether the row of ``peer`` in ``case`` is known."""
        return self.results.has(self.where(part, case, peer))

    def missing(self, part: str, case: Any, peers: Iterable[str]) -> list[str]:
        """Those of ``peers`` that were asked for and are not known in ``case``."""
        return [peer for peer in peers if self.wants(peer) and not self.has(part, case, peer)]

    def where(self, part: str, case: Any, peer: str) -> Record:
        """The fields that tell a row from others."""
        gpu = torch.cuda.get_device_name(self.device) if self.gpu else None
        return {"part": part, **asdict(case), "peer": peer, "device": gpu or "cpu"}

    def attempt(self, part: str, case: Any, peer: str, measure: Callable[[], Row], expected: float = 0.0) -> Record:
        """The row of ``peer`` in ``case``: what ``measure`` found, or in ``not_available`` why there is nothing.

        What a peer refuses (`NotImplementedError`), lacks (`ImportError`) or has no memory for is a result. Anything else
        is a fault of the benchmark and is raised.
        """
        refused = self.budget.refuses(expected)
        if refused is not None:
            return self.skipped(part, case, peer, refused)
        try:
            found = measure()
            return {**self.where(part, case, peer), **found, **({"ceilings": self.ceilings} if self.ceilings else {})}
        except (NotImplementedError, ImportError) as error:
            message = f"{type(error).__name__}: {error}"
        except torch.OutOfMemoryError as error:
            message = f"out of memory: {str(error).split('. ')[0]}"
        # Outside the handlers, whose tracebacks would keep the tensors alive.
        release(self.device)
        return self.skipped(part, case, peer, message)

    def skipped(self, part: str, case: Any, peer: str, reason: str) -> Record:
        """The row of a peer that was not tried."""
        return {**self.where(part, case, peer), "not_available": reason}


def release(device: torch.device) -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_bytes(device: torch.device) -> int | None:
    """Memory of the GPU; ``None`` on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def add_options(
    parser: argparse.ArgumentParser, *names: str, parts: Sequence[str] = (), peers: Sequence[str] = ()
) -> None:
    """Options that several questions have: ``part``, ``shapes``, ``peers``."""
    known = {
        "part": {"choices": parts, "help": "only these parts of the question"},
        "shapes": {"choices": SHAPES, "help": "of the models"},
        "peers": {"choices": peers or None, "help": "only these peers"},
    }
    for name in names:
        parser.add_argument(f"--{name}", nargs="+", **known[name])
