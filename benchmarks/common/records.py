"""The one format of results: JSON lines, each a record with where it comes from, appended as they are found."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
FILE = "results.jsonl"
PACKAGES = ("peft-pte", "torch", "transformers", "peft", "trl", "triton")

Record = dict[str, Any]


def provenance(command: str) -> Record:
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
        # What is not installed has no version, nor has a checkout that is not.
        "versions": {"python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def read(path: Path, key: Sequence[str] = ()) -> list[Record]:
    """The records of a file, none where there is no file; of those that agree in all fields of ``key`` the last."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({key_of(record, key): record for record in records}.values()) if key else records


def key_of(record: Record, key: Sequence[str]) -> str:
    """What tells a record from others."""
    return json.dumps([record.get(name) for name in key])


class Results:
    """A file of records that grows.

    Args:
        path: Of the file.
        key: Fields that tell its records apart.
        source: Provenance, which every new record gets.
        fresh: Forget what is there.
    """

    def __init__(self, path: Path, key: Sequence[str], source: Record, fresh: bool = False) -> None:
        self.path, self.key, self.source = path, key, source
        if fresh:
            path.unlink(missing_ok=True)
        self._known: set[str] = set()
        for record in read(path):
            self._note(record)

    def has(self, record: Record) -> bool:
        """Whether there is a record with the key of this one that is no reason why nothing was found."""
        return key_of(record, self.key) in self._known

    def append(self, record: Record) -> None:
        """Write ``record`` and where it comes from."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "source": self.source}, allow_nan=False) + "\n")
        self._note(record)

    def _note(self, record: Record) -> None:
        if "not_available" not in record:
            self._known.add(key_of(record, self.key))


def rounded(value: Any) -> Any:
    """``value`` with five digits of every float."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


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
