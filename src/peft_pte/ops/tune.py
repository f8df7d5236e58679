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

from .compress import compress_
from .delta import delta, delta_add_, delta_read
from .encode import encode
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
    token, base, down = randn(batch, 1, HIDDEN), randn(batch, OUTER), torch.cat([weights[0]] * 2)
    yield "delta_group_read", "all", lambda: delta_read(token, down, weights[1], impl="triton")

    def whole_token() -> None:
        for read in delta_read(token, down, weights[1], impl="triton"):
            delta_add_(base, read, weights[2], scale=0.0, impl="triton")

    yield "delta_expand", "decode", whole_token


def call_of(
    operation: str, dtype: torch.dtype, shape: str, device: torch.device, impl: str
) -> Callable[[], torch.Tensor]:
    """A call of ``operation`` by ``impl``, always on the same numbers; those with gradients are taken with them."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32, generator=generator).to(dtype)

    rows = 1 if shape == "few" else 32
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state, width = randn(rows, RANK, RANK, dtype=wide), HEADS * HEAD_DIM
    if operation == "compress":
        cached = [randn(4, rows, HEADS, EVICTED, HEAD_DIM) for _ in range(2)]
        slots = torch.arange(EVICTED, device=device).expand(rows, -1)
        operands: Any = [*cached, slots, randn(4, RANK, RANK), randn(4, RANK, width), randn(4, RANK, width)]
        states = state.expand(4, -1, -1, -1).contiguous()

        def compress() -> torch.Tensor:
            after = states.clone()
            compress_(after, *operands, impl=impl)
            return after

        return compress
    down, up, hidden = randn(RANK, HIDDEN) / HIDDEN**0.5, randn(HIDDEN, RANK), randn(rows, EVICTED, HIDDEN)
    if operation == "delta_token":
        token, base, group = hidden[:, :1].contiguous(), randn(rows, HIDDEN), torch.cat([down] * 3)

        def read_token() -> torch.Tensor:
            after = base.clone()
            for read in delta_read(token, group, state, impl=impl):
                delta_add_(after, read, up, scale=1 / RANK, impl=impl)
            return after

        return read_token
    operands = [hidden, down, state, up]
    if operation == "encode":
        evicted = [randn(rows, 1, EVICTED, width) for _ in range(2)]
        operands = [state, randn(RANK, RANK), *evicted, randn(RANK, width), randn(RANK, width)]
    operands = [operand.requires_grad_() for operand in operands]
    compute = delta if operation == "delta" else encode

    def with_gradients() -> torch.Tensor:
        with torch.enable_grad():
            result = compute(*operands, impl=impl)
            torch.autograd.grad(result.sum(), operands)
        return result.detach()

    return with_gradients


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
