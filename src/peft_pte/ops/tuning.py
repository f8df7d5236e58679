"""Block sizes by operation, shape class and dtype: one explicit table per GPU generation, and a file that overrides it.

The choice is a lookup and nothing else: a user's run times no block sizes, so a kernel rounds alike in two runs on one machine. ``python -m peft_pte.ops.tune`` times candidates on a GPU and writes the file
(``$PEFT_PTE_TUNING``, or ``peft_pte/tuning.json`` under the user's cache directory), which is read once per process.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

Blocks = Mapping[str, int]
Table = Mapping[str, Blocks]

# Never timed. Chosen so that ptxas reports no spilled registers for sm_90 at the shapes of ops/README.md in half precision,
# and otherwise by the arithmetic there.
_HOPPER: dict[str, Blocks] = {
    "compress/many/half": {"b_E": 64, "b_D": 16, "num_warps": 4, "num_stages": 3},
    "compress/few/half": {"b_E": 32, "b_D": 16, "num_warps": 4, "num_stages": 3},
    "compress/many/float32": {"b_E": 32, "b_D": 32, "num_warps": 4, "num_stages": 2},
    "compress/few/float32": {"b_E": 32, "b_D": 32, "num_warps": 4, "num_stages": 2},
    "compress/many/float64": {"b_E": 16, "b_D": 16, "num_warps": 4, "num_stages": 1},
    "compress/few/float64": {"b_E": 16, "b_D": 16, "num_warps": 4, "num_stages": 1},
    "encode/all/float32": {"b_E": 32, "b_D": 64, "num_warps": 4, "num_stages": 2},
    "encode/all/float64": {"b_E": 16, "b_D": 16, "num_warps": 8, "num_stages": 1},
    "encode_backward/all/float32": {"b_E": 32, "num_warps": 4, "num_stages": 2},
    "encode_backward/all/float64": {"b_E": 16, "num_warps": 8, "num_stages": 1},
    "delta_read/all/half": {"b_T": 64, "b_I": 64, "num_warps": 4, "num_stages": 3},
    "delta_read/all/float32": {"b_T": 32, "b_I": 64, "num_warps": 4, "num_stages": 2},
    "delta_read/all/float64": {"b_T": 16, "b_I": 32, "num_warps": 4, "num_stages": 1},
    "delta_expand/decode/half": {"b_N": 16, "b_O": 128, "num_warps": 4, "num_stages": 2},
    "delta_expand/decode/float32": {"b_N": 16, "b_O": 64, "num_warps": 4, "num_stages": 2},
    "delta_expand/decode/float64": {"b_N": 16, "b_O": 32, "num_warps": 4, "num_stages": 1},
    "delta_expand/segment/half": {"b_N": 64, "b_O": 128, "num_warps": 4, "num_stages": 2},
    "delta_expand/segment/float32": {"b_N": 32, "b_O": 64, "num_warps": 4, "num_stages": 2},
    "delta_expand/segment/float64": {"b_N": 16, "b_O": 32, "num_warps": 4, "num_stages": 1},
    "delta_state/all/half": {"b_T": 64, "num_warps": 4, "num_stages": 2},
    "delta_state/all/float32": {"b_T": 32, "num_warps": 4, "num_stages": 2},
    "delta_state/all/float64": {"b_T": 16, "num_warps": 4, "num_stages": 1},
    "delta_group_read/all/half": {"b_N": 16, "b_I": 128, "b_S": 4, "num_warps": 4, "num_stages": 3},
    "delta_group_read/all/float32": {"b_N": 16, "b_I": 64, "b_S": 4, "num_warps": 4, "num_stages": 2},
    "delta_group_read/all/float64": {"b_N": 16, "b_I": 32, "b_S": 2, "num_warps": 4, "num_stages": 1},
}
# Ampere has 164 KB of shared memory a multiprocessor where Hopper has 228, and the guesses stay below both.
GUESSES: dict[str, dict[str, Blocks]] = {"sm_80": _HOPPER, "sm_90": _HOPPER}

FIELDS: dict[str, frozenset[str]] = {key.split("/")[0]: frozenset(blocks) for key, blocks in _HOPPER.items()}
"""What a launch of each operation is told: block sizes by axis, warps per program, stages of the pipeline."""


def blocks_for(operation: str, dtype: torch.dtype, device: torch.device, shape: str = "all") -> dict[str, int]:
    """How to launch ``operation`` on ``device``: block sizes by axis, ``num_warps`` and ``num_stages``.

    Args:
        operation: A kernel, as in :data:`FIELDS`.
        dtype: Of what the kernel reads most of.
        device: Where it runs. A GPU without a table of its own takes that of the newest older one; a CPU (Triton's
            interpreter) that of Hopper.
        shape: The shape class, where the table tells several apart.

    Raises:
        KeyError: The table has no such operation and shape class.
        ValueError: The file named by ``PEFT_PTE_TUNING`` is not what ``python -m peft_pte.ops.tune`` writes.
    """
    name = "half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch.")
    key = f"{operation}/{shape}/{name}"
    capability = capability_of(device)
    measured = read_file(tuning_file()).get(capability, {})
    return dict(measured.get(key) or _guesses_of(capability)[key])


def capability_of(device: torch.device) -> str:
    """``"sm_90"`` for a GPU of compute capability 9.0; ``"interpreter"`` where there is none."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tuning_file() -> Path:
    """Where measured block sizes are kept: ``$PEFT_PTE_TUNING``, or a file under the user's cache directory."""
    named = os.environ.get("PEFT_PTE_TUNING")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "peft_pte" / "tuning.json"


@functools.cache
def read_file(path: Path) -> dict[str, dict[str, Blocks]]:
    """Measured block sizes by capability, empty where there is no file; read once per process.

    Raises:
        ValueError: The file holds something else.
    """
    if not path.exists():
        return {}
    try:
        tables: dict[str, dict[str, Blocks]] = json.loads(path.read_text())["blocks"]
        for table in tables.values():
            for key, blocks in table.items():
                if frozenset(blocks) != FIELDS[key.split("/")[0]] or not all(map(_is_power_of_2, blocks.values())):
                    raise ValueError(f"{key}: {blocks}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`PEFT_PTE_TUNING` must be a file written by `python -m peft_pte.ops.tune`, got {path} ({error}). Write it "
            "again, or remove it."
        ) from error
    return tables


def _guesses_of(capability: str) -> Table:
    def number(name: str) -> int:
        return int(name.removeprefix("sm_"))

    if capability == "interpreter":
        return GUESSES["sm_90"]
    older = [name for name in GUESSES if number(name) <= number(capability)]
    return GUESSES[max(older, key=number, default="sm_80")]


def _is_power_of_2(size: object) -> bool:
    # Stages may be any small number; 3 is the only one in use that is no power of 2.
    return isinstance(size, int) and size > 0 and (size & (size - 1) == 0 or size <= 8)
