"""Every kernel compiles to machine code for the GPUs it is written for, at true shapes; on Hopper, whose table it is, without
spilling registers.

Compilation needs no GPU, and does not say that the code runs well, or runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory that one program may have, in bytes (CUDA programming guide, compute capabilities 8.0 and 9.0).
SHARED = {80: 163 * 1024, 90: 227 * 1024}
KERNELS = {
    "_compress_kernel",
    "_combine_kernel",
    "_read_kernel",
    "_expand_kernel",
    "_group_read_kernel",
    "_state_kernel",
    "_update_kernel",
    "_update_backward_kernel",
    "_recur_kernel",
    "_recur_backward_kernel",
}


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("lowering.py")), str(capability)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    facts = [json.loads(line) for line in run.stdout.splitlines()]
    assert {fact["kernel"] for fact in facts} == KERNELS
    for fact in facts:
        assert fact["shared"] <= SHARED[capability], fact
        assert fact["spilled"] == 0 or capability != 90, fact
