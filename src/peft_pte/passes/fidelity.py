"""How near a bounded policy is to its full cache, token by token, and by how much had left the window."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..config import PTEConfig
from ..seam import Seam
from .boundary import Columns, PromptSpec, find_prompt_ends
from .modes import as_base, evaluating
from .statistics import Scored

DISTANCES = (1.0, 2.0, 4.0)
"""Windows of thoughts, up to which a token counts as near: within the first nothing has left."""
PERCENTILE = 0.05
_LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Fidelity:
    """Two policies at ``N`` tokens that were written."""

    log_ratio: Tensor
    """``[N]``, log of the token's probability under the bounded policy over that on the full cache."""
    kl: Tensor
    """``[N]``, KL from the bounded policy to the full cache's, in nats: the bounded one weighs."""
    windows: Tensor
    """``[N]``, how many thoughts the row holds with this one, in windows; 0 where the cache is unbounded."""

    @staticmethod
    def joined(parts: Sequence[Fidelity]) -> Fidelity:
        """All tokens of several."""
        return Fidelity(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("log_ratio", "kl", "windows"))
        )

    def gathered(self, gather: Callable[[Tensor], Tensor]) -> Fidelity:
        """With the tokens of other processes: ``gather`` takes ``[N, 3]``, and may fill rows up with NaN."""
        rows = gather(torch.stack([self.log_ratio, self.kl, self.windows.to(self.kl.dtype)], dim=1))
        return Fidelity(*rows[~rows[:, 2].isnan()].unbind(dim=1))

    def figures(self) -> dict[str, Tensor]:
        """``ratio_p5``, the 5th percentile of the ratio over tokens (Sparrow, arXiv 2606.08446), ``kl``, and ``kl_to_1w``, ``kl_to_2w``, ``kl_to_4w``
        and ``kl_beyond``: means over the tokens that so many windows hold; NaN where there are none.
        """
        found = {"ratio_p5": self.log_ratio.quantile(PERCENTILE).exp(), "kl": self.kl.mean()}
        low = -1.0
        for high in DISTANCES:
            found[f"kl_to_{high:g}w"] = self.kl[(self.windows > low) & (self.windows <= high)].mean()
            low = high
        return found | {"kl_beyond": self.kl[self.windows > low].mean()}


