"""Records of runs: what tells two of them apart, where each is kept, and what in it is not the protocol's.

A record's file is named after everything that its figures depend on, so no run overwrites another; the same evaluation of further
test sets is added to its record. ``changed`` names what differs from the protocol: `table.py` sets beside the paper only
records where that is nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from arms import ARMS, STATE_UPDATE, adapter_config, short_name
from peft import PeftConfig

from peft_pte import PTEConfig

RESULTS = Path(__file__).resolve().parent / "results"
FULL = "full"
# What makes an adapter the protocol's, by method.
PTE_FIELDS = (
    *("r", "num_global_tokens", "cache_window", "evict_ratio", "eviction", "state_update", "state_address"),
    *("encoder_attention", "update_gain", "key_rotation", "backprop_through_cache", "alpha"),
)
LORA_FIELDS = ("r", "lora_alpha")


def changed_arguments(
    args: argparse.Namespace, parser: argparse.ArgumentParser, names: Collection[str]
) -> dict[str, Any]:
    """Those of ``names`` whose values are not the defaults, which are the protocol's."""
    return {name: getattr(args, name) for name in names if getattr(args, name) != parser.get_default(name)}


def changed_adapter(arm: str, config: PeftConfig) -> dict[str, Any]:
    """Fields of an adapter's config that are not those of its arm in the protocol."""
    return differing(config, adapter_config(arm))


def differing(config: PeftConfig, expected: PeftConfig) -> dict[str, Any]:
    """Fields of ``config`` that decide what is learned and are not those of ``expected``, a config of the same method."""
    fields = PTE_FIELDS if isinstance(expected, PTEConfig) else LORA_FIELDS
    return {name: getattr(config, name) for name in fields if getattr(config, name) != getattr(expected, name)}


def check_adapter(arm: str, model: str, config: PeftConfig) -> None:
    """Refuse to file an adapter under an arm, or a model, that is not its own.

    Raises:
        ValueError: It was trained as another arm, or on another model.
    """
    found = "lora"
    if isinstance(config, PTEConfig):
        found = next(name for name, update in STATE_UPDATE.items() if update == config.state_update)
        if config.state_update == "progressive" and config.num_global_tokens == 0:
            found = "no_global"
    if found != arm:
        raise ValueError(f"`--arm` must be what the adapter was trained as, {found} ({ARMS[found]}), got {arm}.")
    base = short_name(config.base_model_name_or_path or "")
    if base and base != short_name(model):
        raise ValueError(f"`--model` must be the adapter's own, {config.base_model_name_or_path}, got {model}.")


def weights_digest(adapter: Path) -> str:
    """Tells two adapters apart that were trained alike."""
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]


def path_of(folder: Path, identity: dict[str, Any], *names: Any) -> Path:
    """The file of the record that ``identity`` tells from all others; ``names`` are for its reader."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return folder / ("-".join([*map(str, names), digest]) + ".json")


def write(path: Path, record: dict[str, Any]) -> None:
    """Write ``record``; scores of other test sets that the file holds stay in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "scores" in record and path.exists():
        record = {**record, "scores": {**json.loads(path.read_text())["scores"], **record["scores"]}}
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
