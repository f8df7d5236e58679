"""``python -m benchmarks run ...`` measures, ``python -m benchmarks report`` renders."""

from __future__ import annotations

import sys

USAGE = "usage: python -m benchmarks {run,report} ... (each takes --help)"


def main() -> None:
    """Hand over to the command named first."""
    command, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "run":
        from .run import main as run

        run(rest)
    elif command == "report":
        from .report import main as report

        report(rest)
    else:
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
