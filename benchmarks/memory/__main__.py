"""`python -m benchmarks.memory run --arm pte --seed 0`, `python -m benchmarks.memory report`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from ..small import add_run_options
from .run import ABLATIONS, RESULTS, run, save, settings_for, summary
from .train import ARMS


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="adapt and evaluate one arm, or several")
    add_run_options(runner, ARMS, RESULTS)
    runner.add_argument("--ablation", nargs="+", choices=list(ABLATIONS), default=[None])
    runner.add_argument("--short", action="store_true", help="traces of 96 thoughts, fewer steps")
    reporter = commands.add_parser("report", help="tables and the figure from the results")
    reporter.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "report":
        from .report import report

        print(report(arguments.results))
        return
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    for seed in arguments.seed:
        for arm in arguments.arm:
            for ablation in arguments.ablation:
                name = "-".join(part for part in ("short" if arguments.short else None, arm, ablation) if part)
                options = f"--arm {arm} --seed {seed}" + (f" --ablation {ablation}" if ablation else "")
                command = f"python -m benchmarks.memory run {options}" + (" --short" if arguments.short else "")
                settings = settings_for(arm, ablation, arguments.short)
                result = run(settings, seed, arguments.device, command, name, arguments.short)
                save(result, arguments.output)
                print(summary(result), flush=True)


if __name__ == "__main__":
    main()
