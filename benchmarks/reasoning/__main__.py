"""`python -m benchmarks.reasoning run --arm pte --task products`, `python -m benchmarks.reasoning report`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import transformers

from ..machine import ROOT
from ..small import assignment
from .run import RESULTS, run, save
from .settings import ARMS, settings_for
from .task import TASKS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(prog="python -m benchmarks.reasoning", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train and evaluate; several arms, tasks and seeds one after the other")
    runner.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    runner.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    runner.add_argument("--seed", nargs="+", type=int, help="default: 0; with --long 0 1 2")
    form = runner.add_mutually_exclusive_group()
    form.add_argument("--quick", dest="form", action="store_const", const="quick", help="two steps: everything runs")
    form.add_argument("--roomy", dest="form", action="store_const", const="roomy", help="at most 96 tokens of thought")
    form.add_argument("--long", dest="form", action="store_const", const="long", help="for a GPU")
    runner.set_defaults(form="default")
    runner.add_argument("--set", nargs="+", type=assignment, default=[], metavar="FIELD=VALUE", help="of PTEConfig")
    runner.add_argument("--steps", type=int)
    runner.add_argument("--learning-rate", type=float)
    runner.add_argument("--model", help="hub id or local folder")
    runner.add_argument("--dtype", help="of the base model")
    runner.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    runner.add_argument("--threads", type=int, help="of torch on a CPU")
    runner.add_argument(
        "--output", type=Path, help="default: benchmarks/reasoning/results; with --quick outputs/reasoning"
    )
    reporter = commands.add_parser("report", help="the tables to the terminal, and the figures")
    reporter.add_argument("--results", type=Path, default=RESULTS)
    return whole


def main(arguments: list[str] | None = None) -> None:
    """Do as the command line says."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(words)
    if options.command == "report":
        from .report import report

        print(report(options.results))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    output = options.output or (ROOT / "outputs" / "reasoning" if options.form == "quick" else RESULTS)
    for seed in options.seed or ([0, 1, 2] if options.form == "long" else [0]):
        for task in options.task:
            for arm in options.arm:
                settings = settings_for(
                    arm,
                    task,
                    options.form,
                    overrides=dict(options.set),
                    steps=options.steps,
                    learning_rate=options.learning_rate,
                    model=options.model,
                    dtype=options.dtype,
                )
                result = run(settings, seed, options.device, _command(words), options.form)
                print(f"Wrote {save(result, output)}", flush=True)


def _command(words: list[str]) -> str:
    """As typed, without what names a place on the machine."""
    kept = [word for index, word in enumerate(words) if "--output" not in (word, words[index - 1])]
    return " ".join(["python -m benchmarks.reasoning", *kept])


if __name__ == "__main__":
    main()
