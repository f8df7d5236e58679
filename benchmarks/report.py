"""Tables and plots from the results: ``python -m benchmarks report [--results FOLDER ...] [--stdout]``.

Everything goes between the markers of benchmarks/README.md, what a reader needs first between those of docs/performance.md, settings of a
training step between those of docs/memory.md, what the paper's protocol takes between those of examples/paper/README.md. Results
of several folders, and of one case run in pieces (`--peers kvpress` in an environment of its own), are put together where
their devices are the same. What a CPU timed is given as ratios within its run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import protocol, tables
from .machine import RESULTS, ROOT
from .plot import draw_training_time

Row = dict[str, Any]
REFERENCE = {
    "decode": "base_dynamic",
    "compress": "encode_reference",
    "delta": "base_linear",
    "train": "lora",
    "flops": "lora",
}
"""What times are relative to where they stand for themselves alone: on a CPU."""
FLOPS_PARTS = ("prefill", "decode", "old_policy", "scoring", "backward")


def load(folders: Iterable[Path]) -> list[Row]:
    """The results in ``folders``, oldest first; files of another kind (the figures) are left alone."""
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            content = json.loads(path.read_text())
            if "schema" in content:
                found.append(content)
    return sorted(found, key=lambda content: content["source"]["date"])


def render(results: list[Row], brief: bool = False) -> str:
    """All tables as markdown; ``brief``: without the operations by themselves and without what was left out."""
    parts = []
    timed = {
        "decode": _decode,
        "train": _train,
        **({} if brief else {"compress": _compress, "delta": _delta}),
    }
    for case, make in timed.items():
        for group in _by_device([content for content in results if content["case"] == case]):
            parts += [make(group), *([] if brief else [_left_out(group)])]
    counts = [content for content in results if content["case"] == "flops"]
    if counts:
        parts.append(_flops(counts[-1], brief))
    counts = [content for content in results if content["case"] == "cost"]
    if counts and not brief:
        parts.append(_cost(counts[-1]))
    counts = [content for content in results if content["case"] == "token"]
    if counts and not brief:
        parts.append(_token(counts[-1]))
    if not any(content["case"] in timed and content["device"] == "cuda" for content in results):
        parts.insert(0, "Nothing was timed on a GPU yet. `python -m benchmarks run all` does, on a budget of 500 s.")
    return "\n\n".join(part for part in parts if part)


def _by_device(files: list[Row]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for content in files:
        source = content["source"]
        hardware = source["gpu"] if content["device"] == "cuda" else source["cpu"]
        groups.setdefault((content["device"], hardware, content["quick"]), []).append(content)
    return list(groups.values())


def _origin(group: list[Row]) -> str:
    """Where a table comes from: one sentence per file."""
    lines = []
    for content in group:
        source = content["source"]
        limits = content["ceilings"]
        hardware = source["gpu"] if content["device"] == "cuda" else f"{source['cpu']}, {source['cores']} cores"
        commit = (source["commit"] or "unknown")[:12] + (" with uncommitted changes" if source["dirty"] else "")
        measured = ""
        if limits and content["device"] == "cuda":
            rates = f"{limits['bytes_per_second'] / 1e9:,.0f} GB/s and {limits['flop_per_second'] / 1e12:,.0f} TFLOP/s"
            measured = f"; ceilings measured in this run: {rates}"
        versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
        lines.append(
            f"`{source['command']}`, {source['date'][:10]}, {hardware}, {content['dtype']}, commit {commit}{measured}; "
            f"{versions}."
        )
    return " ".join(lines)


def _key(row: Row) -> tuple[tuple[str, Any], ...]:
    """What names the case of a row: everything before its peer."""
    names = list(row)
    return tuple((name, row[name]) for name in names[: names.index("peer")])


def _cells(
    group: list[Row], cell: Callable[[Row, Row | None, bool], str]
) -> tuple[dict[Any, dict[str, str]], list[str]]:
    """Cells by case and peer, each made from its row and the reference's row of the same file, and the peers."""
    found: dict[Any, dict[str, str]] = {}
    peers: list[str] = []
    for content in group:
        by_case: dict[Any, dict[str, Row]] = {}
        for row in content["rows"]:
            by_case.setdefault(_key(row), {})[row["peer"]] = row
        for key, rows in by_case.items():
            reference = rows.get(REFERENCE[content["case"]])
            reference = None if reference is None or "not_available" in reference else reference
            for peer, row in rows.items():
                if "not_available" in row:
                    found.setdefault(key, {})
                    continue
                found.setdefault(key, {})[peer] = cell(row, reference, content["device"] == "cuda")
                peers += [] if peer in peers else [peer]
    return found, peers


