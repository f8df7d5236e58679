"""The plots: memory as counted, and time and memory of a training step on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

STYLES = {
    "PTE, sliding_window": ("PTE", "C0", "-"),
    "base model": ("base model, full cache", "C3", "-"),
    "pte": ("PTE", "C0", "-"),
    "lora": ("LoRA, full cache", "C3", "-"),
    "pte, key_diff": ("PTE, key_diff", "C0", ":"),
}


def draw(results: dict[str, Any], path: Path, model: str = "Llama") -> None:
    """Cache bytes and training peak of ``model`` against length, side by side."""
    drawing, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    cache = results["cache"]["rows"]
    training = results["training"]["rows"] + results["training_variants"]["rows"]
    _lines(left, [row for row in cache if row["model"] == model], "cache", "thoughts", "bytes")
    _lines(right, [row for row in training if row["model"] == model], "method", "completion", "peak_bytes")
    left.set(title="KV cache while decoding", xlabel="thoughts decoded")
    right.set(title="Peak of one training step, above the weights", xlabel="completion length")
    for axis, rows in ((left, cache), (right, training)):
        axis.axvline(rows[0]["window"], color="0.6", linewidth=1, linestyle="--")
        axis.text(rows[0]["window"], 0.97, " window", color="0.4", va="top", transform=axis.get_xaxis_transform())
        axis.set(ylabel="MiB", ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.2, 1.0))
    drawing.suptitle(f"{model}-shaped model, 8 layers of width 192, float32, measured on a CPU")
    drawing.savefig(path, dpi=130)
    plt.close(drawing)


def _lines(axis: Any, rows: list[dict[str, Any]], line: str, x: str, y: str) -> None:
    for name, (label, colour, stroke) in STYLES.items():
        points = sorted((row[x], row[y] / 2**20) for row in rows if row[line] == name)
        if points:
            axis.plot(*zip(*points, strict=True), stroke, color=colour, label=label, marker="o", markersize=3.5)


def draw_training_time(results: dict[str, Any], path: Path) -> None:
    """Time and peak memory of one scored completion against its length, of the first shape, by peer."""
    rows = [row for row in results["rows"] if row["part"] != "whole step" and "seconds" in row]
    shape = rows[0]["shape"]
    drawing, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for peer in dict.fromkeys(row["peer"] for row in rows):
        mine = [row for row in rows if row["peer"] == peer and row["shape"] == shape]
        series = [(row["completion"], row) for row in sorted(mine, key=lambda row: row["completion"])]
        lengths = [length for length, _ in series]
        left.plot(lengths, [row["seconds"]["median"] for _, row in series], marker="o", label=peer.replace("_", " "))
        peaks = [row["peak_bytes_above_weights"] / 2**30 for _, row in series]
        right.plot(lengths, peaks, marker="o", label=peer.replace("_", " "))
    for axis, label in ((left, "seconds"), (right, "GiB above the weights")):
        axis.set(xscale="log", yscale="log", xlabel="completion length", ylabel=label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    drawing.suptitle(f"One scored completion, forward and backward: {shape}, {results['source']['gpu']}")
    drawing.savefig(path, dpi=130)
    plt.close(drawing)
