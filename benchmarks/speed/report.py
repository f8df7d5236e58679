"""Tables and the plot of times. On a GPU they stand for themselves; on a CPU they are ratios to a peer of the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..common.pages import Section, grouped, origin, table
from ..common.records import FILE, Record, read
from ..operations import report as operations
from .measure import KEY

NOTHING = "Nothing was timed on a GPU yet. `python -m benchmarks run speed` does, in a budget of 500 s."


@dataclass(frozen=True)
class Layout:
    """How the rows of a part become a table."""

    reference: str
    """The peer that times of a CPU are relative to."""
    columns: tuple[str, ...]
    title: str
    """What is shown, with ``{what}`` for the unit, or for what it is relative to."""
    on_gpu: str
    on_cpu: str
    cell: Callable[[Record], str]
    """Of a GPU's row."""


def _milliseconds(share: str) -> Callable[[Record], str]:
    return lambda row: f"{1000 * seconds(row):.2f} ({row[share]:.0%})"


LAYOUTS = {
    "decode": Layout(
        "base_dynamic",
        ("shape", "batch", "length"),
        "**Decoding: time per token, sampling with `generate` ({what}).** Evictions are spread over the tokens they serve.",
        "milliseconds; in brackets the bytes a step must read (weights once, slots in use once) at the bandwidth measured, as a share of it",
        "relative to the base model on its `DynamicCache` in the same run",
        _milliseconds("share_of_floor"),
    ),
    "train": Layout(
        "lora",
        ("kind", "shape", "batch", "completion", "window"),
        "**One training step: time ({what}), peak memory above the weights, and the same with the head on one token.** GRPO loss on log-probs "
        "of TRL's fused head, gradient checkpointing on; `whole step`: TRL's `GRPOTrainer`, rollout included, the optimizer not.",
        "forward and backward of the scored completion; GiB",
        "relative to LoRA in the same run, forward and backward of the scored completion; MiB",
        lambda row: f"{seconds(row):.2f} s",
    ),
    "compress": Layout(
        "encode_reference",
        ("shape", "batch", "window", "evict"),
        "**One eviction in all layers ({what}).**",
        "milliseconds; in brackets the share of the bandwidth measured",
        "relative to `encode`, reference, in the same run",
        _milliseconds("share_of_bandwidth"),
    ),
    "delta": Layout(
        "base_linear",
        ("shape", "linear", "batch", "tokens"),
        "**The adapter of one linear ({what}).**",
        "microseconds of its kernels in a CUDA graph, operands not in cache; in brackets the share of the nearer ceiling",
        "relative to the base linear alone in the same run",
        lambda row: f"{1e6 * seconds(row):.1f} ({row['share_of_ceiling']:.0%})",
    ),
}


def render(records: list[Record], brief: bool = False) -> str:
    """All tables; ``brief``: of decoding and training, without what was left out."""
    parts = [] if any(record["device"] != "cpu" for record in records) else [NOTHING]
    for part in ("decode", "train") if brief else LAYOUTS:
        mine = [record for record in records if record["part"] == part]
        for group in grouped(mine, lambda record: (record["device"], record["source"]["cpu"])).values():
            found = [row for row in group if "not_available" not in row]
            if found:
                parts.append(_table(LAYOUTS[part], found))
            if part == "decode":
                parts.append(_constancy(found))
            if not brief:
                parts.append(_left_out(group))
    return "\n\n".join(part for part in parts if part)


def performance(records: list[Record]) -> str:
    """What docs/performance.md begins with."""
    (section,) = operations.SECTIONS
    counted = operations.render(read(Path(operations.__file__).with_name(FILE), section.key), brief=True)
    return f"{render(records, brief=True)}\n\n{counted}"


def seconds(row: Record) -> float:
    """Of a call, or of a token."""
    return float(row["seconds_per_token"] if "seconds_per_token" in row else row["seconds"]["median"])


