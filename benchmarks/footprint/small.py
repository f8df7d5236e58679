"""What is measured on small random models, one function a part."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..common.accounting import PeakMemory, allocator_peak, storage_bytes
from ..common.arithmetic import full_cache_bytes, kv_bytes_per_token, pte_cache_bytes
from ..common.models import (
    SMALL_ADAPTER,
    SMALL_MODELS,
    TRUE_SHAPES,
    prompts,
    shaped_base,
    small_base,
    with_lora,
    with_pte,
)

Row = dict[str, Any]


@torch.no_grad()
def cache_bytes(window: int, multiples: list[float], prompt_lengths: list[int], policies: list[str]) -> Iterator[Row]:
    """Bytes of the cache while decoding, ours and the base model's own, after each multiple of the window."""
    shape = {"batch": len(prompt_lengths), "prompt": max(prompt_lengths)}
    for family in SMALL_MODELS:
        base = small_base(family)
        for thoughts, held in _decode(base, DynamicCache(config=base.config), window, multiples, prompt_lengths):
            computed = full_cache_bytes(base.config, length=thoughts, itemsize=4, **shape)
            where = {"model": family, **shape, "window": window, "thoughts": thoughts}
            yield {**where, "cache": "base model", "bytes": held, "bytes_computed": computed}
        for policy in policies:
            model = with_pte(small_base(family), cache_window=window, eviction=policy, **SMALL_ADAPTER)
            for thoughts, held in _decode(model, model.base_model.new_cache(), window, multiples, prompt_lengths):
                computed = None
                # Before its first update a state is one copy for all sequences; what heads choose for themselves has no formula.
                if thoughts > window and policy == "sliding_window":
                    computed = pte_cache_bytes(
                        base.config,
                        window=window,
                        masked=True,
                        itemsize=4,
                        **shape,
                        **SMALL_ADAPTER,
                    )
                where = {"model": family, **shape, "window": window, "thoughts": thoughts}
                yield {**where, "cache": f"PTE, {policy}", "bytes": held, "bytes_computed": computed}


