"""What is installed on a transformers model: the seam between its callers and its backbone.

``generate``, a loss, TRL's fused head and a plain call all end in the backbone's forward, so that is where the cache
policy lives (:mod:`peft_pte.replay`). Two things are known only further out and are handed in: the labels, which stop at
the causal LM and say where prompts end (a forward hook), and the cache that ``generate`` would make
(``_prepare_cache_for_generation``). Everything is installed on the instance and removed by :meth:`Seam.remove`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)

from .boundary import PromptSpec, PromptWatch
from .cache import PTECache
from .config import PTEConfig
from .decode import prepare, step
from .encoder import CHILD_NAME, PTEEncoder
from .layer import PTELinear, weight_of, without_lora_arguments
from .layout import Layout
from .replay import run
from .sites import find_backbone, find_sites
from .static_cache import StaticPTECache
from .statistics import Statistics

_ATTRIBUTE = "_pte_seam"
_HOOKED_METHOD = "_prepare_cache_for_generation"
_MASKS_METHOD = "create_masks_for_generate"
LOADER_METHOD = "_load_pretrained_model"
"""What transformers loads an adapter's weights with; :mod:`peft_pte.checkpoints` watches it on the instance."""
_NO_ADAPTER = (
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
        if not hasattr(model, _HOOKED_METHOD):
            raise NotImplementedError(
                f"`generate` of this transformers version has no `{_HOOKED_METHOD}`, so it cannot be given a bounded "
                "cache. Install a transformers version that peft-pte is tested with (see its README)."
            )
        self.model: Any = model
        self.text_config: Any = model.config.get_text_config(decoder=True)
        self.sites = find_sites(model)
        self.backbone: Any = find_backbone(model, next(iter(self.sites.values())).attention_name)
        self.rotary = any(site.rotation is not None or site.rotation_error for site in self.sites.values())
        self.checkpointable: list[Any] = [
            module for module in self.backbone.modules() if hasattr(module, "gradient_checkpointing")
        ]
        self.statistics = Statistics()
        self.prompt_watch = PromptWatch(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self._calls = _Calls()
        self._install()
        self._hooks.append(self.model.register_forward_pre_hook(without_lora_arguments, with_kwargs=True))

    @staticmethod
    def of(model: nn.Module) -> Seam | None:
        """The seam installed on ``model``, if any."""
        seam: Seam | None = getattr(model, _ATTRIBUTE, None)
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

    def _install(self) -> None:
        # A hook that dispatches weights over devices may have replaced the forward of the instance already.
        self._inner = self.backbone.__dict__.get("forward")
        self.backbone.forward = _bound(_backbone_forward, self.backbone, type(self.backbone).forward)
        setattr(self.backbone, _ATTRIBUTE, self)
        setattr(self.model, _ATTRIBUTE, self)
        original = getattr(type(self.model), _HOOKED_METHOD)
        self.model._prepare_cache_for_generation = _bound(_prepare_cache, self.model, original)
        self.model.generate = _bound(_generate, self.model, type(self.model).generate)
        self.model.create_masks_for_generate = functools.partial(_create_masks, self.model)
        self.model.generate_batch = functools.partial(_refuse_generate_batch, self.model)
        self._hooks = [
            self.model.register_forward_pre_hook(_enter_call, with_kwargs=True),
            self.model.register_forward_hook(_leave_call, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Give the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        del self.backbone.forward
        if self._inner is not None:
            self.backbone.forward = self._inner
        for name in (_HOOKED_METHOD, _MASKS_METHOD, LOADER_METHOD, "generate", "generate_batch"):
            self.model.__dict__.pop(name, None)
        for module in (self.model, self.backbone):
            module.__dict__.pop(_ATTRIBUTE, None)
        for site in self.sites.values():
            if hasattr(site.attention, CHILD_NAME):
                delattr(site.attention, CHILD_NAME)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own forward."""
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        return type(self.backbone).forward(self.backbone, *args, **kwargs)

    def encoded_layers(self, adapter: str) -> list[int]:
        """Layers that have an encoder of ``adapter``."""
        return [
            index
            for index, site in self.sites.items()
            if hasattr(site.attention, CHILD_NAME) and self.encoder(index).holds(adapter)
        ]

    @property
    def layer_devices(self) -> list[torch.device]:
        """Where each layer is."""
        return [next(site.attention.parameters()).device for _, site in sorted(self.sites.items())]

    def adapter_dtype(self, layer_index: int, adapter: str) -> torch.dtype:
        """What the adapters of a layer compute in."""
        block = self.model.get_submodule(self.sites[layer_index].block)
        linears = (module for module in block.modules() if isinstance(module, PTELinear) and module.holds(adapter))
        return weight_of(next(linears).pte_down[adapter]).dtype

    def encoder(self, layer_index: int) -> PTEEncoder:
        """The encoder of a layer that has one."""
        encoder: PTEEncoder = getattr(self.sites[layer_index].attention, CHILD_NAME)
        return encoder

    def active_adapter(self) -> str | None:
        """The PTE adapter in use, or ``None`` where the model is to be its base model."""
        for site in self.sites.values():
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
        if static and self.text_config._attn_implementation not in _MASKED_BY_TENSOR:
            raise NotImplementedError(
                f'`cache_implementation` must not be "static" with attn_implementation='
                f"{self.text_config._attn_implementation!r}, which takes no tensor as a mask. Leave it unset, or load the "
                f"model with attn_implementation in {', '.join(map(repr, _MASKED_BY_TENSOR))}."
            )
        return (StaticPTECache if static else PTECache)(self.text_config, self.config(adapter))

    def require_adapter(self) -> str:
        """The PTE adapter in use.

        Raises:
            ValueError: None is.
        """
        adapter = self.active_adapter()
        if adapter is None:
            raise ValueError(_NO_ADAPTER)
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
        """Evictions that one pass of the layers may span.

        Raises:
            NotImplementedError: `segment_length` asks for several, and the attention takes no mask that could tell its
                tokens what each may see.
        """
        config = self.config(adapter)
        most = config.evictions_per_segment
        if most == 1 or self.text_config._attn_implementation in _MASKABLE:
            return most
        if config.segment_length is None:
            return 1
        raise NotImplementedError(
            f"`segment_length` must be {config.tokens_per_eviction} with attn_implementation="
            f"{self.text_config._attn_implementation!r}, which takes no masks, got {config.segment_length}. Leave it out, or "
            f"load the model with attn_implementation in {', '.join(map(repr, _MASKABLE))}."
        )

    def attention_mask(
        self,
        cache: PTECache,
        positions: Tensor,
        valid: Tensor | None,
        columns: Tensor | None,
        evictions: int,
        prepared: bool = False,
    ) -> Any:
        """The mask the backbone is given before ``T`` tokens are written, in slot order.

        2D (``None``: nothing is hidden); as the attention wants it where the tokens span several evictions or it must be
        ``prepared``; or one per layer type where sliding layers count columns.
        """
        slots = cache.slot_mask(valid, positions.shape[1])
        sliding = any(cache.is_sliding)
        if not (sliding or prepared or evictions > 1):
            return slots
        arguments: dict[str, Any] = {
            "config": self.text_config,
            "inputs_embeds": torch.empty(*positions.shape, 0, dtype=self.model.dtype, device=positions.device),
            "past_key_values": cache,
            "position_ids": positions,
        }
        visible = _still_there(cache) if evictions > 1 else None
        full = create_causal_mask(attention_mask=slots, and_mask_function=visible, **arguments)
        if not sliding:
            return full
        return {
            "full_attention": full,
            "sliding_attention": create_sliding_window_causal_mask(attention_mask=columns, **arguments),
        }

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
        generation = self._calls.generations[-1] if self._calls.generations else None
        if generation is not None:
            generation.cache = cache
        return generation

    def generation(self, cache: PTECache | None) -> Generation | None:
        """The ``generate`` that runs on this thread and decodes with ``cache``, if any."""
        generations = self._calls.generations
        return generations[-1] if generations and cache is not None and generations[-1].cache is cache else None

    def observe(self, cache: PTECache, layout: Layout, evicted: bool) -> None:
        """Let the statistics see a call."""
        self.statistics.observe(cache, layout, evicted, decoding=self.generation(cache) is not None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the backbone's forward."""
        arguments = kwargs
        if args:
            arguments = inspect.signature(type(self.backbone).forward).bind(self.backbone, *args, **kwargs).arguments
            arguments = {**arguments, **arguments.pop("kwargs", {})}
            arguments.pop("self", None)
        adapter = self.active_adapter()
        if adapter is None:
            if isinstance(arguments.get("past_key_values"), PTECache):
                raise ValueError(_NO_ADAPTER)
            return self.inner(**arguments)
        return run(self, adapter, arguments, self._calls.take())


@dataclass
class Generation:
    """A ``generate`` that runs."""

    spec: PromptSpec
    cache: PTECache | None = None

    def take(self) -> PromptSpec:
        """What it says about its prompts, to the call that prefills them."""
        spec, self.spec = self.spec, PromptSpec()
        return spec


class _Calls(threading.local):
    """What the calls of the causal LM that run on this thread said about their prompts."""

    def __init__(self) -> None:
        self.stack: list[PromptSpec] = []
        self.generations: list[Generation] = []

    def take(self) -> PromptSpec:
        """What the call said; once, so that a call which never came to its end leaves nothing to the next one."""
        if not self.stack:
            return PromptSpec()
        spec, self.stack[-1] = self.stack[-1], PromptSpec()
        return spec

    def __deepcopy__(self, memo: dict[int, Any]) -> _Calls:
        return _Calls()

    def __reduce__(self) -> tuple[type[_Calls], tuple[()]]:
        return _Calls, ()


def _still_there(cache: PTECache) -> Callable[[Any, Any, Any, Any], Any]:
    """Which slots the tokens of a pass over several evictions may see: the first ``m`` all, the next ``m`` fewer, ..."""
    _, layer = cache.thought_layers[0]
    prompt, start, step = layer.prompt, layer.slots, cache.tokens_per_eviction

    def visible(batch_index: Any, head_index: Any, query_index: Any, slot: Any) -> Any:
        gone = (query_index - start) // step * step
        return (slot < prompt) | (slot >= prompt + gone)

    return visible


def _bound(function: Callable[..., Any], module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` bound to ``module``, with the signature of ``original``.

    A partial and not a method: methods are copied and pickled by their name, which would find the original.
    """
    # Without the annotations, which pickle refuses; the signature is that of `__wrapped__`.
    names = ("__module__", "__name__", "__qualname__", "__doc__")
    return functools.update_wrapper(functools.partial(function, module), original, assigned=names, updated=())


def _is_step(arguments: dict[str, Any]) -> bool:
    """Whether these are the arguments of a step that :func:`prepare` prepared."""
    mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
    return isinstance(cache, StaticPTECache) and cache.step_prepared and mask is not None and mask.ndim == 4


def _backbone_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_step(kwargs):
        return step(getattr(self, _ATTRIBUTE), kwargs["past_key_values"], *args, **kwargs)
    return _replayed_forward(self, *args, **kwargs)


@torch.compiler.disable(recursive=False)
def _replayed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(self, _ATTRIBUTE).forward(*args, **kwargs)


def _create_masks(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``create_masks_for_generate``, which ``generate`` calls outside of what it compiles."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, StaticPTECache):
        seam: Seam = getattr(self, _ATTRIBUTE)
        return prepare(seam, cache, kwargs.get("position_ids"), kwargs.get("attention_mask"), kwargs["inputs_embeds"])
    original = getattr(type(self), _MASKS_METHOD, None)
    return (create_masks_for_generate if original is None else functools.partial(original, self))(*args, **kwargs)


def _enter_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # A step on a static cache is traced as one graph, and has no labels.
    if _is_step(kwargs):
        return args, kwargs
    return _note_call(model, args, kwargs)


@torch.compiler.disable
def _note_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if getattr(model, "_is_replica", False):
        raise NotImplementedError(
            "torch.nn.DataParallel copies a model without its seam, so its replicas would run on the first device's weights. "
            "Use one process per device (`accelerate launch`, torchrun), or make one device visible."
        )
    named = kwargs
    if args:
        named = {**inspect.signature(type(model).forward).bind_partial(model, *args).arguments, **kwargs}
    kwargs = dict(kwargs)
    spec = PromptSpec(named.get("labels"), named.get("shift_labels"), kwargs.pop("prompt_length", None))
    getattr(model, _ATTRIBUTE)._calls.stack.append(spec)
    return args, kwargs


def _leave_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if _is_step(kwargs):
        kwargs["past_key_values"].step_prepared = False
    else:
        _forget_call(model)


@torch.compiler.disable
def _forget_call(model: nn.Module) -> None:
    stack = getattr(model, _ATTRIBUTE)._calls.stack
    if stack:
        stack.pop()


def _generate(self: Any, *args: Any, prompt_length: Any = None, **kwargs: Any) -> Any:
    """``generate``, which also takes ``prompt_length``, and decodes with the bounded cache whatever `use_cache` says."""
    seam: Seam = getattr(self, _ATTRIBUTE)
    adapter = seam.active_adapter()
    if adapter is not None and seam.config(adapter).cache_window is not None:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
        if kwargs.get("use_cache", config.use_cache) is False:
            # Trainers turn the cache off where gradients are checkpointed; the policy is the same with it, and the cache is bounded.
            kwargs["use_cache"] = True
    seam._calls.generations.append(Generation(PromptSpec(length=prompt_length)))
    try:
        return type(self).generate(self, *args, **kwargs)
    finally:
        seam._calls.generations.pop()


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
) -> Any:
    seam: Seam = getattr(self, _ATTRIBUTE)
    adapter = seam.active_adapter()
    if adapter is not None:
        made = False
        _refuse_generation(generation_config, bounded=seam.config(adapter).cache_window is not None)
        if model_kwargs.get("past_key_values") is None:
            static = generation_config.cache_implementation == "static"
            model_kwargs["past_key_values"] = seam.new_cache(adapter, static)
            made = True
        generation = seam.note_cache(model_kwargs["past_key_values"])
        if generation is not None:
            prefill = _prefill_columns(generation_config, model_kwargs, generation_mode)
            generation.spec = replace(generation.spec, prefill=prefill)
        if made:
            return None
    return getattr(type(self), _HOOKED_METHOD)(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)


def _prefill_columns(generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any) -> int | None:
    """Columns of the input where the first call holds more than the prompt: an assistant's first candidates."""
    if generation_mode != GenerationMode.ASSISTED_GENERATION:
        return None
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.shape[1])
    # `generate` drops a mask of ones, but has added the prompt to the length that was asked for.
    new_tokens = generation_config.max_new_tokens
    return None if new_tokens is None else int(generation_config.max_length - new_tokens)


def _refuse_generation(generation_config: Any, bounded: bool) -> None:
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        raise NotImplementedError(
            f'`cache_implementation` must be unset or "static" while a PTE adapter is active, got '
            f"{generation_config.cache_implementation!r}: the cache belongs to the method. Set the window in PTEConfig."
        )
    if generation_config.prefill_chunk_size is not None and bounded:
        raise NotImplementedError(
            f"`prefill_chunk_size` must be unset under a bounded cache, got {generation_config.prefill_chunk_size}: the "
            "prompt is what the prefill holds, and later chunks would count as thoughts."
        )


def _refuse_generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(self, _ATTRIBUTE).active_adapter() is None:
        return type(self).generate_batch(self, *args, **kwargs)
    raise NotImplementedError(
        "`generate_batch` (continuous batching) pages a full cache and has no thought state. Use `generate`; in TRL, "
        "use_transformers_continuous_batching=False."
    )
