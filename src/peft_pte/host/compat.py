"""What is known of transformers (and of accelerate) beyond the documented surface, each with the versions it was read in.

No other file touches a private name of transformers; :func:`check` says which of them are gone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import logits_process

# What a cache was called until 5.23, which later versions still take from callers.
FORMER_CACHE = "past_key_values"


def _name_of_cache() -> str:
    """What models, what they return and `generate` call a cache: the same word in every model of a version.

    Raises:
        NotImplementedError: None that is known.
    """
    method = GenerationMixin.prepare_inputs_for_generation
    taken = inspect.signature(method).parameters
    for name in ("cache", FORMER_CACHE):
        if name in taken:
            return name
    raise NotImplementedError(
        f"`{method.__name__}` of this transformers version takes no cache by a name that is known, but {', '.join(taken)}. Install a version "
        "that peft-pte is tested with (constraints.txt)."
    )


CACHE = _name_of_cache()

# What decoder layers call the cache they are given: most what models call it (5.17 to 5.24).
CACHE_NAMES = (CACHE, "layer_past")

# Where attention layers keep the number of their layer of the cache (5.17 to 5.24).
LAYER_NUMBERS = ("layer_idx", "layer_id")

# Models whose positions come from the attention mask, without a field of the config that says so (5.17 to 5.24).
POSITIONS_FROM_MASK = ("bloom", "mpt", "cpmant")

# What says on an attention layer whether it rotates (5.17 to 5.24).
ROTATES = "use_rope"

# Models whose own masks let blocks of tokens see each other, and read the cache for it (5.23 to 5.24).
BLOCKS_IN_MASKS = ("git",)

# Where a model looks up what computes its attention, what it is called in its config, and what it takes by default (5.17 to 5.24).
ATTENTION_TABLE = "ALL_ATTENTION_FUNCTIONS"
ATTENTION_NAME = "_attn_implementation"
EAGER_ATTENTION = "eager_attention_forward"

# What says on an attention layer that it caches something smaller than its keys and values (5.17 to 5.24).
LATENT = "kv_lora_rank"

# What makes GPT-2 attend without looking anything up (5.17 to 5.24).
UPCAST_ATTENTION = "reorder_and_upcast_attn"

# Rotations that depend on the length of the call: a rollout and its replay would rotate differently (5.17 to 5.24).
LENGTH_DEPENDENT_ROTATIONS = ("dynamic", "longrope")

# Inputs of a decoder layer with a token axis, and which one it is, counted from the last: where they cannot be tried out (5.17 to 5.24).
PER_TOKEN = {"hidden_states": -2, "position_ids": -1, "position_embeddings": -2, "cache_position": -1}

# Inputs of a backbone with a column for each token (5.17 to 5.24).
COLUMNS = ("input_ids", "inputs_embeds", "token_type_ids", "per_layer_inputs")

# What some hosts hand on to a backbone that needs none of it: its output is cut and compared outside (5.17 to 5.24).
UNUSED = ("logits_to_keep", "labels", "shift_labels")

# What decoder layers that share keys and values hand them on in, by the kind of layer (5.23 to 5.24).
SHARED_STATES = "shared_kv_states"

# What full attention is called where masks go by the kind of layer (5.17 to 5.24).
FULL_ATTENTION = "full_attention"

# What torch puts into the names of modules where it wraps a checkpoint around them, and leaves out of state dicts (torch 2.13).
CHECKPOINTED = "_checkpoint_wrapped_module."

# Where accelerate keeps the forward that its hook calls, and gives back when the hook goes (accelerate 1.15).
HOOKED_FORWARD = "_old_forward"

# Where `generate` makes its cache (5.17 to 5.24), and its masks, outside of what it compiles.
CACHE_METHOD = "_prepare_cache_for_generation"
MASKS_METHOD = "create_masks_for_generate"

# What an adapter's weights are loaded with by transformers itself (5.23 to 5.24); :mod:`peft_pte.tuner.checkpoints` watches it on the instance.
LOADER_METHOD = "_load_pretrained_model"

# What `generate` makes of its options (5.17 to 5.24).
GENERATION_METHODS = (
    "_prepare_generation_config",
    "_prepare_special_tokens",
    "_get_logits_processor",
    "_get_stopping_criteria",
    "_valid_auto_compile_criteria",
    "_optimize_model_for_decode",
)

# Processors that look at the scores of a row alone, so at those of many rows as well as at those of one (5.17 to 5.24).
OF_SCORES_ALONE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.SuppressTokensLogitsProcessor,
)


def generation_options(
    model: Any, given: GenerationConfig | None, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The options of a generation as `generate` sees them, special tokens as tensors, and what of ``options`` is none of them."""
    config, rest = model._prepare_generation_config(given, **options)
    model._prepare_special_tokens(config, True, device=model.device)
    return config, rest


