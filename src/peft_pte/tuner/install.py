"""What is installed on a transformers model, on the instance, and removed again.

``generate``, a loss, TRL's fused head and a plain call all end in the backbone's forward, so that is where a call is run
(:mod:`peft_pte.passes.run`); what happens to the window happens in the decoder layers, whose forwards are wrapped (:mod:`peft_pte.passes.block`). Two things
are known only further out and are handed in: the labels, which stop at the causal LM and say where prompts end (a forward hook),
and the cache that ``generate`` would make (``_prepare_cache_for_generation``).
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from ..cache.cache import PTECache
from ..config import PTEConfig
from ..eviction.policy import make_policy
from ..host.attention import give_back, make_watchable
from ..host.compat import CACHE, CACHE_METHOD, FORMER_CACHE, LOADER_METHOD, MASKS_METHOD, cache_in
from ..method.encoder import CHILD_NAME
from ..method.layer import without_lora_arguments
from ..passes.block import unwrap, wrap
from ..passes.boundary import PromptSpec
from ..passes.recorded import check_given, check_recorded, remember
from ..passes.run import run
from ..passes.token import prepare, step
from ..rollout.api import generate_batch
from ..rollout.refusals import refuse_generation, refuse_manager
from ..seam import ATTRIBUTE, NO_ADAPTER, Generation, OuterCall, Seam

_HOOKS = "_pte_hooks"
_MANAGERS = ("init_continuous_batching", "continuous_batching_context_manager")
_ROW_BY_ROW = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
_GENERATION = ("generate", "generate_batch", "prepare_inputs_for_generation", *_MANAGERS)


def install(model: PreTrainedModel) -> Seam:
    """Install everything; returns the seam."""
    seam = Seam(model)
    backbone, host = seam.backbone, seam.model
    backbone.forward = _bound(_backbone_forward, backbone, type(backbone).forward)
    setattr(backbone, ATTRIBUTE, seam)
    setattr(host, ATTRIBUTE, seam)
    setattr(host, CACHE_METHOD, _bound(_prepare_cache, host, getattr(type(host), CACHE_METHOD)))
    host.generate = _bound(_generate, host, type(host).generate)
    host.prepare_inputs_for_generation = _bound(_prepare_inputs, host, type(host).prepare_inputs_for_generation)
    host.create_masks_for_generate = functools.partial(_create_masks, host)
    host.generate_batch = _bound(_generate_batch, host, type(host).generate_batch)
    for name in _MANAGERS:
        setattr(host, name, functools.partial(_continuous_batching, name, host))
    hooks = [
        host.register_forward_pre_hook(_enter_call, with_kwargs=True),
        host.register_forward_hook(_leave_call, with_kwargs=True, always_call=True),
        host.register_forward_pre_hook(without_lora_arguments, with_kwargs=True),
    ]
    for wrapper in seam.wrappers:
        hooks.append(wrapper.register_forward_pre_hook(functools.partial(_enter_wrapper, seam), with_kwargs=True))
        hooks.append(wrapper.register_forward_hook(functools.partial(_leave_wrapper, seam), always_call=True))
    setattr(host, _HOOKS, hooks)
    for index, layer in seam.blocks:
        wrap(layer, seam.sites[index])
    return seam


def remove(seam: Seam) -> None:
    """Give the model back as it was."""
    host, backbone = seam.model, seam.backbone
    for hook in host.__dict__.pop(_HOOKS):
        hook.remove()
    for _, layer in seam.blocks:
        unwrap(layer)
    del backbone.forward
    if seam.dispatched is not None:
        backbone.forward = seam.dispatched
    for name in (CACHE_METHOD, MASKS_METHOD, LOADER_METHOD, *_GENERATION):
        host.__dict__.pop(name, None)
    for module in (host, backbone):
        module.__dict__.pop(ATTRIBUTE, None)
    for site in seam.sites.values():
        give_back(site.attention)
        if hasattr(site.attention, CHILD_NAME):
            delattr(site.attention, CHILD_NAME)


def _bound(function: Callable[..., Any], module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` bound to ``module``, with the signature of ``original``.

    A partial and not a method: methods are copied and pickled by their name, which would find the original.
    """
    # Without the annotations, which pickle refuses; the signature is that of `__wrapped__`.
    names = ("__module__", "__name__", "__qualname__", "__doc__")
    return functools.update_wrapper(functools.partial(function, module), original, assigned=names, updated=())


