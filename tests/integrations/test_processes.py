"""Two processes on the CPU, data parallel, by torchrun: rows of different lengths, one process without evictions, resumed runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integrations import processes

ROOT = Path(__file__).resolve().parents[2]


def launch(kind, folder, steps, *options):
    """What the two processes found."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "0",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            processes.__file__,
            kind,
            str(folder),
            str(steps),
            *options,
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_processes_hold_one_adapter_and_a_resumed_run_is_the_run(kind, tmp_path):
    whole = launch(kind, tmp_path / "whole", 4)
    assert whole[0]["step"] == 4
    assert all(torch.equal(value, whole[1]["weights"][name]) for name, value in whole[0]["weights"].items())
    if kind == "sft":
        assert whole[0]["evictions"] > 2
        assert whole[1]["evictions"] == 0
    launch(kind, tmp_path / "parts", 2)
    resumed = launch(kind, tmp_path / "parts", 4, "--resume")
    assert resumed[0]["step"] == 4
    for rank in range(2):
        for name, value in whole[rank]["weights"].items():
            assert torch.equal(value, resumed[rank]["weights"][name]), name
    assert whole[0]["losses"] == resumed[0]["losses"]
