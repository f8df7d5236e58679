"""The examples as their README runs them, on the real model; minutes each, so left to `make test-slow`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(*command, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PEFT_PTE_CHECK_SHAPES": "0", "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def check_report(folder):
    assert (folder / "adapter_model.safetensors").stat().st_size > 0
    assert (folder / "report.png").stat().st_size > 0
    return json.loads((folder / "report.json").read_text())


def test_two_processes(tmp_path):
    # On a CPU `accelerate launch --num_processes 2` starts one process.
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2]
    options = ["--short", "--max-steps", 2, "--output-dir", tmp_path]
    run(*launch, "examples/grpo_reasoning.py", *options, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    report = check_report(tmp_path)
    assert report["processes"] == 2
    assert "evictions_per_sequence" in json.dumps(report)


def test_grpo_is_resumed_and_its_adapter_generates(tmp_path):
    script = ["examples/grpo_reasoning.py", "--short", "--save-steps", 1, "--output-dir", tmp_path]
    run(*script, "--max-steps", 1)
    printed = run(*script, "--max-steps", 2, "--resume")
    assert "step   1/2" not in printed
    assert "step   2/2" in printed
    check_report(tmp_path)
    printed = run("examples/generate.py", "--adapter", tmp_path, "--max-new-tokens", 96)
    assert "tokens through a window of 24" in printed


def test_sft(tmp_path):
    run("examples/sft_warmup.py", "--short", "--output-dir", tmp_path)
    check_report(tmp_path)


def test_distil_then_reinforce(tmp_path):
    run(
        "examples/distill.py",
        "--short",
        "--max-steps",
        1,
        "--windows",
        24,
        "none",
        "--output-dir",
        tmp_path / "distilled",
    )
    report = check_report(tmp_path / "distilled")
    assert "pte/ratio_p5" in report["history"][0]
    script = ["examples/grpo_reasoning.py", "--short", "--max-steps", 1, "--adapter", tmp_path / "distilled"]
    run(*script, "--output-dir", tmp_path / "reinforced")
    assert check_report(tmp_path / "reinforced")["arguments"]["cache_window"] == 24
