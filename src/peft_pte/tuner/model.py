"""`PTEModel`: the tuner that peft builds for a `PTEConfig`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache.cache import PTECache
from ..config import PTEConfig
from ..host.compat import CACHE, CHECKPOINTED
from ..host.sites import Site, Sites, check_config, keep_unknown_rotation, site_of
from ..host.targets import LeftOut, default_targets, left_out, why_not
from ..method.encoder import CHILD_NAME, PTEEncoder
from ..method.layer import MERGE_REFUSED, PTELayer, PTELinear, is_linear, linear_features, refuse_lora_arguments
from ..seam import Seam, refuse_other_methods
from ..shapes import whole_shape
from .checkpoints import check_adapter_state_dict, unwrap, watch
from .install import install, remove, watch_queries
from .report import Report, report

MODEL_TAGS = ("peft-pte", "progressive-thought-encoding")


class _NamedAsSaved:
    """A model whose modules are called as in its state dict.

    peft takes the names of modules for those of weights: it would save nothing of a layer in a checkpoint that others put around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.state_dict = model.state_dict
        self._model = model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._model.named_modules():
            yield name.replace(CHECKPOINTED, ""), module


class _Built:
    """An adapter of a model: held by its encoders, it holds the config that it was built from to its fields."""

    def __init__(self, config: PTEConfig, seam: Seam) -> None:
        self.config = config
        self.seam = seam
        config.hold(self)

    def check(self) -> None:
        """Raise where the model cannot do what the config says now."""
        check_config(self.seam.model, self.seam.found, self.config)
        PTECache(self.seam.text_config, self.config)
        watch_queries(self.seam, self.config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model was copied or unpickled, and its config with it.
        self.__dict__.update(state)
        self.config.hold(self)


def _refuse_offloaded(model: nn.Module) -> None:
    """Refuse weights that accelerate fetches for each call.

    Raises:
        NotImplementedError: A layer's weights are elsewhere between calls.
    """
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
            raise NotImplementedError(
                f"Weights of the base model are offloaded (`{name}`): an adapter stands beside weights that are there. Load the base without offloading, "
                "with a `device_map` over devices that hold it, or quantised; to train in less memory use gradient checkpointing and PTEConfig(offload=True)."
            )


class PTEModel(BaseTuner):
    """Progressive Thought Encoding (arXiv 2602.16839) on a causal LM of transformers.

    Made by ``get_peft_model(model, PTEConfig(...))``. Adds adapters to linear layers, an encoder to every attention
    layer beside them, and a seam to the model (:mod:`peft_pte.seam`), so that ``model.generate`` runs under the bounded
    cache and ``model(input_ids, attention_mask, labels=...)`` scores what it generated.

    Args:
        model: A decoder-only ``PreTrainedModel``.
        peft_config: Configuration, or configurations by adapter name.
        adapter_name: Name of the first adapter.

    Raises:
        TypeError: ``model`` is no ``PreTrainedModel``, or a target is no linear layer.
        NotImplementedError: The architecture or the combination is refused; the message says what to do instead.
        ValueError: A target lies outside the decoder layers.
    """

    prefix = "pte_"
    tuner_layer_cls = PTELayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model itself, hooks and all: they tell the seam where prompts end."""
        return self.model(*args, **kwargs)

    def new_cache(self, adapter_name: str | None = None, static: bool = False) -> PTECache:
        """An empty cache, to hand to ``generate`` or to a call as ``past_key_values``.

        Args:
            adapter_name: Whose window, prompt end and states; ``None``: the active adapter's.
            static: Whether it stands at fixed addresses, for one graph.

        Returns:
            The cache; what it holds comes with its first call.

        Raises:
            NotImplementedError: The model or the adapter has no such form.
        """
        name = adapter_name or self.active_adapters[0]
        return PTECache(self.model.config.get_text_config(decoder=True), self.peft_config[name], static=static)

    def report(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_length: int | Tensor | None = None,
    ) -> Report:
        """What the cache did since the last report, or the last log of a trainer: ``print(model.report())``.

        With a text, also how near the policy in the bounded cache is on it to the base model on its full cache, which costs two calls.

        Args:
            input_ids: ``[B, N]``; ``None``: no text.
            attention_mask: ``[B, N]``, zero for padding; ``None``: no padding.
            prompt_length: Columns of the prompt, for all rows or ``[B]``; ``None``: what `prompt_end` says.

        Returns:
            Evictions, norms of the states by layer, bytes beside those of a full cache, tokens per second, KL in nats a token.

        Raises:
            ValueError: A text is given, and nothing says where thinking starts in it, or no adapter is active.
            NotImplementedError: A text is given, and the weights are sharded.
        """
        return report(self.model, input_ids, attention_mask, prompt_length)

    @torch.no_grad()
    def replace_rows(
        self,
        cache: PTECache,
        rows: Sequence[int],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_length: int | Sequence[int] | Tensor | None = None,
    ) -> Any:
        """Let ``rows`` of ``cache`` start again with new prompts: at ``S0`` and position 0, and with nothing of what they were.

        To whoever goes on with the cache a row that was replaced is padded in front to the columns seen so far
        (``cache.get_seq_length()``): its mask is zero but for the tokens of its prompt, which are last. The other rows are as they were.

        Args:
            cache: A cache that holds rows of the active adapter.
            rows: Which of them, ``B'``.
            input_ids: Prompts ``[B', N]``.
            attention_mask: ``[B', N]``, zero for padding; ``None``: no padding.
            prompt_length: Columns of the prompt, as in a call; ``None``: what `prompt_end` says, or all of them.

        Returns:
            What the model returns for the prompts: the logits of the next tokens, ``[B', N, vocabulary]``.

        Raises:
            ValueError: A row is not there or named twice, or there is not one prompt for each.
            NotImplementedError: A prompt has not come to its end, or layers of the model are not bounded.
        """
        if not Seam.require(self.model).refills_rows(self.active_adapters[0]):
            raise NotImplementedError(
                "Rows can be replaced where the model does not number columns, as this one does. Decode the new prompts in a cache of their own."
            )
        fresh = self.new_cache()
        if cache.recording:
            fresh.record()
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, prompt_length=prompt_length, **{CACHE: fresh}
        )
        cache.replace_rows(rows, fresh)
        setattr(output, CACHE, cache)
        return output

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as peft does, then add the encoders of the layers that got adapters."""
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"PTE adapts transformers' causal LMs, whose cache it bounds; got {type(model).__name__}. Pass a "
                "PreTrainedModel."
            )
        _refuse_offloaded(model)
        try:
            refuse_other_methods(self.peft_config)
        except ValueError:
            # transformers' model keeps the dictionary, and goes on with what it had.
            del self.peft_config[adapter_name]
            raise
        config: PTEConfig = self.peft_config[adapter_name]
        first = not any(isinstance(module, PTELayer) for module in model.modules())
        # Before the first adapted layer stands in the way of the probes.
        seam = Seam.of(model) or install(model)
        try:
            check_config(model, seam.found, config)
            keep_unknown_rotation(seam.found, config)
            PTECache(seam.text_config, config)
            self._refuse_saved_attention(config, seam)
            watch(model, adapter_name, self.prefix)
            by_default = config.target_modules is None
            self._ranks: dict[int, int] = {}
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._inject_encoders(seam, config, adapter_name, low_cpu_mem_usage=kwargs.get("low_cpu_mem_usage", False))
            seam.find_groups()
            watch_queries(seam, config)
        except BaseException:
            if first:
                unwrap(model, saved_modules=False)
                remove(seam)
            raise
        if by_default:
            self._say_what_is_left_out(seam)
        known = model.model_tags or []
        model.add_model_tags([tag for tag in MODEL_TAGS if tag not in known])

    def left_out(self) -> dict[str, LeftOut]:
        """What of the decoder layers the default targets leave as it is: numbers of parameters and reasons, by name within a layer.

        Experts that are held in one tensor, so most of a large mixture of experts; routers; convolutions; linears that fused code reads
        without calling them, or that read what is cached.
        """
        return left_out(self.model, Seam.require(self.model).found)

    def _say_what_is_left_out(self, seam: Seam) -> None:
        found = left_out(self.model, seam.found)
        if not found:
            return
        inside = (
            math.prod(whole_shape(parameter))
            for name, parameter in self.model.named_parameters()
            if site_of(seam.found, name) and ".pte_" not in name
        )
        share = sum(part.parameters for part in found.values()) / max(1, sum(inside))
        names = "; ".join(f"`{name}` ({part.reason})" for name, part in found.items())
        warnings.warn(
            f"{share:.0%} of the weights of the decoder layers are left as they are: {names}. `model.base_model.left_out()` says it again.",
            UserWarning,
            stacklevel=4,
        )

    def _prepare_adapter_config(self, peft_config: PTEConfig, model_config: dict[str, Any]) -> PTEConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model, Seam.require(self.model).found, peft_config)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PTEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        sites = Seam.require(self.model).found
        if any(target is site.attention for site in sites.by_index.values()):
            return  # peft injects by the keys of a checkpoint, and encoders have keys too; they are added afterwards.
        site = self._check_target(sites, target, current_key)
        rank = peft_config.rank_pattern.get(get_pattern_key(peft_config.rank_pattern, current_key), peft_config.r)
        alpha = peft_config.alpha_pattern.get(get_pattern_key(peft_config.alpha_pattern, current_key))
        self._ranks[site.index] = max(rank, self._ranks.get(site.index, 0))
        if isinstance(target, PTELinear):
            target.update_layer(adapter_name, peft_config, rank, alpha)
            self._set_trainable(target, adapter_name, peft_config)
            return
        new = PTELinear(target, site.index, current_key)
        new.update_layer(adapter_name, peft_config, rank, alpha)
        new.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, new, target)

    def _check_target(self, sites: Sites, target: nn.Module, name: str) -> Site:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if base is self.model.get_output_embeddings():
            raise ValueError(
                f"`target_modules` must not reach the output head, got `{name}`: trainers score through its weight "
                "directly and would ignore the adapter. Exclude it, or train it with modules_to_save."
            )
        if not is_linear(base):
            linear_features(base)
        site = site_of(sites, name)
        if site is None:
            raise ValueError(
                f"`target_modules` must lie inside the decoder layers, whose state they read; got `{name}`. Exclude it "
                "with `exclude_modules`."
            )
        reason = why_not(self.model, name, base, sites)
        if reason is not None:
            raise ValueError(f"`target_modules` must not reach `{name}`: {reason}. Exclude it with `exclude_modules`.")
        return site

    def _inject_encoders(self, seam: Seam, config: PTEConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        built = _Built(config, seam)
        for index, rank in self._ranks.items():
            site = seam.sites[index]
            if not hasattr(site.attention, CHILD_NAME):
                encoder = PTEEncoder(
                    site.attention, (site.key_width, site.value_width), (site.key_rotation, site.value_rotation)
                )
                encoder._active_adapter = self.active_adapters
                site.attention.add_module(CHILD_NAME, encoder)
            encoder = seam.encoder(index)
            with torch.device("meta") if low_cpu_mem_usage else torch.device("cpu"):
                encoder.update_layer(adapter_name, config, rank, site.evicts)
            encoder.built[adapter_name] = built
            self._set_trainable(encoder, adapter_name, config)

    def _refuse_saved_attention(self, config: PTEConfig, seam: Seam) -> None:
        """Refuse to train attention layers in full: their encoders would be copied with them, and their files could not be read."""
        for name in config.modules_to_save or ():
            for path, module in self.model.named_modules():
                if path != name and not path.endswith(f".{name}"):
                    continue
                if any(site.attention is each for each in module.modules() for site in seam.sites.values()):
                    raise ValueError(
                        f"`modules_to_save` must not hold attention layers, got {name!r} (`{path}`): an encoder stands in each. Name what is in them, as "
                        "modules_to_save=['o_proj'], or leave it to the adapters."
                    )

    def _set_trainable(self, layer: PTELayer, adapter_name: str, config: PTEConfig) -> None:
        active = adapter_name in self.active_adapters and not config.inference_mode
        layer.set_requires_grad(adapter_name, active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make ``adapter_name`` the active adapter.

        Args:
            adapter_name: A name, or a list of one.
            inference_mode: Whether its weights are frozen.

        Raises:
            ValueError: More than one adapter is named.
        """
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # peft enters this around every call, and takes these arguments out of it.
        refuse_lora_arguments(kwargs)
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a mix of weights is no mix of what they do."""
        raise NotImplementedError(
            "`add_weighted_adapter` cannot mix PTE adapters: the weight of each is `dW = A S B` with states S that its own "
            "encoders make, so a mix of their matrices is no mix of their weights. Activate one at a time with set_adapter, "
            "or train one adapter on all of the data."
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: no initialization of PTE changes the base model."""
        raise NotImplementedError(
            "`subtract_mutated_init` has nothing to subtract: no initialization of PTE changes the base model, as LoRA's "
            "PiSSA, CorDA and OLoRA do. Save with save_pretrained(folder)."
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refuse: a dynamic weight has no merged form."""
        raise NotImplementedError(MERGE_REFUSED)

    def unmerge_adapter(self) -> None:
        """Refuse: nothing can have been merged."""
        raise NotImplementedError(MERGE_REFUSED)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise NotImplementedError(MERGE_REFUSED)
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        seam = Seam.of(model)
        if seam is not None:
            remove(seam)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PTEConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        named = cast(nn.Module, _NamedAsSaved(model))
        return super()._get_adapter_state_dict(named, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Checkpoints know encoders as part of their attention layer.
        return super()._remove_adapter_name_from_key(key, adapter_name).replace(f".{CHILD_NAME}.", ".")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PTEConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        named = cast(nn.Module, _NamedAsSaved(model))
        remapped = super()._remap_adapter_state_dict_for_load(named, config, adapter_name, state_dict)
        check_adapter_state_dict(model, adapter_name, remapped, cls.prefix)
        return remapped