def logits_processors(
    model: Any, config: Any, ids: Tensor, own: LogitsProcessorList, allowed: Callable[[int, Tensor], list[int]] | None
) -> LogitsProcessorList:
    """What `generate` lets logits go through that follow the prompt ``ids [1, N]``, its caller's ``own`` among them."""
    made: LogitsProcessorList = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=ids.shape[1],
        encoder_input_ids=ids,
        prefix_allowed_tokens_fn=allowed,
        logits_processor=own,
        device=ids.device,
        model_kwargs={},
    )
    return made


def stopping_criteria(model: Any, config: Any, own: StoppingCriteriaList, tokenizer: Any) -> StoppingCriteriaList:
    """What `generate` ends a row by, its caller's ``own`` among them."""
    made: StoppingCriteriaList = model._get_stopping_criteria(config, own, tokenizer)
    return made


def end_tokens(config: Any) -> Tensor | None:
    """``[N]``, the end-of-sequence tokens of what :func:`generation_options` made; ``None``: none."""
    found: Tensor | None = config._eos_token_tensor
    return found


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among ``arguments`` of a model, by either name; the newer one is taken where there are both, as transformers does."""
    return arguments.get(CACHE, arguments.get(FORMER_CACHE))


def step_of(model: Any, cache: Any, config: Any) -> Callable[..., Any]:
    """What `generate` calls for a step on ``cache``: the model, or the model compiled."""
    if model._valid_auto_compile_criteria({CACHE: cache}, config):
        compiled: Callable[..., Any] = model.get_compiled_call(config.compile_config)
        return compiled
    step: Callable[..., Any] = model.__call__
    return step


def optimized_for_decoding(model: Any) -> AbstractContextManager[None]:
    """What `generate` decodes in."""
    context: AbstractContextManager[None] = model._optimize_model_for_decode()
    return context


def counts_its_cache(config: Any) -> bool:
    """Whether attention layers mask by the columns of their cache, whatever mask they get (local attention of GPT-Neo, 5.17 to 5.24)."""
    return "local" in (getattr(config, "attention_layers", None) or ())


def sharing_of(config: Any, index: int) -> str | None:
    """Whether a layer's keys and values are read by later layers, ``"store"``, or it reads those of one, ``"reuse"`` (5.23 to 5.24)."""
    modes = getattr(config, "kv_sharing_modes", None)
    return None if modes is None else modes[index]


def attention_of(config: Any) -> str:
    """Which attention a model runs, ``"eager"``, ``"sdpa"``, ... (`_attn_implementation`, 5.17 to 5.24)."""
    return str(config._attn_implementation)


def check() -> None:
    """See that every name is still there.

    Raises:
        NotImplementedError: One is gone.
    """
    generation = [(GenerationMixin, name) for name in (CACHE_METHOD, *GENERATION_METHODS)]
    for owner, name in (*generation, (PreTrainedModel, LOADER_METHOD)):
        if not hasattr(owner, name):
            raise NotImplementedError(
                f"{owner.__name__} of this transformers version has no `{name}`. Install a version that peft-pte is tested with "
                "(constraints.txt)."
            )