def _is_step(arguments: dict[str, Any]) -> bool:
    """Whether these are the arguments of a step that :func:`prepare` prepared."""
    # As `cache_in`, which would be a call more each of the times that a token asks.
    mask, cache = arguments.get("attention_mask"), arguments.get(CACHE, arguments.get(FORMER_CACHE))
    fixed = cache.fixed if isinstance(cache, PTECache) else None
    return fixed is not None and fixed.ready and (isinstance(mask, dict) or (mask is not None and mask.ndim == 4))


def _backbone_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_step(kwargs):
        return step(getattr(self, ATTRIBUTE), *args, **kwargs)
    return _run_forward(self, *args, **kwargs)


@torch.compiler.disable(recursive=False)
def _run_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    seam: Seam = getattr(self, ATTRIBUTE)
    arguments = kwargs
    if args:
        arguments = inspect.signature(type(self).forward).bind(self, *args, **kwargs).arguments
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        arguments.pop("self", None)
    adapter = seam.active_adapter()
    said: dict[str, Any] = {}
    if "prompt_length" in arguments or "evictions" in arguments:
        arguments = dict(arguments)
        for name, place in (("prompt_length", "length"), ("evictions", "evictions")):
            if arguments.get(name) is not None:
                said[place] = arguments[name]
            arguments.pop(name, None)
        check_given(said.get("evictions"), adapter)
    if adapter is None:
        if isinstance(cache_in(arguments), PTECache):
            raise ValueError(NO_ADAPTER)
        return seam.inner(**arguments)
    outer = seam.calls.outer[-1] if seam.calls.outer else None
    spec = seam.calls.take()
    return run(seam, adapter, arguments, replace(spec, **said) if said else spec, outer)


