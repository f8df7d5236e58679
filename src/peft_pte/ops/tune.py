"""Time block sizes on the GPU at hand and keep the fastest: ``python -m peft_pte.ops.tune [--batch 64] [--dry-run]``.

Writes the file that :mod:`peft_pte.ops.tuning` reads (``$PEFT_PTE_TUNING``, or under the user's cache directory). Shapes are
those of Qwen2.5-3B; nothing else in the package times anything.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from . import compress_, delta, delta_group_
from .tuning import FIELDS, blocks_for, capability_of, read_file, tuning_file

CANDIDATES: dict[str, tuple[int, ...]] = {
    "b_E": (32, 64, 128),
    "b_D": (16, 32, 64),
    "b_T": (32, 64, 128),
    "b_I": (64, 128, 256),
    "b_N": (16, 32, 64),
    "b_O": (64, 128, 256),
    "b_S": (2, 4, 8),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
LAYERS, HEADS, HEAD_DIM, HIDDEN, OUTER, RANK, EVICTED = 36, 2, 128, 2048, 11008, 32, 256


def workloads(batch: int, device: torch.device) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """``(operation, shape class, call)`` for every operation that decoding or a chunk's forward pass launches."""

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    for shape, rows in (("few", 1), ("many", max(batch, 16))):
        cached = randn(LAYERS, rows, HEADS, EVICTED, HEAD_DIM)
        width = (LAYERS, RANK, HEADS * HEAD_DIM)
        operands: tuple[Any, ...] = (
            randn(LAYERS, rows, RANK, RANK, dtype=torch.float32),
            cached,
            cached,
            torch.arange(EVICTED, device=device),
            randn(LAYERS, RANK, RANK),
            randn(*width),
            randn(*width),
            *(randn(rows, EVICTED, HEAD_DIM, dtype=torch.float32) for _ in range(2)),
        )
        yield "compress", shape, functools.partial(compress_, *operands, impl="triton")
    weights = randn(RANK, HIDDEN), randn(batch, RANK, RANK, dtype=torch.float32), randn(OUTER, RANK)
    hidden, onto = randn(4, EVICTED, HIDDEN), randn(4, EVICTED, OUTER)
    state = weights[1][:1].expand(4, -1, -1)
    for operation, shape in (("delta_read", "all"), ("delta_expand", "segment")):
        yield operation, shape, lambda: delta(hidden, weights[0], state, weights[2], onto=onto, impl="triton")
    token, bases = randn(batch, 1, HIDDEN), [randn(batch, 1, OUTER) for _ in range(2)]
    down = torch.cat([weights[0]] * 2)
    for operation, shape in (("delta_group_read", "all"), ("delta_expand", "decode")):
        yield (
            operation,
            shape,
            lambda: delta_group_(bases, token, down, weights[1], [weights[2]] * 2, [0.0] * 2, impl="triton"),
        )


def fastest(operation: str, shape: str, call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """The candidate with the least median time; the table's own entry is one of them."""
    import triton

    fields = sorted(FIELDS[operation])
    start = blocks_for(operation, torch.bfloat16, device, shape)
    grid = [dict(zip(fields, sizes, strict=True)) for sizes in itertools.product(*(CANDIDATES[f] for f in fields))]
    times = []
    for blocks in [start, *(entry for entry in grid if entry != start)]:
        table = {capability_of(device): {f"{operation}/{shape}/half": blocks}}
        with mock.patch("peft_pte.ops.tuning.read_file", return_value=table):
            try:
                times.append((triton.testing.do_bench(call, return_mode="median"), blocks))
            except triton.runtime.errors.OutOfResources:
                continue  # More shared memory than this GPU has: no candidate here.
    milliseconds, best = min(times, key=lambda entry: entry[0])
    print(f"{operation}/{shape}: {milliseconds:.4f} ms with {best} (table: {times[0][0]:.4f} ms)", flush=True)
    return best


def main(arguments: list[str] | None = None) -> None:
    """Time, and write the file.

    Raises:
        SystemExit: There is no CUDA device.
    """
    parser = argparse.ArgumentParser(prog="python -m peft_pte.ops.tune", description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="sequences that decode together")
    parser.add_argument("--dry-run", action="store_true", help="time and print; write nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(
            1, "`tune` needs a CUDA device, and there is none. The tables of peft_pte.ops.tuning stay in use.\n"
        )
    device = torch.device("cuda")
    found = {
        f"{operation}/{shape}/half": fastest(operation, shape, call, device)
        for operation, shape, call in workloads(options.batch, device)
    }
    if options.dry_run:
        return
    path = tuning_file()
    blocks: dict[str, Any] = {name: dict(table) for name, table in read_file(path).items()}
    blocks[capability_of(device)] = {**blocks.get(capability_of(device), {}), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "batch": options.batch}
    path.write_text(json.dumps({"about": about, "blocks": blocks}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
