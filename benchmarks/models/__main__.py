"""``python -m benchmarks.models``: every causal LM of the installed transformers, with LoRA and with PTE, and ``docs/models.md`` from it.

A few minutes on two CPU cores. Results are written as they come; what is there already is not tried again (``--fresh`` does).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "models.jsonl"
DOCUMENT = ROOT / "docs" / "models.md"


def main() -> None:
    """Try types, and write the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all where none is named")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    from .report import render
    from .tiny import config_types
    from .trial import try_type

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if chosen.fresh and chosen.results.exists():
        chosen.results.unlink()
    known = read(chosen.results)
    kinds = chosen.types or config_types()
    for number, kind in enumerate(kinds):
        if kind in known and not chosen.types:
            continue
        outcome = try_type(kind)
        print(f"{number + 1}/{len(kinds)} {kind}: {outcome.verdict} {outcome.reason[:120]}", flush=True)
        known[kind] = outcome.to_dict()
        with chosen.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[kind]) + "\n")
    # In order, and once.
    lines = [json.dumps(known[kind]) for kind in config_types() if kind in known]
    chosen.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    chosen.document.write_text(render(known), encoding="utf-8")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by type; the last of each counts."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["kind"]: line for line in lines}


if __name__ == "__main__":
    main()
