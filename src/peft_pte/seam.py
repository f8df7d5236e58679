"""The adapted model as a call sees it: its layers, its encoders, and what callers said on this thread.

What is installed on the model, and what it calls, is in :mod:`peft_pte.tuner.install`.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from ._peft_type import PTE
from .cache.cache import PTECache, fingerprint
from .cache.rows import Rows
from .config import PTEConfig
from .eviction.policy import EvictionPolicy, make_policy
from .eviction.records import EvictionMemory, Evictions
from .host.compat import CACHE_METHOD, attention_of
from .host.sites import Site, find_sites
from .host.trial import counts_columns
from .method.encoder import CHILD_NAME, PTEEncoder
from .method.layer import PTELinear, weight_of
from .method.stacks import Stacks
from .passes.boundary import PromptSpec, PromptWatch
from .passes.layout import Layout
from .passes.statistics import Statistics

ATTRIBUTE = "_pte_seam"
SHORTEST_PASS = 512
"""Columns below which a pass costs time and saves no memory to speak of."""
NO_ADAPTER = (
    "`past_key_values` is a PTECache, but no PTE adapter is active: the base model would lose what was evicted. Enable the "
    "adapter, or leave the cache out."
)
# Attention that takes a mask of any form.
_MASKABLE = ("eager", "sdpa", "flex_attention")
_MASKED_BY_TENSOR = ("eager", "sdpa")


class Seam:
    """The adapted model as the replay sees it."""

    def __init__(self, model: PreTrainedModel) -> None:
        if not hasattr(model, "generate"):
            raise NotImplementedError(
                f"The model must have `generate`, got {type(model).__name__}, which writes no tokens: nothing thinks, and there "
                "is no cache to bound. Use LoRA for reward, classification and embedding models, or pass a causal LM "
                "(AutoModelForCausalLM)."
            )
        if not hasattr(model, CACHE_METHOD):
            raise NotImplementedError(
                f"`generate` of this transformers version has no `{CACHE_METHOD}`, so it cannot be given a bounded "
                "cache. Install a transformers version that peft-pte is tested with (see its README)."
            )
        self.model: Any = model
        self.text_config: Any = model.config.get_text_config(decoder=True)
        self.found = find_sites(model)
        self.backbone: Any = self.found.backbone
        self.counts_columns = counts_columns(self.backbone)
        # Whether the model takes no positions where its backbone does.
        self.keeps_positions = not self.counts_columns and counts_columns(model)
        self.wrappers = _wrappers(model, self.backbone)
        self.checkpointable: list[Any] = [
            module for module in self.backbone.modules() if hasattr(module, "gradient_checkpointing")
        ]
        self.statistics = Statistics()
        self.prompt_watch = PromptWatch(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.calls = Calls()
        self.stacks = Stacks()
        self.memory: EvictionMemory | None = None
        self.groups: dict[int, list[tuple[PTELinear, ...]]] = {}
        # A hook that dispatches weights over devices may have replaced the forward of the instance already.
        self.dispatched = self.backbone.__dict__.get("forward")

    def find_groups(self) -> None:
        """Note by layer which adapted linears read one and the same tensor, in the order in which they run."""
        self.groups = {index: [] for index in self.sites}
        linears = {name: module for name, module in self.model.named_modules() if isinstance(module, PTELinear)}
        for names in self.found.together:
            group = tuple(linears[name] for name in names if name in linears)
            if len(group) > 1 and len({linear.layer_index for linear in group}) == 1:
                self.groups[group[0].layer_index].append(group)

    @property
    def sites(self) -> dict[int, Site]:
        """The decoder layers, by their layer of the cache."""
        return self.found.by_index

    @property
    def borrows(self) -> bool:
        """Whether a layer reads the bounded keys and values of another."""
        return any(site.borrows for site in self.sites.values())

    @property
    def rotary(self) -> bool:
        """Whether positions are told by rotation, so that there is no last one."""
        return self.found.rotary

    @staticmethod
    def of(model: nn.Module) -> Seam | None:
        """The seam installed on ``model``, if any."""
        seam: Seam | None = getattr(model, ATTRIBUTE, None)
        return seam

    @staticmethod
    def require(model: nn.Module) -> Seam:
        """The seam installed on ``model``.

        Raises:
            RuntimeError: There is none.
        """
        seam = Seam.of(model)
        if seam is None:
            raise RuntimeError(
                f"{type(model).__name__} carries no PTE adapter. Use get_peft_model(model, PTEConfig(...))."
            )
        return seam

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own forward."""
        if self.dispatched is not None:
            return self.dispatched(*args, **kwargs)
        return type(self.backbone).forward(self.backbone, *args, **kwargs)

    def encoded_layers(self, adapter: str) -> list[int]:
        """Layers that have an encoder of ``adapter``."""
        return list(self.encoders(adapter))

    @property
    def layer_devices(self) -> list[torch.device]:
        """Where each layer is."""
        return [next(site.attention.parameters()).device for _, site in sorted(self.sites.items())]

    def adapter_dtype(self, layer_index: int, adapter: str) -> torch.dtype:
        """What the adapters of a layer compute in."""
        block = self.model.get_submodule(self.sites[layer_index].block)
        linears = (module for module in block.modules() if isinstance(module, PTELinear) and module.holds(adapter))
        return weight_of(next(linears).pte_down[adapter]).dtype

    def encoders(self, adapter: str) -> dict[int, PTEEncoder]:
        """The encoders of ``adapter``, by layer."""
        found: dict[int, PTEEncoder] = {}
        # Asked at every token: no function of ours is called for a layer.
        for index, site in self.found.by_index.items():
            encoder = site.attention._modules.get(CHILD_NAME)
            if isinstance(encoder, PTEEncoder) and adapter in encoder.settings:
                found[index] = encoder
        return found

    def encoder(self, layer_index: int) -> PTEEncoder:
        """The encoder of a layer that has one."""
        encoder: PTEEncoder = getattr(self.sites[layer_index].attention, CHILD_NAME)
        return encoder

    def active_adapter(self) -> str | None:
        """The PTE adapter in use, or ``None`` where the model is to be its base model.

        Raises:
            ValueError: The model carries adapters of another method too.
        """
        if len(configs := getattr(self.model, "peft_config", {})) > 1:
            refuse_other_methods(configs)
        for site in self.found.by_index.values():
            encoder = getattr(site.attention, CHILD_NAME, None)
            if encoder is not None and (adapter := encoder.current_adapter()) is not None:
                return adapter
        return None

    def config(self, adapter: str) -> PTEConfig:
        """The config of an adapter."""
        configs: dict[str, PTEConfig] = self.model.peft_config
        return configs[adapter]

    def new_cache(self, adapter: str, static: bool = False) -> PTECache:
        """An empty cache for ``adapter``.

        Raises:
            NotImplementedError: It is to be ``static``, and the adapter or the attention has no such form.
        """
        if static and attention_of(self.text_config) not in _MASKED_BY_TENSOR:
            raise NotImplementedError(
                f'`cache_implementation` must not be "static" with attn_implementation='
                f"{attention_of(self.text_config)!r}, which takes no tensor as a mask. Leave it unset, or load the "
                f"model with attn_implementation in {', '.join(map(repr, _MASKED_BY_TENSOR))}."
            )
        return PTECache(self.text_config, self.config(adapter), static=static)

    def refills_rows(self, adapter: str, static: bool = False) -> bool:
        """Whether a row can start again beside others: not where the model numbers columns, which are the same for all rows."""
        return not self.counts_columns and self.new_cache(adapter, static).refillable

    def require_adapter(self) -> str:
        """The PTE adapter in use.

        Raises:
            ValueError: None is.
        """
        adapter = self.active_adapter()
        if adapter is None:
            raise ValueError(NO_ADAPTER)
        return adapter

    def sharded(self) -> bool:
        """Whether the weights are spread over processes, which then gather them layer by layer (FSDP, ZeRO-3)."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        wrapped = (FSDPModule, FullyShardedDataParallel)
        if any(isinstance(module, wrapped) for module in self.model.modules()):
            return True
        # DeepSpeed marks the parameters that it partitions.
        return any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())

    def checkpoints_layers(self) -> bool:
        """Whether gradient checkpointing is on."""
        return self.backbone.training and any(module.gradient_checkpointing for module in self.checkpointable)

    @property
    def blocks(self) -> list[tuple[int, nn.Module]]:
        """The decoder layers, with their indices."""
        return [(index, self.model.get_submodule(site.block)) for index, site in self.sites.items()]

    def most_evictions(self, adapter: str) -> int:
        """Evictions of a chunk, at most: one where the next depends on what the chunk makes, or no mask could tell its tokens apart."""
        config = self.config(adapter)
        if not self.policy(adapter).uniform or not config.backprop_through_cache:
            return 1
        return config.evictions_per_window if attention_of(self.text_config) in _MASKABLE else 1

    def policy(self, adapter: str) -> EvictionPolicy:
        """What leaves the window of an adapter."""
        config = self.config(adapter)
        return make_policy(config.eviction, config.eviction_options)

    def remembers(self, adapter: str) -> bool:
        """Whether what leaves is to be remembered: somebody asked, something is chosen, and it is no evaluation."""
        return (
            self.memory is not None
            and self.model.training
            and self.config(adapter).cache_window is not None
            and not self.policy(adapter).uniform
        )

    def recall(self, adapter: str, ids: Tensor | None, mask: Tensor | None, cache: PTECache | None) -> Evictions | None:
        """What left sequences when they were written with an adapter, where that is remembered (:class:`EvictionMemory`)."""
        if self.memory is None or ids is None or cache is not None:
            return None
        return self.memory.recall(self.writer(adapter), ids, mask, counted=self.model.training)

    def writer(self, adapter: str) -> str:
        """Who writes with an adapter, as it is configured now."""
        return f"{adapter} {fingerprint(self.config(adapter))}"

    def pass_length(self, adapter: str) -> int:
        """Columns of a pass with gradients, at most."""
        config = self.config(adapter)
        return config.segment_length or max(config.cache_window or sys.maxsize, SHORTEST_PASS)

    def check_positions(self, length: int) -> None:
        """Refuse a prompt (or, with learned positions, a sequence) that the model has no positions for.

        Raises:
            ValueError: ``length`` is beyond ``max_position_embeddings``.
        """
        longest = getattr(self.text_config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ValueError(
                f"The input is {length} tokens long, and the model has positions for {longest} "
                "(`max_position_embeddings`). The prompt is never evicted and positions stay absolute: shorten it, or "
                "use a model with a longer range."
            )

    def note_cache(self, cache: Any) -> Generation | None:
        """Note what the ``generate`` that runs on this thread decodes with; returns it."""
        generation = self.calls.generations[-1] if self.calls.generations else None
        if generation is not None:
            generation.cache = cache
        return generation

    def generation(self, cache: PTECache | None) -> Generation | None:
        """The ``generate`` that runs on this thread and decodes with ``cache``, if any."""
        generations = self.calls.generations
        return generations[-1] if generations and cache is not None and generations[-1].cache is cache else None

    def observe(self, cache: PTECache, layout: Layout | None, evicted: bool) -> None:
        """Let the statistics see a call; ``layout`` is ``None`` where it was one token per row."""
        decoding = self.generation(cache) is not None
        self.statistics.observe(cache, layout, evicted, decoding, self.token_width)

    @functools.cached_property
    def token_width(self) -> int:
        """Numbers in the keys and values of one token, of all layers that a window bounds."""
        own = (site for site in self.sites.values() if site.evicts and not site.borrows)
        return sum(site.key_width + site.value_width for site in own)


def _wrappers(model: PreTrainedModel, backbone: nn.Module) -> list[nn.Module]:
    """Models around the backbone, where there are others between it and ``model``: they may embed its tokens and make its masks."""
    around = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        and part is not backbone
        and any(child is backbone for child in part.modules())
    ]
    return [*around] if len(around) > 1 else []


@dataclass
class Generation:
    """A ``generate`` that runs."""

    spec: PromptSpec
    cache: PTECache | None = None
    ends: list[int] | None = None
    """End-of-sequence tokens: what `generate` appends to a row behind one of them is padding."""
    padding_token: int | None = None
    """What it appends."""
    started: bool = False
    """Whether its first call is over: what comes is what it generates, one token per row."""
    shift: Tensor | None = None
    """``[B]``, by how much it counts the positions of a row too high; ``None``: not at all."""
    ids: Tensor | None = None
    """``[B, N]``, what it goes on from."""
    given: int | None = None
    """Columns that it began with."""
    record: bool = False
    """Whether it is noted what leaves."""
    asked: bool = False
    """Whether its caller asked for it, and not a trainer that remembers."""

    def take(self) -> PromptSpec:
        """What it says about its prompts, to the call that prefills them."""
        spec, self.spec = self.spec, PromptSpec()
        return spec

    def written(self, sequences: Tensor) -> int:
        """Tokens that it wrote in ``sequences [B, N]``, with the ends of rows and without what stands behind them."""
        new = sequences[:, self.given or 0 :]
        if not self.ends:
            return new.numel()
        ended = torch.isin(new, torch.tensor(self.ends, device=new.device)).long()
        return int((ended.cumsum(dim=1) == ended).sum())

    def note_ends(self, rows: Rows, ids: Tensor | None) -> None:
        """Note which of ``rows`` end with the last of ``ids [B, N]``."""
        if self.ends is None or ids is None:
            return
        last = ids[:, -1].to(rows.device)
        going_on = [last != end for end in self.ends]
        rows.note_ends(functools.reduce(torch.logical_and, going_on), self.padding_token)


@dataclass(frozen=True)
class OuterCall:
    """What a model around the backbone was called with, which it may not hand on as it got it."""

    model: nn.Module
    ids: Tensor | None
    mask: Any
    positions: Tensor | None


def refuse_other_methods(configs: Mapping[str, PeftConfig]) -> None:
    """Refuse adapters of other methods beside PTE's, which transformers' ``add_adapter`` lets in: one would wrap the layers of the other.

    Raises:
        ValueError: There are some.
    """
    others = {name: config.peft_type for name, config in configs.items() if config.peft_type != PTE}
    if others:
        named = ", ".join(f"{name!r} ({getattr(kind, 'value', kind)})" for name, kind in others.items())
        raise ValueError(
            f"A model with PTE adapters must not carry those of other methods, got {named}: each would save its weights under names that the other "
            "changes, and no file could be loaded. Use two models, or convert a LoRA with peft_pte.convert_lora."
        )


class Calls(threading.local):
    """What the calls of the causal LM that run on this thread said about their prompts."""

    def __init__(self) -> None:
        self.stack: list[PromptSpec] = []
        self.outer: list[OuterCall] = []
        self.generations: list[Generation] = []

    def take(self) -> PromptSpec:
        """What the call said; once, so that a call which never came to its end leaves nothing to the next one."""
        if not self.stack:
            return PromptSpec()
        spec, self.stack[-1] = self.stack[-1], PromptSpec()
        return spec

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()
