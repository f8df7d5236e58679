"""`python -m benchmarks.rl run --arm pte --seed 0`, `python -m benchmarks.rl report`."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch

from ..small import add_run_options, assignment
from .model import CHECKPOINTS, base_model
from .run import QUICK_RESULTS, RESULTS, name_of, run, save, settings_for, summary
from .train import ARMS, PROTOCOLS


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train and evaluate one arm, or several")
    add_run_options(runner, ARMS, None)
    add = runner.add_argument
    add("--protocol", nargs="+", choices=list(PROTOCOLS), default=["warm"], help="GRPO at once, or after a short SFT")
    add("--set", nargs="+", type=assignment, default=[], metavar="FIELD=VALUE", help="fields of PTEConfig")
    add(
        "--setting",
        nargs="+",
        type=assignment,
        default=[],
        metavar="FIELD=VALUE",
        help="fields of Settings (train.py)",
    )
    add("--suffix", default=None, help="of the run's name; default: what --set and --setting say")
    add("--quick", action="store_true", help="a few small steps, to see that everything runs")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="where base models are kept")
    reporter = commands.add_parser("report", help="the table and the figure from the results")
    reporter.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "report":
        from .report import report

        print(report(arguments.results))
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    for seed in arguments.seed:
        for protocol in arguments.protocol:
            for arm in arguments.arm:
                _run(arguments, arm, protocol, seed)


def _run(arguments: argparse.Namespace, arm: str, protocol: str, seed: int) -> None:
    overrides, changes = dict(arguments.set), dict(arguments.setting)
    settings = settings_for(arm, protocol, arguments.quick, overrides=overrides, **changes)
    changed = "-".join(f"{field}-{value}" for field, value in [*arguments.set, *arguments.setting]) or None
    command = f"python -m benchmarks.rl run --arm {arm} --protocol {protocol} --seed {seed}"
    for option, pairs in (("--set", arguments.set), ("--setting", arguments.setting)):
        command += "".join([f" {option}", *(f" {field}={value}" for field, value in pairs)]) if pairs else ""
    command += " --quick" if arguments.quick else ""
    name = name_of(settings, arguments.suffix or changed)
    base = base_model(settings.base_seed, settings.layers, arguments.device, arguments.checkpoints)
    result = run(base, settings, seed, command, name, arguments.quick)
    save(result, arguments.output or (QUICK_RESULTS if arguments.quick else RESULTS))
    print(summary(result), flush=True)


if __name__ == "__main__":
    main()