def _pivot(group: list[Row], columns: list[str], cell: Callable[[Row, Row | None, bool], str]) -> str:
    cells, peers = _cells(group, cell)
    body = [
        [*(f"{dict(key)[name]:,}" if isinstance(dict(key)[name], int) else str(dict(key)[name]) for name in columns)]
        + [by_peer.get(peer, "") for peer in peers]
        for key, by_peer in cells.items()
    ]
    return tables.table([*columns, *(peer.replace("_", " ") for peer in peers)], body, left=len(columns))


def _ratio(value: float, row: Row | None, of: Callable[[Row], float]) -> str:
    return "" if row is None else f"{value / of(row):.2f}"


def _decode(group: list[Row]) -> str:
    def cell(row: Row, reference: Row | None, gpu: bool) -> str:
        seconds = row["seconds_per_token"]
        if gpu:
            return f"{1000 * seconds:.2f} ({row['share_of_floor']:.0%})"
        return _ratio(seconds, reference, lambda other: other["seconds_per_token"])

    gpu = group[0]["device"] == "cuda"
    first = group[0]["rows"][0]
    what = (
        "milliseconds; in brackets the bytes a step must read (weights once, slots in use once) at the bandwidth measured, "
        "as a share of it"
        if gpu
        else "relative to the base model on its `DynamicCache` in the same run"
    )
    text = (
        f"**Decoding: time per token, sampling with `generate` ({what}).** Prompt {first['prompt']:,}, window "
        f"{first['window']:,}, {first['evict_ratio']:.0%} of it leave together, rank {first['rank']}; evictions spread over "
        f"the tokens they serve. {_origin(group)}\n\n"
    )
    return text + _pivot(group, ["shape", "batch", "length"], cell) + _constancy(group)


def _constancy(group: list[Row]) -> str:
    """Time per token at the longest length over that at the shortest, by peer."""
    times: dict[tuple[Any, ...], dict[int, float]] = {}
    for content in group:
        for row in content["rows"]:
            if "seconds_per_token" in row:
                series = times.setdefault((row["peer"], row["shape"], row["batch"]), {})
                series[row["length"]] = row["seconds_per_token"]
    body = []
    for (peer, shape, batch), series in times.items():
        if len(series) > 1:
            shortest, longest = min(series), max(series)
            growth = series[longest] / series[shortest]
            body.append([peer.replace("_", " "), shape, f"{batch:,}", f"{shortest:,}", f"{longest:,}", f"{growth:.2f}"])
    if not body:
        return ""
    header = ["peer", "shape", "batch", "from", "to", "time per token grows by"]
    return "\n\nConstancy, the window full at both lengths:\n\n" + tables.table(header, body, left=2)


def _train(group: list[Row]) -> str:
    gpu = group[0]["device"] == "cuda"

    def cell(row: Row, reference: Row | None, gpu: bool) -> str:
        seconds = row["seconds"]["median"]
        time = f"{seconds:.2f} s" if gpu else _ratio(seconds, reference, lambda other: other["seconds"]["median"])
        sizes = [row.get(name) for name in ("peak_bytes_above_weights", "peak_bytes_of_backbone")]
        return ", ".join([time, *(_size(size, gpu) for size in sizes if size)])

    first = group[0]["rows"][0]
    what = "" if gpu else "relative to LoRA in the same run, "
    text = (
        f"**One training step: time ({what}forward and backward of the scored completion), peak memory above the weights, and "
        f"the same with the head on one token ({'GiB' if gpu else 'MiB'}).** GRPO loss on log-probs of TRL's fused head, "
        f"gradient checkpointing on; `whole step`: TRL's `GRPOTrainer`, rollout and optimizer included. Rank "
        f"{first['rank']} in the whole step. {_origin(group)}\n\n"
    )
    return text + _pivot(group, ["part", "shape", "batch", "completion", "window"], cell)


