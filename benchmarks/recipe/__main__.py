"""`python -m benchmarks.recipe run --task permutation --arm slots --stages distil:400 --seed 0`, `... report`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from ..machine import ROOT
from .run import RESULTS, TASKS, name_of, run, save, summary
from .train import ARMS, Settings, Stage

RATES = {"supervise": 6e-3, "distil": 6e-3, "grpo": 3e-4, "lora": 3e-3}


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser(
        "run", help="train and evaluate; a run that is there is left out, one that died goes on"
    )
    add = runner.add_argument
    add("--task", choices=list(TASKS), default="permutation")
    add("--arm", nargs="+", choices=list(ARMS), default=["slots"])
    add("--stages", nargs="+", required=True, help="KIND:STEPS[,rate=R][,beta=B][,schedule=constant], in order")
    add("--range", action="store_true", help="draw the window of every batch")
    add("--seed", nargs="+", type=int, default=[0])
    add("--base-seed", type=int, default=None, help="of the base model, if not the seed")
    add("--probe-every", type=int, default=0, help="steps between two evaluations on the way")
    add("--threads", type=int, default=None)
    add("--output", type=Path, default=RESULTS)
    add("--checkpoints", type=Path, default=ROOT / "outputs" / "recipe")
    reporter = commands.add_parser("report", help="tables and figures from the results")
    reporter.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "report":
        from .report import report

        print(report(arguments.results))
        return
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    stages = tuple(Stage.parse(text, RATES) for text in arguments.stages)
    for seed in arguments.seed:
        for arm in arguments.arm:
            settings = Settings(
                task=arguments.task, arm=arm, stages=stages, ranged=arguments.range, probe_every=arguments.probe_every
            )
            name = name_of(settings)
            if (arguments.output / f"{name}-seed-{seed}.json").exists():
                print(f"{name} seed {seed} is there", flush=True)
                continue
            command = f"python -m benchmarks.recipe run --task {arguments.task} --arm {arm} --stages {' '.join(arguments.stages)} --seed {seed}"
            command += "".join(
                f" {option}"
                for option, given in (
                    ("--range", arguments.range),
                    (f"--probe-every {arguments.probe_every}", arguments.probe_every),
                    (f"--base-seed {arguments.base_seed}", arguments.base_seed is not None),
                )
                if given
            )
            result = run(settings, seed, command, arguments.checkpoints, arguments.base_seed)
            save(result, arguments.output)
            print(summary(result), flush=True)


if __name__ == "__main__":
    main()
