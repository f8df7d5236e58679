"""Tables and figures of docs/evidence.md, docs/evidence_log.md, docs/eviction.md and docs/lora.md from the committed results: ``python -m benchmarks.evidence [--stdout]``.

Each section is rendered by the benchmark it comes from, between its markers; text outside of the markers is written by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common.pages import insert
from .machine import ROOT, load_runs
from .memory import report as memory
from .memory.run import RESULTS as MEMORY
from .reasoning import report as reasoning
from .reasoning.run import RESULTS as REASONING
from .recipe import report as recipe
from .recipe.run import RESULTS as RECIPE
from .rl import report as rl
from .rl.run import RESULTS as RL

PAGES = ("evidence.md", "evidence_log.md", "eviction.md", "lora.md")
EVIDENCE, LOG, EVICTION, LORA = (ROOT / "docs" / name for name in PAGES)
SECTIONS: dict[str, tuple[Callable[[Path], str], Path, Path]] = {
    "recipe": (recipe.report, RECIPE, EVIDENCE),
    "recipe-tuning": (recipe.tuning, RECIPE / "tuning", LOG),
    "memory": (memory.report, MEMORY, LOG),
    "rl": (rl.report, RL, LOG),
    "reasoning": (reasoning.report, REASONING, LOG),
    "shifted": (recipe.converted, RECIPE / "converted", LORA),
    "eviction": (memory.report_evictions, MEMORY / "eviction", EVICTION),
}
"""By marker: what renders the results of a folder, the folder, the document."""


def provenance(results: list[dict[str, Any]]) -> str:
    """One sentence: machine, versions, dates and commits of ``results``."""

    def all_of(name: str) -> str:
        found = {result[name] for result in results}
        return ", ".join(sorted(str(value)[:12] if name == "commit" else str(value) for value in found))

    dates = sorted(result["date"][:10] for result in results)
    versions = ", ".join(f"{package} {version}" for package, version in results[-1]["versions"].items())
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    gpus = sorted({result["gpu"] or "no GPU" for result in results})
    return (
        f"*{len(results)} runs, {days}; {all_of('cpu')}, {all_of('cores')} cores, {', '.join(gpus)}, threads: "
        f"{all_of('threads')}; {versions}; commits {all_of('commit')}.*"
    )


def render(document: Path) -> str:
    """The text of ``document`` with every section rendered anew."""
    text = document.read_text()
    for name, (report, folder, place) in SECTIONS.items():
        if place == document:
            text = insert(text, f"{provenance(load_runs(folder))}\n\n{report(folder)}", name)
    return text


def main(arguments: list[str] | None = None) -> None:
    """Render the documents."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--stdout", action="store_true", help="print the documents; leave the files as they are")
    options = parser.parse_args(arguments)
    for document in (EVIDENCE, LOG, EVICTION, LORA):
        text = render(document)
        if options.stdout:
            print(text)
        else:
            document.write_text(text)


if __name__ == "__main__":
    main()
