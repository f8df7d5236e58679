"""What a generation under a bounded cache cannot do, or one of many requests in few rows."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.generation.configuration_utils import GenerationMode

from ..seam import Seam

_RECORDED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def refuse_generation(config: Any, bounded: bool) -> None:
    """Refuse what no generation can do while an adapter is active.

    Raises:
        NotImplementedError: It is asked for.
    """
    if config.cache_implementation not in (None, "dynamic", "static"):
        instead = " For many requests call `generate_batch`." if config.cache_implementation == "paged" else ""
        raise NotImplementedError(
            f'`cache_implementation` must be unset or "static" while a PTE adapter is active, got '
            f"{config.cache_implementation!r}: the cache belongs to the method. Set the window in PTEConfig.{instead}"
        )
    if config.prefill_chunk_size is not None and bounded:
        raise NotImplementedError(
            f"`prefill_chunk_size` must be unset under a bounded cache, got {config.prefill_chunk_size}: the "
            "prompt is what the prefill holds, and later chunks would count as thoughts."
        )


def refuse_batch(seam: Seam, adapter: str, config: Any) -> None:
    """Refuse what `generate_batch` cannot do.

    Raises:
        NotImplementedError: It is asked for.
        ValueError: The options contradict each other.
    """
    bounded = seam.config(adapter).cache_window is not None
    refuse_generation(config, bounded)
    if not bounded:
        raise NotImplementedError(
            "`generate_batch` needs rows of constant size, so PTEConfig(cache_window=...), got None. Use `generate`; in TRL, "
            "use_transformers_continuous_batching=False."
        )
    static = config.cache_implementation == "static"
    if not seam.refills_rows(adapter, static):
        instead = "Leave `cache_implementation` unset, or use" if static and not seam.counts_columns else "Use"
        raise NotImplementedError(
            "`generate_batch` refills rows, and this model (its positions, or its sliding attention at fixed addresses) counts columns, which are "
            f"the same for all rows. {instead} `generate`; in TRL, use_transformers_continuous_batching=False."
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotImplementedError(
            f"`generate_batch` decodes greedily or samples, got options of {mode.value}. Use `generate`, or num_beams=1 without an assistant."
        )
    recorded = [name for name in _RECORDED if getattr(config, name, False)]
    if recorded:
        raise NotImplementedError(
            f"`{recorded[0]}` must be unset in `generate_batch`, whose result has no place for it. Use `generate`, or ask for log-probs: "
            "ContinuousBatchingConfig(return_logprobs=True)."
        )
    if seam.sharded():
        raise NotImplementedError(
            "`generate_batch` takes as many steps as the requests of its own process need, and the weights of this model are spread over "
            "processes that take them together. Use `generate`; in TRL, use_transformers_continuous_batching=False."
        )


def refuse_manager() -> NoReturn:
    """Refuse transformers' own continuous batching while an adapter is active.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        "transformers' continuous batching pages a full cache and has no thought state. Use `model.generate_batch`, which refills rows of a "
        "bounded cache, or `generate`."
    )
