"""Layers on two devices, as ``device_map`` spreads them: scores, gradients and generations are those of one device, and nothing mixes devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.devices import TRIALS

ROOT = Path(__file__).resolve().parents[2]
FEW = (
    "score llama",
    "score, checkpointed",
    "turns, key_diff",
    "generate at fixed addresses, inputs elsewhere",
    "requests",
)


def try_out(names, tmp_path):
    """What went wrong, by name; in a process of its own, which has the devices."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.integrations.devices", str(tmp_path / "found.json"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(names)
    return {name: error for name, error in found.items() if error}


def test_what_is_done_on_two_devices_equals_one(tmp_path):
    assert try_out(FEW, tmp_path) == {}


@pytest.mark.slow
def test_all_that_is_done_on_two_devices_equals_one(tmp_path):
    assert try_out([name for name in TRIALS if name not in FEW], tmp_path) == {}


def test_the_devices_are_apart(tmp_path):
    # What the others rely on: a mix of devices is found.
    found = try_out(["a mix of devices"], tmp_path)
    assert "ElsewhereError: add of tensors on ['twin:0', 'twin:1']" in found["a mix of devices"]
