"""Compile every kernel as its launcher would launch it on a GPU that is not here, and print what it needs as JSON.

Run by ``test_lowering.py`` in a process of its own, where Triton does not interpret.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from peft_pte.ops import tuning
from peft_pte.ops.compress import triton as compress
from peft_pte.ops.delta import triton as delta
from peft_pte.ops.encode import triton as encode

CAPABILITY = int(sys.argv[1])


class Driver:
    """Enough of a driver to compile and not to launch."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(run):
    def call(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(kernel.asm["ptx"])
            file.flush()
            target = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"]).group(1)
            command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
            account = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilled = int(re.search(r"(\d+) bytes spill stores", account).group(1))
        registers = int(re.search(r"Used (\d+) registers", account).group(1))
        facts = {"spilled": spilled, "registers": registers, "shared": kernel.metadata.shared}
        print(json.dumps({"kernel": self.fn.__name__, "grid": grid, **facts}), flush=True)
        return kernel

    return call


def compile_compress(layers, batch, heads, head_dim, attention, interleaved):
    cached = torch.zeros(1, 1, heads, 257, head_dim, dtype=torch.bfloat16).expand(layers, batch, -1, -1, -1)
    width = heads * head_dim
    angles = torch.zeros(1, 256, head_dim).expand(batch, -1, -1)
    compress._compress._init_fn(
        torch.zeros(1, 1, 32, 32).expand(layers, batch, -1, -1),
        cached,
        cached,
        torch.arange(256).expand(batch, -1),
        torch.zeros(layers, 32, width),
        torch.zeros(layers, 32, width),
        angles,
        angles,
        torch.ones(1, 256, dtype=torch.bool).expand(batch, -1),
        torch.arange(batch) if interleaved else None,
        0.3,
        attention,
        interleaved,
    )


def compile_delta(dtype):
    state, hidden = torch.zeros(4, 32, 32), torch.zeros(4, 256, 2048, dtype=dtype)
    weights = torch.zeros(32, 2048, dtype=dtype), torch.zeros(4096, 32, dtype=dtype)
    delta._forward._init_fn(hidden, weights[0], state, weights[1], torch.zeros(4, 256, 4096, dtype=dtype), 2.0)
    narrow = torch.zeros(4, 256, 32, dtype=dtype)
    delta._state_backward._init_fn(narrow, narrow, state)
    token, group = torch.zeros(64, 1, 2048, dtype=dtype), torch.zeros(96, 2048, dtype=dtype)
    reads = delta._read._init_fn(token, group, torch.zeros(64, 32, 32))
    delta._add._init_fn(torch.zeros(64, 4096, dtype=dtype), reads[:, 0], weights[1], 2.0)


def compile_encode(attention):
    state, query, rows = torch.zeros(2, 32, 32), torch.zeros(32, 32), torch.zeros(2, 256, 256)
    weight, valid = torch.zeros(32, 256), torch.ones(2, 256, dtype=torch.bool)
    encode._updates._init_fn(query, rows, rows, weight, weight, valid, attention)
    narrow, norm = torch.zeros(2, 256, 32), torch.zeros(2, 32)
    encode._updates_backward._init_fn(state, state, norm, query, narrow, narrow, valid, norm[:, 0], attention)
    encode._recur._init_fn(state[:1], state[None], 0.3)
    encode._recur_backward._init_fn(state[None], state[None], norm[None], 0.3)


if __name__ == "__main__":
    driver.set_active(Driver())
    jit.JITFunction.run = compile_only(jit.JITFunction.run)
    tuning.capability_of = lambda device: f"sm_{CAPABILITY}"
    compress.multiprocessors = delta.multiprocessors = lambda device: 132
    compile_compress(36, 64, 2, 128, attention="linear", interleaved=False)
    compile_compress(32, 1, 8, 128, attention="softmax", interleaved=False)
    compile_compress(32, 64, 8, 128, attention="slots", interleaved=True)
    compile_delta(torch.bfloat16)
    for attention in ("linear", "softmax", "slots"):
        compile_encode(attention)
