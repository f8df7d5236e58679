"""docs/evidence.md, its log and docs/eviction.md say what the committed results say."""

import shutil

import pytest

from benchmarks import evidence
from benchmarks.machine import load_runs


@pytest.mark.parametrize("name", evidence.SECTIONS)
def test_the_document_is_rendered_from_the_results(name, tmp_path):
    report, folder, document = evidence.SECTIONS[name]
    copy = tmp_path / "results"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.png"))  # Figures are drawn into the copy.
    block = f"{evidence.provenance(load_runs(copy))}\n\n{report(copy)}"
    assert block in document.read_text(), "run `python -m benchmarks.evidence`"
    assert list(copy.glob("*.png")) or document in (evidence.EVICTION, evidence.LORA) or name == "recipe-tuning"


def test_a_provenance_names_every_machine_and_commit():
    one = {"date": "2026-01-01T00:00", "cpu": "x", "cores": 2, "gpu": None, "threads": 1, "versions": {"torch": "2"}}
    text = evidence.provenance([{**one, "commit": "a" * 40}, {**one, "date": "2026-01-03T00:00", "commit": "b" * 40}])
    assert text == (
        f"*2 runs, 2026-01-01 to 2026-01-03; x, 2 cores, no GPU, threads: 1; torch 2; commits {'a' * 12}, {'b' * 12}.*"
    )