def _size(nbytes: int, gpu: bool) -> str:
    return f"{nbytes / 2**30:.2f}" if gpu else f"{nbytes / 2**20:.1f}"


def _compress(group: list[Row]) -> str:
    def cell(row: Row, reference: Row | None, gpu: bool) -> str:
        seconds = row["seconds"]["median"]
        if gpu:
            return f"{1000 * seconds:.2f} ({row['share_of_bandwidth']:.0%})"
        return _ratio(seconds, reference, lambda other: other["seconds"]["median"])

    gpu = group[0]["device"] == "cuda"
    what = (
        "milliseconds; in brackets the share of the bandwidth measured"
        if gpu
        else "relative to `encode`, reference, in the same run"
    )
    text = f"**One eviction in all layers ({what}).** {_origin(group)}\n\n"
    return text + _pivot(group, ["shape", "batch", "window", "evict"], cell)


def _delta(group: list[Row]) -> str:
    def cell(row: Row, reference: Row | None, gpu: bool) -> str:
        seconds = row["seconds"]["median"]
        if gpu:
            return f"{1e6 * seconds:.1f} ({row['share_of_ceiling']:.0%})"
        return _ratio(seconds, reference, lambda other: other["seconds"]["median"])

    gpu = group[0]["device"] == "cuda"
    what = (
        "microseconds of its kernels in a CUDA graph, operands not in cache; in brackets the share of the nearer ceiling"
        if gpu
        else "relative to the base linear alone in the same run"
    )
    text = f"**The adapter of one linear ({what}).** {_origin(group)}\n\n"
    return text + _pivot(group, ["shape", "linear", "batch", "tokens"], cell)


