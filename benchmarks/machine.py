"""What a results file says about where its figures come from, and what the machine could do at most."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import measure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("peft-pte", "torch", "transformers", "peft", "trl", "triton", "kvpress")


def provenance(command: str) -> dict[str, Any]:
    """Machine, GPU (or None), versions, commit, date, command."""
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py", "examples")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "uncommitted": None if changed is None else [line[3:] for line in changed.splitlines()],
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()} | _versions(),
    }


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


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What ``device`` reaches here and now: bytes/s of a large copy (read and write counted), FLOP/s of a large matmul.

    Sizes: 1 GiB and 8192 on a GPU, 128 MiB and 1024 on a CPU.
    """
    gpu = device.type == "cuda"
    nbytes, width = (2**30, 8192) if gpu else (2**27, 1024)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)
    left = torch.randn(width, width, device=device, dtype=dtype)
    product = torch.empty_like(left)
    matmul = measure(lambda: torch.mm(left, left, out=product), device)
    return {"bytes_per_second": 2 * nbytes / copy.median, "flop_per_second": 2 * width**3 / matmul.median}


def _versions() -> dict[str, str]:
    # A checkout that is not installed has no version, nor has what is missing.
    return {name: version for name in PACKAGES if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git, or ``None`` where the sources are no checkout (an sdist)."""
    try:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip("\n")


def _cpu() -> str:
    """The model of the CPU; generic where the system does not tell."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
