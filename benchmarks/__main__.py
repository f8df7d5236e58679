"""``python -m benchmarks`` lists the questions, ``... run QUESTION`` measures, ``... report`` writes tables and figures into the pages."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from pathlib import Path

from .questions import QUESTIONS, module, overview


def main(words: list[str] | None = None) -> None:
    """Do as the command line says."""
    words = sys.argv[1:] if words is None else words
    if not words:
        print(overview())
    elif words[0] == "report":
        report(words[1:])
    elif words[0] == "run" and len(words) > 1 and words[1] in QUESTIONS and words[1] != "kernels":
        run(words[1], words[2:])
    else:
        sys.exit(overview())


def run(name: str, words: list[str]) -> None:
    """Measure a question; each record is written when it is there, and what is known is not measured again."""
    import torch
    import transformers

    from .common.records import FILE, FOLDER, ROOT, Results, provenance
    from .common.session import Session
    from .common.timing import Budget

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    measure = module(name, "measure")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks run {name}", description=measure.__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small, on the CPU, to see that it runs; to outputs/benchmarks"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--output", type=Path, help="folder of the results, in place of benchmarks/")
    parser.add_argument("--threads", type=int, help="of torch on a CPU (default: 1)")
    parser.set_defaults(part=None, shapes=None, peers=None, file=FILE)
    if hasattr(measure, "add_options"):
        measure.add_options(parser)
    options = parser.parse_args(words)
    gpu = torch.cuda.is_available() and not options.quick and "GPU" in QUESTIONS[name].wants
    if not gpu:
        # Models this small gain nothing from more threads, and one sums in one order.
        torch.set_num_threads(options.threads or 1)
    kept = [
        word for at, word in enumerate(words) if "--output" not in (word, words[max(at - 1, 0)]) and word != "--fresh"
    ]
    source = provenance(shlex.join(["python", "-m", "benchmarks", "run", name, *kept]))
    folder = (options.output or (ROOT / "outputs" / "benchmarks" if options.quick else FOLDER)) / name
    results = Results(folder / options.file, measure.KEY, source, options.fresh)
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    count = 0
    session = Session(device, dtype, options, results, Budget(float("inf")), shapes=tuple(options.shapes or ()))
    for record in measure.measure(session):
        results.append(record)
        count += 1
        print(f"{name}: {measure.summary(record) if hasattr(measure, 'summary') else brief(record)}", flush=True)
    print(f"{count} records to {results.path}")


def brief(record: dict[str, object]) -> str:
    """A record in a line."""
    pairs = ((key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in record.items())
    return ", ".join(f"{key}={value}" for key, value in pairs)


def report(words: list[str]) -> None:
    """Write the sections of questions into their pages, and draw their figures."""
    from .common.records import FOLDER

    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="default: all")
    parser.add_argument("--results", type=Path, default=FOLDER, help="the folder that `run --output` was given")
    parser.add_argument("--stdout", action="store_true", help="print the tables; write nothing")
    options = parser.parse_args(words)
    for name in options.questions or QUESTIONS:
        reporting = module(name, "report")
        for section in reporting.SECTIONS:
            if options.stdout:
                print(section.block(options.results / name) + "\n")
            else:
                section.write(options.results / name)
                print(f"Wrote {section.marker} of {section.page}")
        if not options.stdout and hasattr(reporting, "draw"):
            reporting.draw(options.results / name)


if __name__ == "__main__":
    main()
