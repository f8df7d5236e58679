"""What a results file says about where its figures come from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_pte

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def provenance(command: str) -> dict[str, Any]:
    """Machine, GPU (or None), versions, commit, date, command."""
    changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
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
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (peft_pte, torch, transformers, peft)},
    }


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
