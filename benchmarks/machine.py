"""What the benchmarks of learning read results with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .common.records import ROOT, provenance

__all__ = ["ROOT", "adapter_config", "load_runs", "plain", "provenance"]


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """The results of every run and seed in ``folder``, by name.

    Raises:
        FileNotFoundError: There is none.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed-*.json"))]
    if not results:
        raise FileNotFoundError(f"{folder} holds no results. Use the benchmark's `run` first.")
    return results


def adapter_config(model: Any) -> dict[str, Any]:
    """The config of a model's adapter as a results file can hold it, without where on this machine the base model lies."""
    fields = model.peft_config["default"].to_dict()
    return {name: plain(value) for name, value in fields.items() if name != "base_model_name_or_path"}


def plain(value: Any) -> Any:
    """``value`` as a results file can hold it."""
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, (int, float, str, dict, list, type(None))) else str(value)
