"""What a step and a token cost beside LoRA, beside their targets."""

from __future__ import annotations

from ..common.pages import Section, grouped, origin, table
from ..common.records import Record
from .measure import KEY

FIGURES = {
    "launches": "launches",
    "calls": "calls of a layer, no gradients",
    "seconds": "CPU time",
    "peak": "peak",
    "counted_peak": "peak, counted",
}
PASSES = {"quarter_window": "window / 4", "half_window": "window / 2", "one_window": "one window"}
PEERS = {"base": "base model", "lora": "LoRA", "pte": "PTE", "pte_static": "PTE, static cache, not compiled"}


def step(records: list[Record]) -> str:
    """A line per figure, a column per length of passes."""
    peers = [peer for peer in dict.fromkeys(row["peer"] for row in records) if peer != "lora"]
    cases = grouped(records, lambda row: tuple(row[name] for name in KEY if name != "peer"))
    body = []
    for rows in cases.values():
        first, by_peer = rows[0], {row["peer"]: row for row in rows}
        name = FIGURES[first["figure"]] + (", per window" if first["per_window"] else "")
        where = first["shape"] or f"width {first['width']}, {first['layers']} layers, batch {first['batch']}"
        cells = [
            _beside(by_peer[peer]["of_lora"], by_peer[peer]["at_most"]) if peer in by_peer else "" for peer in peers
        ]
        body.append([name, where, f"{first['thoughts']:,}", f"{first['window']:,}", *cells])
    header = ["what", "model", "thoughts", "window", *(PASSES.get(peer, peer.replace("_", " ")) for peer in peers)]
    return (
        "**What a step costs beside LoRA on the same linears, by the length of its passes (relative to LoRA; in brackets the "
        "target).** Forward and backward of a scoring call in one run, gradient checkpointing on. Launches: operations that are "
        "not views, with the reference implementation of the kernels. Time: of the process, the best of several, peers in turn. "
        "Peak: tensor storages alive above the model, offloaded ones left out; at a true shape counted on fake tensors in "
        "bfloat16, without the head. `one pass`: `segment_length` beyond the row; `window / 4` and so on: `segment_length` as a "
        f"share of the window; `offload`: `offload=True`. {origin(records)}\n\n" + table(header, body, left=2)
    )


def token(records: list[Record]) -> str:
    """A line per batch and peer; then tokens per second of a whole model."""
    counted = [row for row in records if "launches" in row]
    lora = {row["batch"]: row for row in counted if row["peer"] == "lora"}
    body = []
    for row in counted:
        limits, beside = row["at_most"] or {}, lora[row["batch"]]
        launches = _beside(row["launches"] / beside["launches"], limits.get("launches"))
        time = _beside(row["seconds_per_token"] / beside["seconds_per_token"], limits.get("seconds"))
        calls = f"{row['own_calls']:.0f}" + (f" (≤ {limits['own_calls']:g})" if limits else "")
        milliseconds = f"{1e3 * row['seconds_per_token']:.2f}"
        body.append(
            [f"{row['batch']}", PEERS[row["peer"]], f"{row['launches']:.0f}", launches, milliseconds, time, calls]
        )
    first, whole = counted[0], [row for row in records if "tokens_per_second" in row]
    header = ["batch", "", "launches", "of LoRA", "CPU time, ms", "of LoRA", "own Python calls"]
    text = (
        f"**What a token costs while decoding (in brackets the target).** {first['layers']} layers of {first['shape']}, rank "
        f"{first['rank']}, prompt {first['prompt']}, window {first['window']}, eager, through `generate`; evictions are in it. Launches: "
        "operations that are not views. Time: of the process, the best of several, peers in turn. Own calls: of Python functions of "
        f"`peft_pte`. {origin(records)}\n\n" + table(header, body, left=2)
    )
    if not whole:
        return text
    rates = [[f"{row['batch']}", PEERS[row["peer"]], f"{row['tokens_per_second']:.1f}"] for row in whole]
    return (
        f"{text}\n\nTokens per second of all rows together, {whole[0]['shape']} in float32 on {whole[0]['threads']} cores, same run and "
        "settings:\n\n" + table(["batch", "", "tokens per second"], rates, left=2)
    )


def render(records: list[Record]) -> str:
    """The tables of the parts that were measured."""
    parts = grouped(records, lambda row: row["part"])
    return "\n\n".join(make(parts[name]) for name, make in (("step", step), ("token", token)) if name in parts)


def _beside(ratio: float, target: float | None) -> str:
    return f"{ratio:.2f}" + ("" if target is None else f" (≤ {target:g})")


SECTIONS = (Section("benchmarks/overhead/README.md", "overhead", render, key=KEY),)
