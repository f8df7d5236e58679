"""Tables and plot from the results: ``python -m benchmarks.tables [--stdout] [--page docs/performance.md]``.

The tables go between the markers ``<!-- figures:begin -->`` and ``<!-- figures:end -->`` of docs/performance.md, the plot to
``results/memory.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .machine import RESULTS, ROOT
from .plot import draw

Rows = list[dict[str, Any]]


def render(results: dict[str, Any]) -> str:
    """All tables as markdown, each under a sentence that says what was measured on what."""
    parts = [
        _provenance(results),
        _cache(results["cache"]["rows"]),
        _training(results["training"]["rows"], results["training_variants"]["rows"]),
        _replay(results["replay"]["rows"]),
        _parameters(results["parameters"]["rows"]),
        _computed(results["computed"]["rows"]),
    ]
    return "\n\n".join(parts)


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A markdown table whose first ``left`` columns are text and whose others are numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def _provenance(results: dict[str, Any]) -> str:
    # Sections may have been measured on their own (`--only`), by another commit.
    sections: dict[str, list[str]] = {}
    for name, section in results.items():
        source = section["source"]
        versions = ", ".join(f"{package} {version}" for package, version in source["versions"].items())
        commit = (source["commit"] or "unknown")[:12] + (" with uncommitted changes" if source["dirty"] else "")
        hardware = f"{source['cpu']}, {source['cores']} cores, {source['gpu'] or 'no GPU'}"
        line = f"`{source['command']}` on {source['date'][:10]}; {hardware}; {versions}; commit {commit}."
        sections.setdefault(line, []).append(name.replace("_", " "))
    alone = len(sections) == 1
    lines = [line if alone else f"{', '.join(names)}: {line}" for line, names in sections.items()]
    return (
        "Measured on small random models (8 layers, width 192, float32 unless said otherwise) of the named architectures; "
        "bytes are those of tensor storages, not of the process. What is computed and not measured is labelled so.\n\n"
        + "\n".join(lines)
    )


def _pivot(rows: Rows, keys: tuple[str, ...]) -> dict[tuple[str, ...], Rows]:
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _cache(rows: Rows) -> str:
    first, lengths = rows[0], sorted({row["thoughts"] for row in rows})
    body = []
    for (model, cache), group in _pivot(rows, ("model", "cache")).items():
        sizes = {row["thoughts"]: f"{row['bytes'] / 1024:,.0f}" for row in group}
        body.append([model, cache, *(sizes[length] for length in lengths)])
    computed = [row for row in rows if row["bytes_computed"] is not None]
    exact = sum(row["bytes"] == row["bytes_computed"] for row in computed)
    header = ["model", "cache", *(f"{length:,}" for length in lengths)]
    return (
        f"**Cache while decoding, KiB by thoughts decoded (measured).** {first['batch']} sequences, prompt of "
        f"{first['prompt']} columns, window {first['window']}. {exact} of {len(computed)} points (the base model's, and PTE's from the first eviction on) equal the formula that "
        f"the last table computes with, to the byte.\n\n" + table(header, body, left=2)
    )


def _training(main: Rows, variants: Rows) -> str:
    lengths = sorted({row["completion"] for row in main})
    body = []
    for (model, method), group in _pivot(main + variants, ("model", "method")).items():
        peaks = {row["completion"]: f"{row['peak_bytes'] / 2**20:.2f}" for row in group}
        slopes = (f"{_slope(group, key):,.0f}" for key in ("peak_bytes", "held_for_backward_bytes"))
        theory = (f"{group[0][key]:,}" for key in ("kv_bytes_per_token", "hidden_bytes_per_token"))
        body.append([model, _method(method), *(peaks.get(length, "") for length in lengths), *slopes, *theory])
    checked = [row for row in main + variants if row["allocator_peak_bytes"]]
    gap = max(abs(row["allocator_peak_bytes"] / row["peak_bytes"] - 1) for row in checked)
    slopes = ["peak", "held", "K/V", "hidden"]
    header = ["model", "method", *(f"{length:,}" for length in lengths), *slopes]
    first = main[0]
    return (
        "**Peak memory of one training step above the weights, MiB by completion length (measured).** Forward and "
        f"backward of a scoring call with labels, gradients of the adapters included, optimizer not; one sequence, "
        f"prompt of {first['prompt']}, window {first['window']}, gradient checkpointing on; LoRA: same rank, same "
        "linears, its own full attention, layers checkpointed. Last columns, bytes per token: growth of the peak and of "
        "what is held from forward to backward (both between the two longest), beside keys and values of one token and "
        f"one hidden vector (computed). The allocator's own count of the peak, taken at {len(checked)} points, is within "
        f"{gap:.1%}. {_crossing(main)}\n\n" + table(header, body, left=2)
    )


def _crossing(rows: Rows) -> str:
    """Up to which of the lengths measured LoRA needs less."""
    parts = []
    for (model,), group in _pivot(rows, ("model",)).items():
        peaks = {(row["method"], row["completion"]): row["peak_bytes"] for row in group}
        less = [length for method, length in peaks if method == "lora" and peaks["lora", length] < peaks["pte", length]]
        parts.append(f"{model} up to {max(less):,}" if less else f"{model} at none")
    return f"LoRA needs less at short completions, of the lengths measured: {', '.join(parts)}."


def _method(name: str) -> str:
    return {"pte": "PTE", "lora": "LoRA"}.get(name, name.replace("pte", "PTE"))


def _slope(group: Rows, key: str) -> float:
    before, last = sorted(group, key=lambda row: row["completion"])[-2:]
    return (last[key] - before[key]) / (last["completion"] - before["completion"])


def _replay(rows: Rows) -> str:
    columns = list(_pivot(rows, ("attention", "cache")))
    body = []
    for (model, dtype), group in _pivot(rows, ("model", "dtype")).items():
        cells = {(row["attention"], row["cache"]): row for row in group}
        body.append([model, dtype, *(_error(cells[column]) for column in columns)])
    longest = max(row["evictions"] for row in rows)
    header = ["model", "dtype", *(f"{attention}: {cache}" for attention, cache in columns)]
    return (
        "**Replay against rollout: largest |log-prob difference| over all thoughts (measured).** "
        f"{len(rows[0]['prompts'])} left-padded prompts, {rows[0]['thoughts']} sampled thoughts in a window of "
        f"{rows[0]['window']}, {longest} evictions, adapters far from the identity; the base model's own decoding against "
        "its own forward is the yardstick of the dtype. In brackets: share of the thoughts held after decoding that "
        "are not held after scoring, where there are any. Eager attention of Llama and Qwen2 takes its softmax in "
        "float32 in every dtype; float64 under eager was measured on prompts of one length, since padding is 0 / 0 there.\n\n"
        + table(header, body, left=2)
    )


def _error(row: dict[str, Any]) -> str:
    differ = f" ({row['thoughts_that_differ']:.1%})" if row["thoughts_that_differ"] else ""
    return f"{row['max_abs_log_prob_difference']:.1e}{differ}"


def _parameters(rows: Rows) -> str:
    body = []
    for row in rows:
        counts = (row["base_parameters"], row["pte_trained"], row["pte_encoder"], row["lora_trained"])
        name = f"{row['model']}, {'true shape' if row['true_shape'] else 'small'}"
        shares = (f"{100 * row[key] / row['base_parameters']:.2f}" for key in ("pte_trained", "lora_trained"))
        more = f"{100 * (row['pte_trained'] / row['lora_trained'] - 1):+.1f}"
        body.append([name, str(row["r"]), *(f"{count:,}" for count in counts), *shares, more])
    header = [
        "model",
        "rank",
        "base",
        "PTE",
        "of it encoder",
        "LoRA",
        "PTE, % of base",
        "LoRA, % of base",
        "PTE - LoRA, %",
    ]
    return (
        "**Trained parameters (counted; true shapes on the meta device, without weights).** As many global tokens as "
        "ranks; LoRA of the same rank on the same linears.\n\n" + table(header, body)
    )


def _computed(rows: Rows) -> str:
    lengths = [int(length) for length in rows[0]["base_cache_bytes"]]
    body = []
    for row in rows:
        full = (f"{row['base_cache_bytes'][str(length)] / 2**20:,.0f}" for length in lengths)
        kept = (f"{row[key] / 1024:,.0f}" for key in ("pte_kept_per_token", "lora_kept_per_token"))
        body.append([row["model"], f"{row['pte_cache_bytes'] / 2**20:,.0f}", *full, *kept])
    header = ["model", "PTE, any length", *(f"full, {length:,}" for length in lengths), "PTE kept", "LoRA kept"]
    first = rows[0]
    return (
        "**True shapes, bfloat16, one sequence (computed, not measured).** Cache in MiB, prompt of "
        f"{first['prompt']}, window {first['window']:,}, by thoughts decoded. Last columns, KiB per scored token kept "
        "from forward to backward: keys and values under PTE; the inputs of all layers under LoRA with layers "
        "checkpointed. Neither counts the activations of the part that is recomputed.\n\n" + table(header, body)
    )


def insert(text: str, block: str, name: str = "figures") -> str:
    """``text`` with ``block`` between its markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: The markers are not there once each, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The page must hold the lines `{begin}` and `{end}` once each, in this order. Add them.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def main(arguments: list[str] | None = None) -> None:
    """Render the tables and draw the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "figures.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--stdout", action="store_true", help="print the tables; write nothing")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    block = render(results)
    if options.stdout:
        print(block)
        return
    options.page.write_text(insert(options.page.read_text(), block))
    draw(results, RESULTS / "memory.png")


if __name__ == "__main__":
    main()
