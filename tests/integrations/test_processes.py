"""Two processes on the CPU, started by `accelerate launch` with the configs of examples/paper: rows of different lengths, one process without evictions, resumed runs."""

import contextlib
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.integrations import processes
from tests.integrations.common import make_trl_base

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "paper" / "configs"
# By name: the config, and what is said beside it.
WAYS = {
    "ddp": ("ddp_8", []),
    "fsdp2": ("fsdp2_8", []),
    "fsdp2-activations": ("fsdp2_8", ["--fsdp_activation_checkpointing", "true"]),
    "zero2": ("zero3_8", ["--zero_stage", "2"]),
    "zero3": ("zero3_8", []),
}


def launch(config, said, kind, folder, steps, *options, machines=1, count=2):
    """What the processes found that a config starts."""
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sharded = config.startswith(("fsdp", "zero"))
    # accelerate neither shards nor partitions with the first; the second is where weights are.
    environment |= {"ACCELERATE_TORCH_DEVICE": "cpu"} if sharded else {"ACCELERATE_USE_CPU": "true"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes", str(count), "--num_machines", str(machines), "--main_process_port", str(port), *said]
    program = [processes.__file__, kind, str(folder), str(steps), *options]
    with contextlib.ExitStack() as started:
        running = [
            started.enter_context(
                subprocess.Popen(
                    [*command, "--machine_rank", str(machine), *program],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                    cwd=ROOT,
                )
            )
            for machine in range(machines)
        ]
        for process in running:
            try:
                errors = process.communicate(timeout=600)[1]
            finally:
                process.kill()
            assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(count)]


def in_float32(way):
    config, said = WAYS[way]
    return config, [*said, "--mixed_precision", "no"]


@pytest.fixture(scope="module")
def replicated(tmp_path_factory):
    """The runs of two processes that each hold all weights, by kind of trainer."""
    return cache(lambda kind: launch(*in_float32("ddp"), kind, tmp_path_factory.mktemp(kind) / "whole", 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "way", "options"),
    [
        ("sft", "ddp", []),
        ("grpo", "ddp", ["--checkpoints"]),
        ("sft", "fsdp2", []),
        ("grpo", "fsdp2", []),
        ("sft", "fsdp2", ["--checkpoints"]),
        ("grpo", "fsdp2", ["--checkpoints"]),
        ("sft", "fsdp2-activations", []),
        ("grpo", "fsdp2-activations", []),
        ("sft", "zero2", []),
        ("grpo", "zero2", ["--checkpoints"]),
        ("sft", "zero3", ["--checkpoints"]),
        ("grpo", "zero3", []),
    ],
)
def test_processes_hold_one_adapter_and_a_resumed_run_is_the_run(kind, way, options, replicated, tmp_path):
    config, said = in_float32(way)
    whole = launch(config, said, kind, tmp_path / "whole", 4, *options)
    first, second = (found["weights"] for found in whole)
    assert whole[0]["step"] == 4
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    if kind == "sft":
        assert whole[0]["evictions"] > 2
        assert whole[1]["evictions"] == 0
    expected = replicated(kind)[0]
    assert whole[0]["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    for name, value in expected["weights"].items():
        # Adam divides by the size of a gradient, so that rounding of small ones shows; weights move by 0.04.
        torch.testing.assert_close(first[name], value, atol=1e-4, rtol=0)
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-4"):
        opened = dict(PeftModel.from_pretrained(make_trl_base("llama"), folder).named_parameters())
        assert all(torch.equal(opened[name], value) for name, value in first.items())
    launch(config, said, kind, tmp_path / "parts", 2, *options)
    resumed = launch(config, said, kind, tmp_path / "parts", 4, "--resume", *options)
    assert resumed[0]["step"] == 4
    for rank in range(2):
        for name, value in whole[rank]["weights"].items():
            assert torch.equal(value, resumed[rank]["weights"][name]), name
    assert whole[0]["losses"] == resumed[0]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kind", "machines", "count", "distributed"),
    [
        ("single", "sft", 1, 1, "NO"),
        ("ddp_8", "sft", 1, 2, "MULTI_CPU"),
        ("ddp_16", "grpo", 2, 2, "MULTI_CPU"),
        ("fsdp2_8", "sft", 1, 2, "FSDP"),
        ("fsdp2_16", "grpo", 2, 2, "FSDP"),
        ("zero3_8", "sft", 1, 2, "DEEPSPEED"),
        ("zero3_16", "grpo", 2, 2, "DEEPSPEED"),
    ],
)
def test_each_config_starts_in_its_precision(config, kind, machines, count, distributed, tmp_path):
    """A process for each machine, where the config has two; the trainer opens the base model, which ZeRO-3 partitions as it is read."""
    make_trl_base("llama").save_pretrained(tmp_path / "base")
    options = ["--base", str(tmp_path / "base")]
    found = launch(config, [], kind, tmp_path, 1, *options, machines=machines, count=count)
    assert [rank["kind"] for rank in found] == [distributed] * count
    assert {rank["precision"] for rank in found} == {"bf16"}
    assert {rank["processes"] for rank in found} == {count}
    assert all(torch.equal(value, found[-1]["weights"][name]) for name, value in found[0]["weights"].items())