def _decode(
    model: Any, cache: Any, window: int, multiples: list[float], prompt_lengths: list[int]
) -> list[tuple[int, int]]:
    batch = prompts(prompt_lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    marks = [int(multiple * window) for multiple in multiples]
    found = []
    # The call that decodes thought k + 1 writes thought k.
    for written in range(max(marks) + 1):
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        ids = output.logits[:, -1:].argmax(dim=-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        if written in marks:
            found.append((written, storage_bytes(cache)))
    return found


def training_peak(
    window: int, multiples: list[float], prompt: int, methods: list[str], families: list[str], check: float
) -> Iterator[Row]:
    """Peak bytes of one training step, above the weights; at the multiple ``check`` also as the allocator counts."""
    for family in families:
        for method in methods:
            model = _trainable(family, method, window)
            for multiple in multiples:
                batch = _scoring_batch(prompt, int(multiple * window))
                model.zero_grad()
                gc.collect()
                with PeakMemory() as memory:
                    loss = model(**batch).loss
                    held = memory.live
                    loss.backward()
                    del loss
                model.zero_grad()
                gc.collect()
                allocator = allocator_peak(partial(_step, model, batch)) if multiple == check else None
                yield {
                    "model": family,
                    "method": method,
                    "batch": 1,
                    "prompt": prompt,
                    "window": window,
                    "completion": int(multiple * window),
                    "peak_bytes": memory.peak,
                    "held_for_backward_bytes": held,
                    "allocator_peak_bytes": allocator,
                    "kv_bytes_per_token": kv_bytes_per_token(model.config, 4),
                    "hidden_bytes_per_token": model.config.hidden_size * 4,
                }


def _step(model: Any, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()


def _trainable(family: str, method: str, window: int) -> Any:
    extra = {
        "pte": {},
        "pte, detached cache": {"backprop_through_cache": False},
        "pte, key_diff": {"eviction": "key_diff"},
        "lora": {},
    }[method]
    model = with_pte(small_base(family), cache_window=window, **SMALL_ADAPTER, **extra)
    if method == "lora":
        targets = model.peft_config["default"].target_modules
        model = with_lora(model.unload(), SMALL_ADAPTER["r"], targets)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _scoring_batch(prompt: int, completion: int) -> dict[str, Tensor]:
    batch = prompts([prompt + completion])
    labels = batch["input_ids"].clone()
    labels[:, :prompt] = -100
    return {**batch, "labels": labels}


@torch.no_grad()
def replay_error(
    window: int, multiple: int, prompt_lengths: list[int], dtypes: list[str], families: list[str]
) -> Iterator[Row]:
    """Largest |log-prob difference| between decoding and scoring; the same of the base model on its own full cache."""
    for family in families:
        for attention in ("sdpa", "eager"):
            for dtype in dtypes:
                # transformers' eager attention takes its softmax in float32, where the mask of float64 is infinite and a
                # row of padding 0 / 0. So float64 under eager gets prompts of one length.
                padded = not (dtype == "float64" and attention == "eager")
                lengths = prompt_lengths if padded else [max(prompt_lengths)] * len(prompt_lengths)
                where = {"model": family, "attention": attention, "dtype": dtype, "prompts": lengths}
                where |= {"thoughts": multiple * window, "window": window}
                for policy in (None, "sliding_window", "key_diff"):
                    model = small_base(family, getattr(torch, dtype), attention)
                    if policy is not None:
                        fields = {"cache_window": window, "eviction": policy, "init_weights": False, **SMALL_ADAPTER}
                        model = with_pte(model, **fields).eval()
                    error, rollout, replay = _replay(model, prompts(lengths), multiple * window)
                    ours = policy is not None
                    yield {
                        **where,
                        "cache": f"PTE, {policy}" if ours else "base model",
                        "evictions": rollout.evictions if ours else 0,
                        "max_abs_log_prob_difference": error,
                        "thoughts_that_differ": _thoughts_that_differ(rollout, replay) if ours else 0.0,
                    }


def _replay(model: Any, batch: dict[str, Tensor], thoughts: int) -> tuple[float, Any, Any]:
    """The error, the cache after decoding, the cache after scoring."""
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
    width, sampler = ids.shape[1], torch.Generator().manual_seed(0)
    rows, decoded = ids, []
    for _ in range(thoughts):
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        # By hand rather than by `generate`, which rounds its logits to float32.
        log_probs = output.logits[:, -1].double().log_softmax(dim=-1)
        ids = torch.multinomial(log_probs.exp(), 1, generator=sampler)
        decoded.append(log_probs.gather(1, ids))
        rows, mask = torch.cat([rows, ids], dim=1), torch.cat([mask, torch.ones_like(ids)], dim=1)
    labels = rows.clone()
    labels[:, :width] = -100
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    output = model(input_ids=rows, attention_mask=mask, position_ids=positions, labels=labels, use_cache=True)
    scored = output.logits[:, width - 1 : -1].double().log_softmax(dim=-1).gather(2, rows[:, width:, None])[..., 0]
    return float((scored - torch.cat(decoded, dim=1)).abs().max()), cache, output.past_key_values


def _thoughts_that_differ(rollout: Any, replay: Any) -> float:
    """Share of thoughts held after decoding, over layers, rows and heads, that are not held after scoring."""
    differ = []
    for index, _ in rollout.thought_layers:
        # As sets: one token more or less would shift all slots behind it.
        kept, found = (cache.window_positions(index) for cache in (rollout, replay))
        # Slots that were never written, or are free again, hold no thought.
        gone = (kept[..., :, None] != found[..., None, :]).all(dim=-1)[kept >= 0]
        differ.append(gone.float().mean())
    return float(torch.stack(differ).mean())


def parameters(true_rank: int) -> Iterator[Row]:
    """Trained parameters beside LoRA of equal rank on the same linears; true shapes on the meta device."""
    for name in (*SMALL_MODELS, *TRUE_SHAPES):
        true = name in TRUE_SHAPES
        fields = {"r": true_rank, "num_global_tokens": true_rank} if true else SMALL_ADAPTER
        base = shaped_base(name) if true else small_base(name)
        total = base.num_parameters()
        model = with_pte(base, meta=true, **fields)
        trained = {key: value.numel() for key, value in model.named_parameters() if value.requires_grad}
        encoder = sum(count for key, count in trained.items() if ".thought_encoder." in key)
        targets = model.peft_config["default"].target_modules
        lora = with_lora(model.unload(), fields["r"], targets, meta=true)
        yield {
            "model": name,
            "true_shape": true,
            **fields,
            "target_modules": sorted(targets),
            "base_parameters": total,
            "pte_trained": sum(trained.values()),
            "pte_encoder": encoder,
            "lora_trained": sum(value.numel() for value in lora.parameters() if value.requires_grad),
        }
