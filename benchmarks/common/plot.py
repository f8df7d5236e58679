"""The frame of every plot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], dpi: int = 130, **layout: Any
) -> Iterator[Any]:
    """A drawing and its axes (one axis, a row, or rows of them) with a light grid; saved to ``path`` at the end of the block."""
    drawing, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **layout)
    yield drawing, axes
    for axis in drawing.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(drawing)
