"""Measure the README's figures: ``python -m benchmarks.figures [--quick]``.

Writes ``results/figures.json``; ``python -m benchmarks.tables`` makes the tables and the plot from it. Bytes, errors
and counts only: nothing here is a timing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from .machine import RESULTS, provenance
from .measures import cache_bytes, parameters, replay_error, training_peak
from .theory import true_shape_bytes

FULL: dict[str, dict[str, Any]] = {
    "cache": {
        "window": 64,
        "multiples": [0.5, 1, 2, 4, 8, 16],
        "prompt_lengths": [32, 20],
        "policies": ["sliding_window", "key_diff"],
    },
    "training": {
        "window": 64,
        "multiples": [0.5, 1, 2, 4, 8, 16],
        "prompt": 32,
        "methods": ["pte", "lora"],
        "families": ["Llama", "Qwen2", "GPT-2"],
        "check": 4,
    },
    "training_variants": {
        "window": 64,
        "multiples": [1, 4, 8, 16],
        "prompt": 32,
        "methods": ["pte, detached cache", "pte, key_diff"],
        "families": ["Llama"],
        "check": 4,
    },
    "replay": {
        "window": 16,
        "multiple": 6,
        # Three: from four rows on, MKL multiplies float64 row by row alike and the error would be an uninformative 0.
        "prompt_lengths": [12, 5, 9],
        "dtypes": ["float64", "float32", "bfloat16", "float16"],
        "families": ["Llama", "Qwen2", "GPT-2"],
    },
    "parameters": {"true_rank": 32},
    "computed": {"window": 1024, "prompt": 256, "lengths": [1024, 4096, 16384, 65536], "rank": 32},
}
QUICK: dict[str, dict[str, Any]] = {
    **FULL,
    "cache": {**FULL["cache"], "window": 16, "multiples": [1, 2, 4], "policies": ["sliding_window"]},
    "training": {**FULL["training"], "window": 16, "multiples": [1, 4], "families": ["Llama", "GPT-2"]},
    "training_variants": {**FULL["training_variants"], "window": 16, "multiples": [1, 4]},
    "replay": {**FULL["replay"], "window": 8, "multiple": 3, "families": ["Llama"]},
}
MEASURES = {
    "cache": cache_bytes,
    "training": training_peak,
    "training_variants": training_peak,
    "replay": replay_error,
    "parameters": parameters,
    "computed": true_shape_bytes,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the measures and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter points, in under a minute")
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="measure only these; the rest of the file is kept")
    parser.add_argument("--output", type=Path, help="default: results/figures.json, or results/quick.json")
    options = parser.parse_args(arguments)
    output = options.output or RESULTS / ("quick.json" if options.quick else "figures.json")
    # The models are too small to gain from threads, and one thread sums in one order.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    command = " ".join(["python -m benchmarks.figures", *(sys.argv[1:] if arguments is None else arguments)])
    source = provenance(command)
    results = json.loads(output.read_text()) if options.only and output.exists() else {}
    settings = QUICK if options.quick else FULL
    for name in options.only or MEASURES:
        start = time.perf_counter()
        rows = _collect(name, MEASURES[name](**settings[name]))
        print(f"{name}: {len(rows)} rows in {time.perf_counter() - start:.0f} s", flush=True)
        results[name] = {"source": source, "settings": settings[name], "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Wrote {output}")


def _collect(name: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        print(f"{name}: " + ", ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
