"""``python -m peft_pte PROGRAM ARGUMENTS...``: run another package's command with the method registered.

Programs that load an adapter by its folder know peft's own methods alone. Started so they know this one: ``python -m peft_pte lm_eval run --model hf
--model_args pretrained=BASE,peft=ADAPTER --tasks gsm8k``. It reaches this process; processes that the program starts have to import the package
themselves.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import peft_pte as peft_pte

_START_OTHERS = ("trl", "accelerate", "torchrun", "deepspeed")
"""Commands that do their work in processes which they start."""


def main() -> None:
    """Run the command that the first argument names.

    Raises:
        SystemExit: There is none of that name, it does its work in other processes, or the command ends so.
    """
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    if sys.argv[1] in _START_OTHERS:
        raise SystemExit(
            f"{sys.argv[1]!r} starts processes of its own, which would not know the method. Import peft_pte in the script that it starts; for TRL's own "
            "scripts examples/trl_script.py does."
        )
    found = entry_points(group="console_scripts", name=sys.argv[1])
    if not found:
        raise SystemExit(
            f"No installed package has the command {sys.argv[1]!r}. Give the name that it has in a terminal, as lm_eval, "
            "or import peft_pte in a script of your own."
        )
    command = next(iter(found)).load()
    sys.argv = sys.argv[1:]
    raise SystemExit(command())


if __name__ == "__main__":
    main()