def _table(layout: Layout, rows: list[Record]) -> str:
    gpu = rows[0]["device"] != "cpu"
    cases = grouped(rows, lambda row: tuple(row[name] for name in layout.columns))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    body = []
    for case, found in cases.items():
        by_peer = {row["peer"]: row for row in found}
        cells = [_cell(layout, by_peer.get(peer), by_peer.get(layout.reference), gpu) for peer in peers]
        body.append([f"{part:,}" if isinstance(part, int) else part for part in case] + cells)
    title = layout.title.format(what=layout.on_gpu if gpu else layout.on_cpu)
    rates = {(row["ceilings"]["bytes_per_second"], row["ceilings"]["flop_per_second"]) for row in rows} if gpu else ()
    reached = "".join(f" Measured: {b / 1e9:,.0f} GB/s, {f / 1e12:,.0f} TFLOP/s." for b, f in sorted(rates))
    header = [*layout.columns, *(peer.replace("_", " ") for peer in peers)]
    return f"{title}{reached} {origin(rows)}\n\n{table(header, body, left=len(layout.columns))}"


def _cell(layout: Layout, row: Record | None, reference: Record | None, gpu: bool) -> str:
    if row is None:
        return ""
    first = layout.cell(row) if gpu else "" if reference is None else f"{seconds(row) / seconds(reference):.2f}"
    sizes = [row.get(name) for name in ("peak_bytes_above_weights", "peak_bytes_of_backbone")]
    shown = [f"{size / 2**30:.2f}" if gpu else f"{size / 2**20:.1f}" for size in sizes if size]
    return ", ".join([first, *shown])


def _constancy(rows: list[Record]) -> str:
    """Time per token at the longest length over that at the shortest, by peer."""
    body = []
    for (peer, shape, batch), series in grouped(rows, lambda row: (row["peer"], row["shape"], row["batch"])).items():
        times = {row["length"]: seconds(row) for row in series}
        low, high = min(times), max(times)
        if low < high:
            body.append(
                [
                    peer.replace("_", " "),
                    shape,
                    f"{batch:,}",
                    f"{low:,}",
                    f"{high:,}",
                    f"{times[high] / times[low]:.2f}",
                ]
            )
    header = ["peer", "shape", "batch", "from", "to", "time per token grows by"]
    return "Constancy, the window full at both lengths:\n\n" + table(header, body, left=2) if body else ""


def _left_out(rows: list[Record]) -> str:
    """What has no number, and why; cases that share a reason together."""
    missing = grouped((row for row in rows if "not_available" in row), lambda row: (row["peer"], row["not_available"]))
    lines = []
    for (peer, reason), cases in missing.items():
        first = "/".join(str(cases[0][name]) for name in ("shape", "batch", "length", "completion") if name in cases[0])
        lines.append(f"* {peer.replace('_', ' ')} ({len(cases)} cases, the first {first}): {reason}")
    return "Left out:\n\n" + "\n".join(lines) if lines else ""


def draw(folder: Path) -> None:
    """Time and peak memory of one scored completion against its length, of the first shape, by peer; where a GPU took it."""
    rows = [row for row in read(folder / FILE, KEY) if row["part"] == "train" and "ceilings" in row]
    rows = [row for row in rows if row["kind"] != "whole step" and row["device"] != "cpu"]
    if not rows:
        return
    from ..common.plot import figure

    with figure(folder / "training.png", 1, 2, size=(9.6, 3.8)) as (drawing, (left, right)):
        for peer, mine in grouped(
            (row for row in rows if row["shape"] == rows[0]["shape"]), lambda r: r["peer"]
        ).items():
            lengths = [row["completion"] for row in mine]
            left.plot(lengths, [seconds(row) for row in mine], marker="o", label=peer)
            peaks = [row["peak_bytes_above_weights"] / 2**30 for row in mine]
            right.plot(lengths, peaks, marker="o", label=peer)
        for axis, label in ((left, "seconds"), (right, "GiB above the weights")):
            axis.set(xscale="log", yscale="log", xlabel="completion length", ylabel=label)
            axis.legend(frameon=False)
        drawing.suptitle(f"One scored completion, forward and backward: {rows[0]['shape']}, {rows[0]['device']}")


SECTIONS = (
    Section("benchmarks/speed/README.md", "speed", render, key=KEY),
    Section("docs/performance.md", "performance", performance, key=KEY),
)
