"""How near a bounded policy is to its full cache, token by token, and by how much had left the window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from peft_pte.config import PTEConfig
from peft_pte.passes.boundary import Columns, PromptSpec, find_prompt_ends

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
    if config.cache_window is None:
        return torch.zeros(ids.shape[0], columns, device=ids.device)
    first = find_prompt_ends(
        config.prompt_end, PromptSpec(), Columns(ids, real, (ids.shape[0], ids.shape[1]), ids.device), None
    ).first
    thoughts = real.long().cumsum(dim=1)
    if first is not None:
        prompt = real & (torch.arange(ids.shape[1], device=ids.device) < first[:, None])
        thoughts = thoughts - prompt.sum(dim=1, keepdim=True)
    return (thoughts.clamp(min=0) / config.cache_window)[:, -columns:]
