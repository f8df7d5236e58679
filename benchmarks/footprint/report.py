"""Tables and the plot of bytes, errors and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.pages import Section, grouped, origin, table
from ..common.records import FILE, Record, read
from .measure import KEY

Rows = list[Record]
_SETTINGS = {
    "lora": "LoRA, full cache",
    "least": "least memory",
    "default": "default",
    "one_pass": "one pass",
    "least_offload": "least memory, `offload`",
    "default_offload": "default, `offload`",
    "one_pass_offload": "one pass, `offload`",
}
STYLES = {
    "PTE, sliding_window": ("PTE", "C0", "-"),
    "base model": ("base model, full cache", "C3", "-"),
    "pte": ("PTE", "C0", "-"),
    "lora": ("LoRA, full cache", "C3", "-"),
    "pte, key_diff": ("PTE, key_diff", "C0", ":"),
}


def small(records: Rows) -> str:
    """The tables of docs/performance.md, each under a sentence that says what was measured on what."""
    parts = {name: [record for record in records if record["part"] == name] for name in _TABLES}
    intro = (
        "Small random models (8 layers, width 192, float32 unless said otherwise) of the named architectures; bytes are those of tensor "
        "storages, not of the process. What is computed and not measured is labelled so."
    )
    variants = [record for record in records if record["part"] == "variants"]
    tables = [
        _training(rows, variants) if name == "training" else _TABLES[name](rows) for name, rows in parts.items() if rows
    ]
    return "\n\n".join([intro, *tables])


def _pivot(rows: Rows, *keys: str) -> dict[Any, Rows]:
    return grouped(rows, lambda row: tuple(row[key] for key in keys))


def _cache(rows: Rows) -> str:
    first, lengths = rows[0], sorted({row["thoughts"] for row in rows})
    body = []
    for (model, cache), group in _pivot(rows, "model", "cache").items():
        sizes = {row["thoughts"]: f"{row['bytes'] / 1024:,.0f}" for row in group}
        body.append([model, cache, *(sizes[length] for length in lengths)])
    computed = [row for row in rows if row["bytes_computed"] is not None]
    exact = sum(row["bytes"] == row["bytes_computed"] for row in computed)
    header = ["model", "cache", *(f"{length:,}" for length in lengths)]
    return (
        f"**Cache while decoding, KiB by thoughts decoded (measured).** {first['batch']} sequences, prompt of "
        f"{first['prompt']} columns, window {first['window']}. {exact} of {len(computed)} points (the base model's, and PTE's from the first eviction on where the oldest leave) equal the formula that "
        f"the last table computes with, to the byte. {origin(rows)}\n\n" + table(header, body, left=2)
    )


def _training(main: Rows, variants: Rows) -> str:
    lengths = sorted({row["completion"] for row in main})
    body = []
    for (model, method), group in _pivot(main + variants, "model", "method").items():
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
        f"{gap:.1%}. {_crossing(main)} {origin(main + variants)}\n\n" + table(header, body, left=2)
    )


def _crossing(rows: Rows) -> str:
    """Up to which of the lengths measured LoRA needs less."""
    parts = []
    for (model,), group in _pivot(rows, "model").items():
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
    columns = list(_pivot(rows, "attention", "cache"))
    body = []
    for (model, dtype), group in _pivot(rows, "model", "dtype").items():
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
        "float32 in every dtype; float64 under eager was measured on prompts of one length, since padding is 0 / 0 there. "
        f"{origin(rows)}\n\n" + table(header, body, left=2)
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
        f"ranks; LoRA of the same rank on the same linears. {origin(rows)}\n\n" + table(header, body)
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
        f"checkpointed. Neither counts the activations of the part that is recomputed. {origin(rows)}\n\n"
        + table(header, body)
    )


_TABLES: dict[str, Any] = {
    "cache": _cache,
    "training": _training,
    "replay": _replay,
    "parameters": _parameters,
    "computed": _computed,
}


def settings(records: Rows) -> str:
    """The table of docs/memory.md."""
    rows = [record for record in records if record["part"] == "settings"]
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
        f"and one pass with offload at 20,480 tokens), the lines were off by at most {off:.1%}. {origin(rows)}\n\n"
        + table(header, body, left=3)
    )


def draw(folder: Path, model: str = "Llama") -> None:
    """Cache bytes and training peak of ``model`` against length, side by side."""
    from ..common.plot import figure

    rows = [row for row in read(folder / FILE, KEY) if row.get("model") == model]
    cache = [row for row in rows if row["part"] == "cache"]
    training = [row for row in rows if row["part"] in ("training", "variants")]
    with figure(folder / "memory.png", 1, 2, size=(9.6, 3.8)) as (drawing, (left, right)):
        _lines(left, cache, "cache", "thoughts", "bytes")
        _lines(right, training, "method", "completion", "peak_bytes")
        left.set(title="KV cache while decoding", xlabel="thoughts decoded")
        right.set(title="Peak of one training step, above the weights", xlabel="completion length")
        for axis, shown in ((left, cache), (right, training)):
            window = shown[0]["window"]
            axis.axvline(window, color="0.6", linewidth=1, linestyle="--")
            axis.text(window, 0.97, " window", color="0.4", va="top", transform=axis.get_xaxis_transform())
            axis.set(ylabel="MiB", ylim=(0, None), xlim=(0, None))
            axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.2, 1.0))
        drawing.suptitle(f"{model}-shaped model, 8 layers of width 192, float32, measured on a CPU")


def _lines(axis: Any, rows: Rows, line: str, x: str, y: str) -> None:
    for name, (label, colour, stroke) in STYLES.items():
        points = sorted((row[x], row[y] / 2**20) for row in rows if row[line] == name)
        if points:
            axis.plot(*zip(*points, strict=True), stroke, color=colour, label=label, marker="o", markersize=3.5)


SECTIONS = (
    Section("docs/performance.md", "figures", small, key=KEY),
    Section("docs/memory.md", "settings", settings, key=KEY),
)
