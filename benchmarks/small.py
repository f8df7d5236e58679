"""What the benchmarks on small models trained from scratch share: the model, its optimizer, where it is kept, their options."""

from __future__ import annotations

import argparse
import ast
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

LEARNING_RATE = 3e-3


def small_llama(
    vocabulary: int, layers: int, positions: int, *, bos: int, eos: int | None, pad: int
) -> LlamaForCausalLM:
    """A Llama of width 64 with 4 heads and random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=positions,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
            tie_word_embeddings=False,
        )
    )


def gone(thought: Tensor, window: int, evict: int) -> Tensor:
    """How many thoughts have left the window when the one in column ``thought`` (counted from 0) is computed.

    Thoughts fill the window; then ``evict`` of them leave whenever one must be written and there is no room.
    """
    return torch.where(thought < window, 0, ((thought - window) // evict + 1) * evict)


class Training:
    """AdamW with clipped gradients; the learning rate rises linearly, then falls linearly to a floor."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        rate: float = LEARNING_RATE,
        rise: int,
        decay: int,
        floor: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=weight_decay, betas=betas)
        self.schedule = LambdaLR(self.optimizer, lambda step: min((step + 1) / rise, max(floor, 1 - step / decay)))

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient of ``loss``."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()


def kept(path: Path, make: Callable[[], LlamaForCausalLM], device: str) -> LlamaForCausalLM:
    """The model at ``path``, made and saved there if it is not."""
    if not (path / "config.json").exists():
        make().save_pretrained(path)
    return LlamaForCausalLM.from_pretrained(path).to(device)


def digest(model: nn.Module) -> str:
    """Tells whether two runs started from the same weights: training from scratch ends elsewhere on another machine."""
    hashed = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        hashed.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def same_base(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``results`` themselves, if those of one seed of the base model started from the same weights.

    Raises:
        ValueError: They did not, so their arms cannot be compared.
    """
    found: dict[int, set[str]] = {}
    for result in results:
        found.setdefault(result["settings"].get("base_seed", result["seed"]), set()).add(result["base_weights"])
    mixed = sorted(seed for seed, digests in found.items() if len(digests) > 1)
    if mixed:
        raise ValueError(
            f"Results of one seed must share their base model, got several for seed {', '.join(map(str, mixed))} (it is not "
            "the same on every machine). Run all arms of a seed on one machine."
        )
    return results


def assignment(text: str) -> tuple[str, Any]:
    """``FIELD=VALUE`` of a command line; a value that is no Python literal is a string."""
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, got {text!r}. Write e.g. update_gain=1.0.")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value


def add_run_options(runner: argparse.ArgumentParser, arms: Iterable[str], output: Path | None) -> None:
    """Options of every `run`."""
    add = runner.add_argument
    add("--arm", nargs="+", choices=list(arms), default=["pte"])
    add("--seed", nargs="+", type=int, default=[0])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=None, help="threads of torch on a CPU")
    add("--output", type=Path, default=output)
