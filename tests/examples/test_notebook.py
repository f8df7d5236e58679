"""The notebook runs from its first cell to its last, and what is committed is what its cells say."""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def pictures(notebook):
    return [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]


def test_it_runs(monkeypatch):
    notebook = nbformat.read(EXAMPLES / "memory.ipynb", as_version=4)
    assert len(pictures(notebook)) == 2
    # Shorter than what is committed, with every cell.
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = re.sub(r"^STEPS = \d+", "STEPS = 5", cell.source, flags=re.MULTILINE)
            cell.source = re.sub(r"^TOKENS = \d+", "TOKENS = 40", cell.source, flags=re.MULTILINE)
            cell.outputs = []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent / "src"), str(EXAMPLES.parent)]))
    monkeypatch.setenv("PEFT_PTE_CHECK_SHAPES", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    assert len(pictures(notebook)) == 2
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "evictions per sequence" in printed
    assert "the model on its full cache" in printed