@torch.no_grad()
def fidelity(
    hidden: tuple[Tensor, Tensor],
    heads: tuple[nn.Module, nn.Module],
    tokens: Tensor,
    windows: Tensor,
    config: PretrainedConfig,
    temperature: float = 1.0,
) -> Fidelity:
    """Compare two policies where they predict ``tokens``, a few at once: no more than 64 MiB of logits of each exist.

    Args:
        hidden: ``[N, H]`` each, what the bounded and the full-cache backbone give for the tokens before.
        heads: Their output embeddings.
        tokens: ``[N]``, what was written.
        windows: ``[N]``, see :class:`Fidelity`.
        config: Of the text model, which says what it does to the logits of its head.
        temperature: By which they are divided.

    """
    ratios, divergences = [torch.empty(0, device=tokens.device)], [torch.empty(0, device=tokens.device)]
    at_once = max(1, _LOGITS_AT_ONCE // config.vocab_size)
    for start in range(0, len(tokens), at_once):
        part = slice(start, start + at_once)
        bounded, full = (
            (logits_of(head, rows[part], config) / temperature).log_softmax(dim=-1)
            for head, rows in zip(heads, hidden, strict=True)
        )
        at = tokens[part, None]
        ratios.append((bounded.gather(1, at) - full.gather(1, at))[:, 0])
        gap = bounded - full
        # What both forbid counts for nothing.
        divergences.append((bounded.exp() * gap).masked_fill(bounded == -math.inf, 0.0).sum(dim=-1))
    return Fidelity(torch.cat(ratios), torch.cat(divergences), windows)


def text_fidelity(seam: Seam, text: Scored) -> Fidelity:
    """Score the thoughts of a text in the bounded cache, and by the base model on its full cache: two calls, without gradients or dropout.

    Args:
        seam: Of the adapted model; an adapter is active.
        text: Its ``N`` tokens are those behind the prompts.

    Raises:
        NotImplementedError: The weights are spread over processes.
    """
    if seam.sharded():
        raise NotImplementedError(
            "A text cannot be scored on the full cache beside a training whose weights are sharded (FSDP, ZeRO-3). Leave `full_cache_kl` out, and ask "
            "the saved adapter: `model.report(input_ids, attention_mask)`."
        )
    model, ids = seam.model, text.ids
    real = torch.ones_like(ids, dtype=torch.bool) if text.mask is None else text.mask.bool()
    first = torch.full_like(ids[:, 0], ids.shape[1]) if text.first is None else text.first.to(ids.device)
    window = seam.config(seam.require_adapter()).cache_window
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    with torch.no_grad(), evaluating(model):
        bounded = model.base_model(**arguments, prompt_length=first)[0]
        head = model.get_output_embeddings()
        with as_base(model):
            full = full_cache_forward(model, **arguments)[0]
    chosen = (real & (torch.arange(ids.shape[1], device=ids.device) >= first[:, None]))[:, 1:]
    return fidelity(
        (bounded[:, :-1][chosen.to(bounded.device)], full[:, :-1][chosen.to(full.device)]),
        (head, base_of(head)),
        ids[:, 1:][chosen],
        windows_held(window, real, first)[:, 1:][chosen],
        seam.text_config,
    )


def full_cache_forward(model: Any, attention_mask: Tensor, **arguments: Any) -> Any:
    """What the backbone of ``model`` gives, which is its base at the moment (:func:`peft_pte.passes.modes.as_base`)."""
    backbone = model.base_model
    if "position_ids" in inspect.signature(backbone.forward).parameters and "pixel_values" not in arguments:
        # Padding in front of a row would count as positions.
        arguments["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return backbone(attention_mask=attention_mask, **arguments)


def base_of(head: nn.Module) -> nn.Module:
    """The head of the base model, which a trained copy (``modules_to_save``) does not replace."""
    return head.original_module if isinstance(head, AuxiliaryTrainingWrapper) else head


def logits_of(head: nn.Module, hidden: Tensor, config: PretrainedConfig) -> Tensor:
    """What a causal LM of transformers makes of its head's output, in float32: it may scale (Cohere, Granite, Falcon-H1) and cap (Gemma) it.

    Args:
        head: Its output embeddings.
        hidden: ``[N, H]``.
        config: Of its text model.
    """
    logits: Tensor = head(hidden).float()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
            break
    else:
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits * divisor if config.model_type == "hyperclovax" else logits / divisor
    softcap: float | None = getattr(config, "final_logit_softcapping", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def windows_of(config: PTEConfig, ids: Tensor, mask: Tensor, columns: int) -> Tensor:
    """``[B, columns]``, how many thoughts a row holds with each of its last ``columns`` tokens, in windows of ``config``.

    Args:
        config: Of the adapter; with a ``prompt_end``.
        ids: ``[B, N]``.
        mask: ``[B, N]``, 0 for padding.
        columns: How many of the last columns are asked for.
    """
    real = mask.bool()
    first = find_prompt_ends(
        config.prompt_end, PromptSpec(), Columns(ids, real, (ids.shape[0], ids.shape[1]), ids.device), None
    ).first
    return windows_held(config.cache_window, real, first)[:, -columns:]


def windows_held(window: int | None, real: Tensor, first: Tensor | None) -> Tensor:
    """``[B, N]``, how many thoughts a row holds with each token, in windows; 0 without a ``window``.

    Args:
        window: Thoughts.
        real: ``[B, N]``, False for padding.
        first: ``[B]``, first thought column of each row; ``None``: all are thoughts.
    """
    if window is None:
        return torch.zeros(real.shape, device=real.device)
    thoughts = real.long().cumsum(dim=1)
    if first is not None:
        prompt = real & (torch.arange(real.shape[1], device=real.device) < first[:, None])
        thoughts = thoughts - prompt.sum(dim=1, keepdim=True)
    return thoughts.clamp(min=0) / window
