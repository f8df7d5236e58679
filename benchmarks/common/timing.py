"""One way to take times: warm up, repeat, and say the median and the middle half."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Seconds over repeats."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of ``seconds``.

        Raises:
            ValueError: There are none.
        """
        if not seconds:
            raise ValueError("`seconds` must hold at least one repeat, got none. Give the case a larger budget.")
        low, median, high = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [seconds[0]]
        )
        return cls(median, low, high, len(seconds))

    def row(self) -> dict[str, Any]:
        """As it stands in a record."""
        return asdict(self)


class Budget:
    """Wall-clock seconds that a case may take. What does not fit is left out and said so."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative once it is used up."""
        return self._end - time.monotonic()

    def refuses(self, expected: float = 0.0) -> str | None:
        """Why ``expected`` more seconds do not fit, or ``None``."""
        if self.left > expected:
            return None
        need = f", about {expected:.0f} s needed" if expected else ""
        return f"skipped: {max(self.left, 0):.0f} s left of a budget of {self.seconds:.0f} s{need}"


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    function: Callable[[], Any],
    device: torch.device,
    *,
    repeats: int = 10,
    warmup: int = 2,
    budget: Budget | None = None,
) -> Spread:
    """Seconds of ``function``; fewer repeats, but one at least, once ``budget`` is used up."""
    return compare({"it": function}, device, repeats=repeats, warmup=warmup, budget=budget)["it"]


def compare(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int = 10,
    warmup: int = 2,
    budget: Budget | None = None,
) -> dict[str, Spread]:
    """Seconds of each of ``functions``, taken in turns, so that a busy minute of the machine falls on all of them.

    CUDA events on a GPU, `time.perf_counter` on a CPU.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(_once(function, device))
        if budget is not None and budget.left < 0:
            break
    return {name: Spread.of(found) for name, found in seconds.items()}


def _once(function: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``function`` as a CUDA graph, so that its kernels are timed and not their launches; itself on a CPU."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What ``device`` reaches here and now: bytes/s of a large copy (read and write counted), FLOP/s of a large matmul.

    Sizes: 1 GiB and 8192 on a GPU, 128 MiB and 1024 on a CPU.
    """
    gpu = device.type == "cuda"
    nbytes, width = (2**30, 8192) if gpu else (2**27, 1024)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)
    left = torch.randn(width, width, device=device, dtype=dtype)
    product = torch.empty_like(left)
    matmul = measure(lambda: torch.mm(left, left, out=product), device)
    return {"bytes_per_second": 2 * nbytes / copy.median, "flop_per_second": 2 * width**3 / matmul.median}