def _left_out(group: list[Row]) -> str:
    """What has no number, and why; cases that share a reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for content in group:
        for row in content["rows"]:
            if "not_available" in row:
                names = [str(row[name]) for name in ("shape", "batch", "length", "completion") if name in row]
                reasons.setdefault((row["peer"], row["not_available"]), []).append("/".join(names))
    if not reasons:
        return ""
    lines = [
        f"* {peer.replace('_', ' ')} ({len(cases)} cases, the first {cases[0]}): {reason}"
        for (peer, reason), cases in reasons.items()
    ]
    return "Left out:\n\n" + "\n".join(lines)


def _flops(content: Row, brief: bool) -> str:
    rows = content["rows"]
    first = rows[0]
    totals = {(row["shape"], row["peer"]): row for row in rows}
    body = []
    for row in rows:
        full = totals[row["shape"], "lora"]
        parts = [] if brief else [f"{row['parts'][part]['visible'] / 1e12:.1f}" for part in FLOPS_PARTS]
        values = [row["visible_total"], row["dense_total"]]
        shares = [row["visible_total"] / full["visible_total"], row["dense_total"] / full["dense_total"]]
        body.append(
            [
                row["shape"],
                _METHODS[row["peer"]],
                *parts,
                *(f"{value / 1e12:.1f}" for value in values),
                *(f"{share:.3f}" for share in shares),
            ]
        )
    header = ["shape", "method", *([] if brief else (part.replace("_", " ") for part in FLOPS_PARTS))]
    header += ["all, visible pairs", "all, dense", "of LoRA, visible", "of LoRA, dense"]
    return (
        "**Operations of one GRPO step per sequence, TFLOP (counted, not timed).** Prompt "
        f"{first['prompt']}, completion {first['completion']:,}, window {first['window']:,}, {first['window'] // 4} leave "
        f"together, rank {first['rank']}, layers or segments recomputed; rollout, forward of the old policy, scoring forward, "
        "backward with recomputation. `dense` counts attention over all pairs of a call, `visible` those that the causal mask "
        "lets through. The paper reports 7.4 TFLOPs for LoRA and 4.6 for its method, a ratio of 0.62, and does not say per "
        f"what. {_origin([content])}\n\n" + tables.table(header, body, left=2)
    )


def _cost(content: Row) -> str:
    figures: dict[Any, dict[str, Row]] = {}
    for row in content["rows"]:
        figures.setdefault(_key(row), {})[row["peer"]] = row
    peers = [peer for peer in dict.fromkeys(row["peer"] for row in content["rows"]) if peer != "lora"]
    body = []
    for rows in figures.values():
        first = next(iter(rows.values()))
        name = _COST[first["figure"]] + (", per window" if first["per_window"] else "")
        where = first["shape"] or f"width {first['width']}, {first['layers']} layers, batch {first['batch']}"
        cells = [
            f"{rows[peer]['of_lora']:.2f}" + (f" (≤ {limit:g})" if (limit := rows[peer]["at_most"]) is not None else "")
            if peer in rows
            else ""
            for peer in peers
        ]
        body.append([name, where, f"{first['thoughts']:,}", f"{first['window']:,}", *cells])
    header = ["what", "model", "thoughts", "window", *(_COST_PEERS.get(peer, peer.replace("_", " ")) for peer in peers)]
    return (
        "**What a step costs beside LoRA on the same linears, by the length of its passes (relative to LoRA; in brackets the "
        "target).** Forward and backward of a scoring call in one run, gradient checkpointing on. Launches: operations that are "
        "not views, with the reference implementation of the kernels. Time: of the process, the best of several, peers in turn. "
        "Peak: tensor storages alive above the model, offloaded ones left out; at a true shape counted on fake tensors in "
        "bfloat16, without the head. `one pass`: `segment_length` beyond the row; `window / 4` and so on: `segment_length` as a "
        f"share of the window; `offload`: `offload=True`. {_origin([content])}\n\n" + tables.table(header, body, left=2)
    )


def _token(content: Row) -> str:
    counted = [row for row in content["rows"] if "launches" in row]
    lora = {row["batch"]: row for row in counted if row["peer"] == "lora"}
    names = {"base": "base model", "lora": "LoRA", "pte": "PTE", "pte_static": "PTE, static cache, not compiled"}
    body = []
    for row in counted:
        limits, beside = row["at_most"] or {}, lora[row["batch"]]
        ratios = {
            "launches": row["launches"] / beside["launches"],
            "seconds": row["seconds_per_token"] / beside["seconds_per_token"],
        }
        shown = {name: f"{ratio:.2f}" + (f" (≤ {limits[name]:g})" if limits else "") for name, ratio in ratios.items()}
        calls = f"{row['own_calls']:.0f}" + (f" (≤ {limits['own_calls']:g})" if limits else "")
        milliseconds = f"{1e3 * row['seconds_per_token']:.2f}"
        body.append(
            [
                f"{row['batch']}",
                names[row["peer"]],
                f"{row['launches']:.0f}",
                shown["launches"],
                milliseconds,
                shown["seconds"],
                calls,
            ]
        )
    first = counted[0]
    whole = [row for row in content["rows"] if "tokens_per_second" in row]
    speed = ""
    if whole:
        rates = [[f"{row['batch']}", names[row["peer"]], f"{row['tokens_per_second']:.1f}"] for row in whole]
        speed = (
            f"\n\nTokens per second of all rows together, {whole[0]['shape']} in float32 on {whole[0]['threads']} cores, same run and settings:\n\n"
            + tables.table(["batch", "", "tokens per second"], rates, left=2)
        )
    header = ["batch", "", "launches", "of LoRA", "CPU time, ms", "of LoRA", "own Python calls"]
    return (
        f"**What a token costs while decoding (in brackets the target).** {first['layers']} layers of {first['shape']}, rank "
        f"{first['rank']}, prompt {first['prompt']}, window {first['window']}, eager, through `generate`; evictions are in it. Launches: "
        "operations that are not views. Time: of the process, the best of several, peers in turn. Own calls: of Python functions of "
        f"`peft_pte`. {_origin([content])}\n\n" + tables.table(header, body, left=2) + speed
    )


def settings(results: list[Row]) -> str:
    """The table of docs/memory.md."""
    content = [content for content in results if content["case"] == "settings"][-1]
    rows = content["rows"]
    first = rows[0]
    lora = {(row["shape"], row["completion"]): row for row in rows if row["peer"] == "lora"}
    body = []
    for row in sorted(rows, key=lambda row: list(lora).index((row["shape"], row["completion"]))):
        full = lora[row["shape"], row["completion"]]
        body.append(
            [
                row["shape"],
                f"{row['completion']:,}",
                _SETTINGS[row["peer"]],
                *(f"{row[name] / full[name]:.2f}" for name in ("launches", "flop")),
                *(f"{row[name] / 2**30:.2f}" for name in ("kept_bytes", "peak_bytes")),
                f"{row['peak_bytes'] / full['peak_bytes']:.2f}",
            ]
        )
    off = max(abs(share - 1) for row in rows for share in row.get("checked", {}).values())
    header = ["shape", "completion", "setting", "launches", "operations", "kept, GiB", "peak, GiB", "peak, of LoRA"]
    return (
        f"One sequence, prompt {first['prompt']}, window {first['window']:,}, rank {first['rank']}, base in bfloat16, adapters in "
        "float32, forward and backward with gradient checkpointing, without the head. Launches and operations relative to LoRA's. "
        "Counted on fake tensors with 2 and 3 layers and continued in straight lines: LoRA at every length, one pass to the length in "
        "the middle, the others up to 5,120 tokens. Where a fourth layer at a longer completion was counted too (the default at 7,168 "
        f"and one pass with offload at 20,480 tokens), the lines were off by at most {off:.1%}. {_origin([content])}\n\n"
        + tables.table(header, body, left=3)
    )


_SETTINGS = {
    "lora": "LoRA, full cache",
    "least": "least memory",
    "default": "default",
    "one_pass": "one pass",
    "least_offload": "least memory, `offload`",
    "default_offload": "default, `offload`",
    "one_pass_offload": "one pass, `offload`",
}
_COST = {
    "launches": "launches",
    "calls": "calls of a layer, no gradients",
    "seconds": "CPU time",
    "peak": "peak",
    "counted_peak": "peak, counted",
}
_COST_PEERS = {"quarter_window": "window / 4", "half_window": "window / 2", "one_window": "one window"}
_METHODS = {
    "lora": "LoRA, full cache",
    "lora_bounded": "LoRA under the window",
    "pte": "PTE",
    "pte_whole_segments": "PTE, `recompute_layers=False`",
    "pte_offload": "PTE, `offload=True`",
}


def main(arguments: list[str] | None = None) -> None:
    """Render tables and plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS], help="folders of JSONs")
    parser.add_argument("--stdout", action="store_true", help="print all tables; write nothing")
    options = parser.parse_args(arguments)
    results = load(options.results)
    if options.stdout:
        print(render(results))
        return
    for path, name, brief in (
        (ROOT / "benchmarks" / "README.md", "benchmarks", False),
        (ROOT / "docs" / "performance.md", "performance", True),
    ):
        path.write_text(tables.insert(path.read_text(), render(results, brief), name))
        print(f"Wrote {path.relative_to(ROOT)}")
    if any(content["case"] == "settings" for content in results):
        path = ROOT / "docs" / "memory.md"
        path.write_text(tables.insert(path.read_text(), settings(results), "settings"))
        print(f"Wrote {path.relative_to(ROOT)}")
    if found := [content for content in results if content["case"] == "protocol"]:
        path = ROOT / "examples" / "paper" / "README.md"
        text = f"{protocol.report(found[-1]['rows'])}\n\n{_origin(found[-1:])}"
        path.write_text(tables.insert(path.read_text(), text, "protocol"))
        print(f"Wrote {path.relative_to(ROOT)}")
    timed = [content for content in results if content["case"] == "train" and content["device"] == "cuda"]
    if timed:
        draw_training_time(timed[-1], RESULTS / "training.png")
    if (RESULTS / "figures.json").exists():
        tables.main([])
