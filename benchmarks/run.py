"""Run benchmarks: ``python -m benchmarks run decode|compress|delta|train|flops|cost|token|settings|protocol|figures|all [--quick]``.

One JSON per case goes into one folder; ``python -m benchmarks report`` makes tables and plots of them. On a GPU the whole
set stays within ``--budget`` seconds, 500 unless told; what did not fit is in the JSONs, and said to be left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from . import compress, cost, decode, delta, flops, protocol, settings, token, train
from .cases import GPU_SHAPES, SHAPES
from .machine import RESULTS, ROOT, ceilings, provenance
from .session import Session
from .timing import Budget

SCHEMA = 1
CASES = {
    "delta": delta,
    "compress": compress,
    "decode": decode,
    "train": train,
    "flops": flops,
    "cost": cost,
    "token": token,
    "settings": settings,
    "protocol": protocol,
}
UNTIMED = ("flops", "cost", "token", "settings", "protocol")
SHARES = {"delta": 0.06, "compress": 0.08, "decode": 0.50, "train": 0.36}
"""Of the budget. `flops`, `cost`, `token`, `settings` and `protocol` run on the CPU and take what they take: run them on their own."""
DEFAULT_SET = ("delta", "compress", "decode", "train")


def main(arguments: list[str] | None = None) -> None:
    """Run the cases named and write their results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks run", description=__doc__)
    parser.add_argument(
        "case",
        choices=[*CASES, "figures", "all"],
        help="all: everything that is timed; figures, flops, cost, token, settings and protocol need no GPU and run on their own",
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="default: three true shapes on a GPU, a tiny one on a CPU"
    )
    parser.add_argument("--peers", nargs="+", help="only these peers")
    parser.add_argument(
        "--quick", action="store_true", help="small, on the CPU, in minutes; its times are good for ratios only"
    )
    parser.add_argument("--budget", type=float, help="seconds for the whole set (default: 500 on a GPU, 240 on a CPU)")
    parser.add_argument(
        "--output", type=Path, help="folder (default: benchmarks/results, or outputs/benchmarks with --quick)"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.case == "figures":
        from . import figures

        figures.main([*(["--quick"] if options.quick else []), *rest])
        return
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    prepare()
    device = torch.device("cpu" if options.quick or not torch.cuda.is_available() else "cuda")
    output = options.output or (ROOT / "outputs" / "benchmarks" if options.quick else RESULTS)
    words = ["python -m benchmarks run", options.case]
    words += [f"--shapes {' '.join(options.shapes)}"] if options.shapes else []
    words += [f"--peers {' '.join(options.peers)}"] if options.peers else []
    words += ["--quick"] if options.quick else []
    source = provenance(" ".join(words))
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    names = DEFAULT_SET if options.case == "all" else (options.case,)
    limits: dict[str, float] = {}
    if not set(names) <= set(UNTIMED):
        limits = ceilings(device, dtype)
        rates = f"{limits['bytes_per_second'] / 1e9:,.0f} GB/s, {limits['flop_per_second'] / 1e12:,.2f} TFLOP/s"
        print(f"{source['gpu'] if gpu else source['cpu']}: {rates}", flush=True)
    total = options.budget or (500 if gpu else 240)
    shapes = tuple(options.shapes or (GPU_SHAPES if gpu else ("tiny",)))
    whole = Budget(total)
    for index, name in enumerate(names):
        # What one case leaves goes to those after it.
        share = SHARES[name] / sum(SHARES[later] for later in names[index:]) if len(names) > 1 else 1.0
        budget = Budget(whole.left * share)
        session = Session(
            device, dtype, options.quick, budget, limits, shapes, tuple(options.peers) if options.peers else None
        )
        run_case(name, session, source, output)


def prepare() -> None:
    """Quiet, and offline; one thread on a CPU, as models this small gain nothing from more."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def run_case(name: str, session: Session, source: dict[str, Any], output: Path) -> Path:
    """Run one case; its file is rewritten after each row, so that a run that is cut off leaves what it had."""
    suffix = "" if session.peers is None else "-" + "-".join(session.peers)
    path = output / f"{name}{suffix}.json"
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    content = {
        "schema": SCHEMA,
        "case": name,
        "source": source,
        "device": session.device.type,
        "dtype": str(session.dtype).removeprefix("torch."),
        "quick": session.quick,
        "ceilings": session.ceilings,
        "rows": rows,
    }
    start = time.monotonic()
    for row in CASES[name].measure(session):
        rows.append(row)
        print(f"{name}: {_brief(row)}", flush=True)
        if name not in UNTIMED:
            content["seconds"] = time.monotonic() - start
        path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Wrote {shlex.quote(str(path))}: {len(rows)} rows in {time.monotonic() - start:.0f} s", flush=True)
    return path


def _brief(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
    )