def _prepare_inputs(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
    """``prepare_inputs_for_generation``, which ``generate`` calls with all that it has before every forward pass."""
    cache = cache_in(kwargs)
    generation = getattr(self, ATTRIBUTE).generation(cache)
    if generation is not None:
        generation.ids = input_ids
        generation.given = input_ids.shape[1] if generation.given is None else generation.given
    inputs = type(self).prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
    fixed = cache.fixed if isinstance(cache, PTECache) else None
    if generation is not None and generation.shift is not None and fixed is not None and fixed.ready:
        inputs["position_ids"] = (inputs["position_ids"] - generation.shift[:, None]).clamp(min=0)
    return inputs


def _create_masks(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``create_masks_for_generate``, which ``generate`` calls outside of what it compiles."""
    cache = cache_in(kwargs)
    if isinstance(cache, PTECache) and cache.static:
        seam: Seam = getattr(self, ATTRIBUTE)
        return prepare(seam, cache, kwargs.get("position_ids"), kwargs.get("attention_mask"), kwargs["inputs_embeds"])
    original = getattr(type(self), MASKS_METHOD, None)
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
    seam: Seam = getattr(model, ATTRIBUTE)
    evictions = kwargs.pop("evictions", None)
    if evictions is not None:
        check_given(evictions, seam.active_adapter())
    spec = PromptSpec(
        named.get("labels"),
        named.get("shift_labels"),
        kwargs.pop("prompt_length", None),
        evictions=evictions,
    )
    seam.calls.stack.append(spec)
    return args, kwargs


def _leave_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if _is_step(kwargs):
        cache_in(kwargs).fixed.ready = False
    else:
        _forget_call(model)


@torch.compiler.disable
def _forget_call(model: nn.Module) -> None:
    stack = getattr(model, ATTRIBUTE).calls.stack
    if stack:
        stack.pop()


def _enter_wrapper(seam: Seam, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _is_step(kwargs):
        _note_outer(seam, wrapper, args, kwargs)


@torch.compiler.disable
def _note_outer(seam: Seam, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = {**inspect.signature(type(wrapper).forward).bind_partial(wrapper, *args).arguments, **kwargs}
    ids, mask, cache = given.get("input_ids"), given.get("attention_mask"), cache_in(given)
    around = seam.calls.outer[-1] if seam.calls.outer else None
    if isinstance(mask, dict) and around is not None:
        mask = around.mask
    seam.calls.outer.append(OuterCall(wrapper, ids, mask, given.get("position_ids")))
    tokens = ids if ids is not None else given.get("inputs_embeds")
    if isinstance(cache, PTECache) and tokens is not None:
        # It may look for images in masks over all columns.
        cache.mask_columns = cache.get_seq_length() + tokens.shape[1]


def _leave_wrapper(seam: Seam, wrapper: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # A step that stood ready left no note.
    if not torch.compiler.is_compiling() and seam.calls.outer and seam.calls.outer[-1].model is wrapper:
        seam.calls.outer.pop()


def watch_queries(seam: Seam, config: PTEConfig) -> None:
    """Let the queries of layers be seen where what leaves is chosen by them."""
    if config.cache_window is None or not make_policy(config.eviction, config.eviction_options).observed:
        return
    for site in seam.sites.values():
        if site.evicts:
            make_watchable(site.attention)


def _generate(self: Any, *args: Any, prompt_length: Any = None, return_evictions: bool = False, **kwargs: Any) -> Any:
    """``generate``, which also takes ``prompt_length``, and decodes with the cache of the adapter whatever `use_cache` says.

    With ``return_evictions`` (and ``return_dict_in_generate``) its output has ``evictions``: what left, for scoring.
    """
    seam: Seam = getattr(self, ATTRIBUTE)
    adapter = seam.active_adapter()
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
    if adapter is not None:
        if kwargs.get("cache_implementation") == "paged" and seam.config(adapter).cache_window is not None:
            refuse_generation(GenerationConfig(cache_implementation="paged"), bounded=True)
        if kwargs.get("use_cache", config.use_cache) is False:
            # Trainers turn the cache off where gradients are checkpointed. The policy is the same with it, and without a window too its states
            # are in it.
            kwargs["use_cache"] = True
    if return_evictions:
        check_recorded(seam, adapter, kwargs.get("return_dict_in_generate", config.return_dict_in_generate))
    remembers = adapter is not None and seam.remembers(adapter)
    generation = Generation(
        PromptSpec(length=prompt_length), record=return_evictions or remembers, asked=return_evictions
    )
    seam.calls.generations.append(generation)
    start = time.perf_counter()
    try:
        output = type(self).generate(self, *args, **kwargs)
    finally:
        seam.calls.generations.pop()
    if isinstance(generation.cache, PTECache):
        written = generation.written(output if isinstance(output, torch.Tensor) else output.sequences)
        seam.statistics.note_written(written, time.perf_counter() - start)
        seam.statistics.note_end(generation.cache, seam.token_width)
    if generation.record and generation.cache is not None:
        evictions = generation.cache.evicted
        if return_evictions:
            output["evictions"] = evictions
        if remembers:
            remember(seam, generation, output, evictions)
    return output


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
) -> Any:
    seam: Seam = getattr(self, ATTRIBUTE)
    adapter = seam.active_adapter()
    if adapter is not None:
        made = False
        refuse_generation(generation_config, bounded=seam.config(adapter).cache_window is not None)
        if model_kwargs.get(CACHE) is None:
            static = generation_config.cache_implementation == "static"
            model_kwargs[CACHE] = seam.new_cache(adapter, static)
            made = True
        generation = seam.note_cache(model_kwargs[CACHE])
        if generation is not None and generation.record:
            beams = generation_mode not in _ROW_BY_ROW
            if beams and generation.asked:
                raise NotImplementedError(
                    f"`return_evictions` cannot be had with {generation_mode.value}, whose sequences are put together from rows that are gone by its end. "
                    "Use num_beams=1."
                )
            # What goes on from a cache is found by its tokens no more.
            generation.record = generation.asked or (not beams and made)
        if generation is not None and generation.record:
            model_kwargs[CACHE].record()
        if generation is not None:
            prefill = _prefill_columns(generation_config, model_kwargs, generation_mode)
            generation.spec = replace(generation.spec, prefill=prefill)
            ends = generation_config.eos_token_id
            generation.ends = [ends] if isinstance(ends, int) else ends
            padding = generation_config.pad_token_id
            generation.padding_token = padding if padding is not None or not generation.ends else generation.ends[0]
        if made:
            return None
    return getattr(type(self), CACHE_METHOD)(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)


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


def _generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate_batch`` on rows of the bounded cache, which also takes what ``generate`` takes."""
    seam: Seam = getattr(self, ATTRIBUTE)
    if seam.active_adapter() is None:
        return type(self).generate_batch(self, *args, **kwargs)
    return generate_batch(seam, *args, **kwargs)


def _continuous_batching(name: str, self: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(self, ATTRIBUTE).active_adapter() is None:
        return getattr(type(self), name)(self, *args, **kwargs)
    refuse_manager()
