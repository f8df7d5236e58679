"""Draws one eviction, and what each thought sees: ``python docs/pictures/eviction.py [FOLDER]`` writes eviction.svg and clock.svg.

Numbers are those of the clock (:mod:`peft_pte.cache.schedule`): a window of 8, of which 2 leave together.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

from peft_pte.cache.schedule import evictions_before, first_visible, slot_of

PROMPT, WINDOW, STEP, THOUGHTS = 4, 8, 2, 20
KEPT, THOUGHT, LEAVING, NEW, STATE = "#c9ced6", "#9ecae1", "#fdae6b", "#74c476", "#bcbddc"
# Text stays text, names of parts do not change from run to run, and nothing depends on the day.
mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "eviction", "font.family": "sans-serif", "font.size": 9})


def box(axes: Any, x: float, y: float, color: str, text: str = "", width: float = 1.0) -> None:
    """One slot."""
    axes.add_patch(Rectangle((x, y), width, 1, facecolor=color, edgecolor="white", linewidth=1.5))
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center")


def row(axes: Any, y: float, slots: list[tuple[str, str]], title: str) -> None:
    """The cache of a layer: its prompt, then the slots of its window."""
    axes.text(-0.3, y + 0.5, title, ha="right", va="center")
    for column in range(PROMPT):
        box(axes, column, y, KEPT, f"p{column}")
    for slot, (color, text) in enumerate(slots):
        box(axes, PROMPT + 0.4 + slot, y, color, text)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], text: str, **where: str) -> None:
    """From here to there."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#555555"})
    axes.text((start[0] + end[0]) / 2 + 0.2, (start[1] + end[1]) / 2 + 0.1, text, color="#555555", **where)


def draw_eviction() -> Any:
    """The thought ``W`` is to be written to a full window."""
    figure, axes = plt.subplots(figsize=(9.2, 4.1))
    axes.set(xlim=(-3.4, 20.6), ylim=(-0.4, 9.9))
    axes.axis("off")
    gone = range(first_visible(WINDOW - 1, WINDOW, STEP), first_visible(WINDOW, WINDOW, STEP))
    full = [(LEAVING if thought in gone else THOUGHT, f"t{thought}") for thought in range(WINDOW)]
    after = [
        ("white" if thought in gone else THOUGHT, "" if thought in gone else f"t{thought}") for thought in range(WINDOW)
    ]
    after[slot_of(WINDOW, WINDOW)] = (NEW, f"t{WINDOW}")
    row(axes, 7.6, full, "before")
    row(axes, 0.6, after, "after")
    axes.text(PROMPT / 2, 9.1, "prompt: stays", ha="center")
    axes.text(PROMPT + 0.4 + WINDOW / 2, 9.1, f"window: {WINDOW} thoughts", ha="center")
    axes.add_patch(
        FancyBboxPatch((2.9, 4.0), 5.0, 1.5, boxstyle="round,pad=0.12", facecolor="white", edgecolor="#555555")
    )
    axes.text(5.4, 4.75, "encoder of the layer\n" r"$q\,(W_K K_e)^T\ (W_V V_e)$", ha="center", va="center")
    arrow(
        axes,
        (PROMPT + 0.4 + STEP / 2, 7.5),
        (5.4, 5.75),
        f"keys and values of {', '.join(f't{thought}' for thought in gone)}",
        va="center",
    )
    arrow(axes, (8.1, 4.75), (10.5, 4.75), "add, norm", ha="center", va="bottom")
    for line in range(3):
        for column in range(3):
            axes.add_patch(
                Rectangle((10.6 + 0.5 * column, 4.0 + 0.5 * line), 0.5, 0.5, facecolor=STATE, edgecolor="white")
            )
    axes.text(11.35, 5.75, r"state $S$ [Q, R]", ha="center")
    arrow(axes, (12.3, 4.75), (14.3, 4.75), "read", ha="center", va="bottom")
    axes.add_patch(
        FancyBboxPatch((14.5, 4.0), 5.6, 1.5, boxstyle="round,pad=0.12", facecolor="white", edgecolor="#555555")
    )
    axes.text(17.3, 4.75, "every adapted linear\n" r"$y = W x + \mathrm{scale}\;A\,S^T B\,x$", ha="center", va="center")
    box(axes, 14.4, 0.6, NEW, f"t{WINDOW}")
    axes.text(15.6, 1.1, "is written, reads the new state", va="center")
    box(axes, 14.4, 7.6, LEAVING, "t0")
    axes.text(15.6, 8.1, f"the oldest {STEP} leave", va="center")
    return figure


def draw_clock() -> Any:
    """Which thoughts each thought sees, and which state it reads."""
    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    for thought in range(THOUGHTS):
        first = first_visible(thought, WINDOW, STEP)
        axes.add_patch(Rectangle((0, thought), first, 1, facecolor="#eeeeee"))
        for seen in range(first, thought + 1):
            color = NEW if seen == thought else THOUGHT
            axes.add_patch(Rectangle((seen, thought), 1, 1, facecolor=color, edgecolor="white"))
        axes.text(THOUGHTS + 0.6, thought + 0.5, f"S{evictions_before(thought, WINDOW, STEP)}", va="center")
    axes.text(THOUGHTS + 0.6, -0.6, "reads", va="center")
    axes.set(
        xlim=(0, THOUGHTS + 2.4),
        ylim=(THOUGHTS, -1),
        xlabel="thoughts that it sees (grey: have left), beside the whole prompt",
        ylabel="thought",
    )
    axes.set_xticks([0.5 + tick for tick in range(0, THOUGHTS, 4)], range(0, THOUGHTS, 4))
    axes.set_yticks([0.5 + tick for tick in range(0, THOUGHTS, 4)], range(0, THOUGHTS, 4))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def main() -> None:
    """Write both pictures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in (("eviction", draw_eviction), ("clock", draw_clock)):
        draw().savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
