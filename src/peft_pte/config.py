"""`PTEConfig`: every choice of the method, validated where it is made."""

from __future__ import annotations

import functools
import math
import os
import warnings
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from weakref import WeakSet

from peft.config import PeftConfig

from ._peft_type import PTE
from .card import add_section, is_card
from .eviction import policies as policies  # registers them
from .eviction.policy import make_policy
from .lora_fields import explain_argument, explain_attribute, is_lora_field
from .updates import UPDATES

STATE_UPDATES = ("progressive", "frozen", "off")
KEY_ROTATIONS = ("removed", "kept")
STATE_ADDRESSES = ("key", "value")
IMPLEMENTATIONS = ("auto", "reference", "triton")

MIN_CACHE_WINDOW = 4
_MACHINE_FIELDS = ("impl", "segment_length", "chunk_length", "recompute_layers", "offload")
LIVE_FIELDS = (
    "cache_window",
    "evict_ratio",
    "eviction",
    "eviction_options",
    "prompt_end",
    "backprop_through_cache",
    "segment_length",
    "chunk_length",
    "recompute_layers",
    "offload",
)
"""Fields that every call reads: a new value acts on adapters that exist. All others are built into an adapter."""

FORMAT_VERSION = 1
"""Of a saved adapter. A reader refuses what is newer than itself, as fields that it does not know would be left out."""


class BuiltAdapter(Protocol):
    """What keeps a config from changing under the adapter that was built from it."""

    def check(self) -> None:
        """Raise where the model cannot do what the config says now."""


_Config = TypeVar("_Config", bound="PTEConfig")


def _explains_lora_fields(cls: type[_Config]) -> type[_Config]:
    """Let the constructor of ``cls`` say what to do instead of LoRA's fields."""
    generated = cls.__init__

    @functools.wraps(generated)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if is_lora_field(name):
                raise TypeError(explain_argument(name, value))
        if "peft_version" in kwargs and "format_version" not in kwargs:
            # A file from before formats were numbered holds all fields that there were then.
            kwargs = {"state_address": "value", **kwargs}
        generated(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@_explains_lora_fields
@dataclass
class PTEConfig(PeftConfig):
    """Configuration of Progressive Thought Encoding (arXiv 2602.16839).

    A causal LM decodes with a KV cache of ``P + cache_window`` slots. Thought tokens that leave it are encoded, layer
    by layer, into a state ``S [Q, R]`` per sequence, and the adapted linears read it: ``y = W x + scale A S^T B x``.

    A field set later is validated as here. On a config whose adapter exists, those of :data:`LIVE_FIELDS` act on the next
    call; the others are part of the adapter and cannot change under it. A copy is free: ``dataclasses.replace(config, ...)``.

    Args:
        r: Rank ``R`` of the adapters and columns of the state.
        target_modules: Linear layers to adapt, as in LoRA (names, suffixes, a regex, or ``"all-linear"``). ``None``
            means every linear layer of the decoder blocks, attention and MLP. The output head cannot be adapted.
        exclude_modules: Linear layers to leave alone, as in LoRA.
        alpha: Numerator of ``scale``, LoRA's ``lora_alpha``. ``None`` means twice the rank.
        dropout: Dropout on the input of the adapters while training. Above zero, rollout and scoring use different
            weights, so importance ratios are no longer 1; a warning says so.
        fan_in_fan_out: Set by itself for GPT-2's ``Conv1D``; as in LoRA.
        use_rslora: ``scale = alpha / sqrt(r)`` instead of ``alpha / r``.
        init_weights: ``True``: the adapter starts as the identity (``pte_up`` is zero). ``False``: it does not, for
            tests.
        layers_to_transform: Indices of the decoder layers to adapt, as in LoRA.
        layers_pattern: Name of the ``nn.ModuleList`` of decoder layers, as in LoRA.
        rank_pattern: Rank by module name or regex, as in LoRA. A linear of rank ``r' < R`` reads the first ``r'``
            columns of its layer's state; the state of a layer is as wide as the largest rank in it.
        alpha_pattern: ``alpha`` by module name or regex, as in LoRA.
        modules_to_save: Modules to train and save in full, as in LoRA.
        cache_window: Thought tokens ``W`` the cache holds, in tokens. ``None`` means an unbounded cache: the same
            adapter, reading ``S0`` for ever.
        evict_ratio: Share of the window that leaves it at an eviction (paper: 0.25).
        eviction: Which thoughts leave: ``"sliding_window"`` (the oldest); or per head ``"random"``, ``"key_diff"`` (the keys most
            like the average key; arXiv 2504.15364), ``"attention"`` (the least attended by the last queries; arXiv 2404.14469),
            ``"head_budget"`` (the same, and heads that look back further hold more; arXiv 2410.19258), or a policy that was
            registered (:func:`peft_pte.register_eviction`). See ``docs/eviction.md``.
        eviction_options: Fields of the policy, as ``{"queries": 16}`` for ``"attention"``.
        num_global_tokens: Rows ``Q`` of the state, learned tokens that ask the questions (paper: 32). ``0`` starts
            from an empty state and keeps one learned query per rank.
        encoder_attention: How the evicted tokens share the rows of the state. ``"linear"``: the paper's
            ``S' = (W_Q h_g)(W_K K)^T (W_V V)``; ``"slots"``, the default: with a softmax over the rows, so that what is written to one
            leaves the others alone, which remembers more (docs/evidence.md); ``"softmax"``: over the evicted tokens; or one that
            was registered (:func:`peft_pte.register_update`).
        update_gain: Factor on ``S'`` before it is added to the state.
        state_update: ``"progressive"`` (the method), ``"frozen"`` (the state stays ``S0``: the paper's Global-Only) or
            ``"off"`` (the state is the identity: LoRA under the bounded cache, the paper's LoRA_c).
        state_address: What a token that left is found by; the paper's ``dW = A S B`` does not say whether ``x`` is a row or
            a column. ``"key"`` (a row): ``y = W x + scale A S^T (B x)``, ``B [Q, in]``, ``A [out, R]``; ``B x`` meets the
            tokens' scores for the global tokens, which are made of keys, and is told their projected values, as in attention.
            ``"value"`` (a column): ``y = W x + scale A S (B x)``, ``B [R, in]``, ``A [out, Q]``; ``B x`` meets the values and
            is told the scores. ``"key"`` remembers far more (docs/evidence.md).
        key_rotation: ``"removed"``: the encoder reads keys without their rotary rotation. ``"kept"``: as cached.
        prompt_end: Where the prompt of a row ends, as a rule on its tokens: the ids of a marker, after whose first occurrence thinking
            starts (for a chat model the header of the assistant's turn: :func:`peft_pte.prompt_end`), or a number: the first
            ``n`` tokens of every row (for text without prompts; 4 keeps the attention sinks). ``None``: what the call shows, its
            labels or the prefill of ``generate``, which is a guess of that call. ``prompt_length=`` of a call overrides it.
        backprop_through_cache: ``True``: the gradient of a scoring call flows through the cached keys and values.
            ``False``: they are detached at every eviction; the gradient still flows through the states.
        impl: Who computes: ``"reference"`` (torch), ``"triton"``, or ``"auto"``, the faster one: on a GPU both are timed once, elsewhere it
            is the reference. This field and those below are choices of the machine, not of the adapter: they change no result and are
            not saved.
        segment_length: With gradient checkpointing, columns of one pass of the backbone. Between passes a scoring call keeps keys and
            values alone; a longer pass is faster and needs more memory. ``None``: the window, or 512 where that is more.
        chunk_length: Columns that a layer takes at once. ``None``: the window.
        recompute_layers: With gradient checkpointing, whether the chunks of layers are recomputed one by one in the
            backward pass. ``True``: the activations of one layer and chunk are alive at a time, for one more forward pass (none
            with ``offload``); ``False``: those of all layers of one pass, so give a short ``segment_length``.
        offload: With gradient checkpointing, whether a scoring call keeps what its backward pass starts from on the CPU:
            keys and values of past passes and, with ``recompute_layers``, the inputs of their layers.
        format_version: Of the saved form of the adapter; leave it alone.

    Raises:
        ValueError: A field has a value that cannot work; the message names the field, the requirement, the value and
            a remedy.
        TypeError: A field has the wrong type, or LoRA's name.
    """

    r: int = field(default=32, metadata={"help": "Rank of the adapters and columns of the thought state."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Linear layers to adapt; None: all linear layers of the decoder blocks."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to leave alone."}
    )
    alpha: float | None = field(default=None, metadata={"help": "Numerator of the scale; None: twice the rank."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapters."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Weights are stored as (fan_in, fan_out)."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) instead of alpha / r."})
    init_weights: bool = field(default=True, metadata={"help": "Start as the identity."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Decoder layers to adapt; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the ModuleList that holds the decoder layers."}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by module name or regex."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alpha by module name or regex."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules, apart from adapters, to train and save in full."}
    )
    cache_window: int | None = field(
        default=1024, metadata={"help": "Thought tokens the cache holds; None: unbounded."}
    )
    evict_ratio: float = field(default=0.25, metadata={"help": "Share of the window that leaves at an eviction."})
    eviction: str = field(default="sliding_window", metadata={"help": "Which thoughts leave the window."})
    eviction_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the policy that `eviction` names."}
    )
    num_global_tokens: int = field(default=32, metadata={"help": "Rows of the thought state; 0: no global start."})
    encoder_attention: str = field(
        default="slots", metadata={"help": "Attention of the encoder over the evicted tokens."}
    )
    update_gain: float = field(default=1.0, metadata={"help": "Factor on an update of the state."})
    state_update: Literal["progressive", "frozen", "off"] = field(
        default="progressive", metadata={"help": "progressive: PTE; frozen: Global-Only; off: LoRA_c."}
    )
    state_address: Literal["key", "value"] = field(
        default="key", metadata={"help": "What a token that left is found by; key: as in attention."}
    )
    key_rotation: Literal["removed", "kept"] = field(
        default="removed", metadata={"help": "Whether the encoder reads keys without their rotary rotation."}
    )
    prompt_end: list[int] | int | None = field(
        default=None, metadata={"help": "Token ids after which thinking starts, or the first n tokens of every row."}
    )
    backprop_through_cache: bool = field(
        default=True, metadata={"help": "Whether gradients flow through cached keys and values."}
    )
    impl: Literal["auto", "reference", "triton"] = field(
        default="auto", metadata={"help": "Who computes the kernels; not saved."}
    )
    segment_length: int | None = field(
        default=None, metadata={"help": "Columns of a pass with gradients; None: the window; not saved."}
    )
    chunk_length: int | None = field(
        default=None, metadata={"help": "Columns that a layer takes at once; None: the window; not saved."}
    )
    recompute_layers: bool = field(
        default=True, metadata={"help": "Recompute the chunks of layers one by one; not saved."}
    )
    offload: bool = field(
        default=False, metadata={"help": "Keep what the backward pass starts from on the CPU; not saved."}
    )

    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Of the saved form of the adapter; leave it alone."}
    )

    @classmethod
    def paper(cls: type[_Config], **fields: Any) -> _Config:
        """The method as the paper prints it (arXiv 2602.16839, sections 3 and 4): rank 32, 32 global tokens, a quarter of the window leaves, the
        oldest first, tokens share the rows of the state linearly.

        What the paper leaves open is this package's default: which way ``dW`` meets ``x``, the scale, whether keys are read with their rotation.

        Args:
            fields: Any others, as ``cache_window`` (paper: 768, 1024, 2048), or the same with other values.

        Returns:
            The config.

        Raises:
            ValueError: See above.
            TypeError: See above.
        """
        printed: dict[str, Any] = {
            "r": 32,
            "num_global_tokens": 32,
            "evict_ratio": 0.25,
            "eviction": "sliding_window",
            "encoder_attention": "linear",
            "state_update": "progressive",
        }
        return cls(**{**printed, **fields})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PTE
        for name in _NAMES_OF_MODULES:
            setattr(self, name, _as_set(getattr(self, name)))
        self._check()
        self._warn_of_dropout(stacklevel=5)
        self._built: WeakSet[BuiltAdapter] = WeakSet()

    def __setattr__(self, name: str, value: Any) -> None:
        if is_lora_field(name):
            raise AttributeError(explain_attribute(name))
        # peft's own fields are free; the generated constructor checks when all are set.
        if name not in _OWN_FIELDS or "_built" not in self.__dict__:
            super().__setattr__(name, value)
            return
        before = getattr(self, name)
        value = _as_set(value) if name in _NAMES_OF_MODULES else value
        if self._built and name not in LIVE_FIELDS:
            if value != before:
                raise ValueError(
                    f"`{name}` must stay {before!r}, got {value!r}: it was built into an adapter that is in use. Save the "
                    f"adapter, change a copy with dataclasses.replace(config, {name}=...), and load with it: "
                    "PeftModel.from_pretrained(base, folder, config=copy); or begin another adapter with add_adapter."
                )
            return
        super().__setattr__(name, value)
        try:
            self._check()
            for adapter in list(self._built):
                adapter.check()
        except BaseException:
            super().__setattr__(name, before)
            raise
        if name == "dropout":
            self._warn_of_dropout(stacklevel=3)

    if not TYPE_CHECKING:
        # Hidden from the type checker, which would take every misspelled name for an attribute.
        def __getattr__(self, name: str) -> Any:
            if is_lora_field(name):
                raise AttributeError(explain_attribute(name))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        # No adapter was built from a copy. One that is copied with its model is told so by its adapter.
        return {name: value for name, value in self.__dict__.items() if name != "_built"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _built=WeakSet())

    def hold(self, adapter: BuiltAdapter) -> None:
        """From now on an adapter is built from this config, for as long as ``adapter`` lives."""
        self._built.add(adapter)

    def _check(self) -> None:
        self._check_format()
        self._check_numbers()
        self._check_switches()
        self._check_choices()
        self._check_targets()
        self._check_lengths()
        self._check_prompt_end()

    def _check_format(self) -> None:
        _require_int("format_version", self.format_version, 1, "Leave it out")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` must be at most {FORMAT_VERSION}, got {self.format_version}: the adapter was saved by a newer peft_pte, and what this "
                "one does not know of it would be left out. Upgrade peft_pte."
            )

    def _check_numbers(self) -> None:
        _require_int("r", self.r, 1, "Use r=32 as in the paper")
        _require_int("num_global_tokens", self.num_global_tokens, 0, "Use 32 as in the paper, or 0 for no global start")
        if self.cache_window is not None:
            _require_int(
                "cache_window",
                self.cache_window,
                MIN_CACHE_WINDOW,
                "Use a larger window, or cache_window=None for an unbounded cache",
            )
        for name in ("evict_ratio", "update_gain", "dropout", *(() if self.alpha is None else ("alpha",))):
            _require_number(name, getattr(self, name))
        if not 0.0 < self.evict_ratio <= 1.0:
            raise ValueError(
                f"`evict_ratio` must be above 0 and at most 1, got {self.evict_ratio}. Use evict_ratio=0.25 as in the "
                "paper."
            )
        if not (math.isfinite(self.update_gain) and self.update_gain > 0.0):
            raise ValueError(
                f"`update_gain` must be a positive number, got {self.update_gain}. To keep the state from changing, "
                'use state_update="frozen".'
            )
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0.0):
            raise ValueError(f"`alpha` must be a positive number or None (twice the rank), got {self.alpha}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout}. Use dropout=0.0.")
        for pattern, rank in self.rank_pattern.items():
            _require_int(f"rank_pattern[{pattern!r}]", rank, 1, "Use a positive rank")

    def _warn_of_dropout(self, stacklevel: int) -> None:
        if self.dropout > 0.0:
            warnings.warn(
                f"`dropout` is {self.dropout}: generation runs without it and scoring with it, so the log-probs of a "
                "rollout and of its replay differ and importance ratios are not 1. Use dropout=0.0 for RL.",
                UserWarning,
                stacklevel=stacklevel,
            )

    def _check_switches(self) -> None:
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be True or False, got {value!r}. Use one of them.")

    def _check_choices(self) -> None:
        for name, allowed in (
            ("encoder_attention", tuple(UPDATES)),
            ("state_update", STATE_UPDATES),
            ("key_rotation", KEY_ROTATIONS),
            ("state_address", STATE_ADDRESSES),
            ("impl", IMPLEMENTATIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                options = ", ".join(repr(option) for option in allowed)
                raise ValueError(f"`{name}` must be one of {options}, got {value!r}.")
        if not isinstance(self.eviction_options, dict):
            raise TypeError(
                f"`eviction_options` must be a dictionary, got {self.eviction_options!r}. Write {{'queries': 16}}, or leave it out."
            )
        policy = make_policy(self.eviction, self.eviction_options)
        if self.cache_window is not None:
            policy.check(self.cache_window, self.tokens_per_eviction)
        if self.state_update == "off" and self.num_global_tokens == 0:
            raise ValueError(
                '`num_global_tokens` must be at least 1 with state_update="off", got 0: the state is then the '
                "identity, which needs rows. Use num_global_tokens=r for plain LoRA under the bounded cache."
            )

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, set):
            heads = sorted(name for name in self.target_modules if name.rpartition(".")[2] == "lm_head")
            if heads:
                raise ValueError(
                    f"`target_modules` must not name the output head, got {heads[0]!r}: trainers score through its "
                    "weight directly and would ignore the adapter. Remove it, or train it in full with "
                    "modules_to_save=['lm_head']."
                )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` must be None when `target_modules` is a string, got "
                f"{self.layers_to_transform}. Write the layers into the regex, or give a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` needs `layers_to_transform`, got layers_pattern={self.layers_pattern!r} alone. "
                "Name the layers, or leave both out."
            )

    def _check_lengths(self) -> None:
        for name in ("segment_length", "chunk_length"):
            length = getattr(self, name)
            if length is not None:
                _require_int(name, length, 1, "Leave it out for the default")
                if self.cache_window is None:
                    raise ValueError(f"`{name}` needs a bounded cache, got cache_window=None. Leave it out.")

    def _check_prompt_end(self) -> None:
        given: Any = self.prompt_end
        remedy = "Use peft_pte.prompt_end(tokenizer) for a chat model, or 4 for text without prompts"
        if given is None:
            return
        if isinstance(given, tuple):
            given = list(given)
            object.__setattr__(self, "prompt_end", given)
        if isinstance(given, list):
            if not given:
                raise ValueError(f"`prompt_end` must hold at least one token id, got []. {remedy}.")
            for token in given:
                _require_int("prompt_end", token, 0, remedy)
            return
        if isinstance(given, bool) or not isinstance(given, int):
            raise TypeError(f"`prompt_end` must be a list of token ids or a number of tokens, got {given!r}. {remedy}.")
        _require_int("prompt_end", given, 1, remedy)

    @property
    def num_queries(self) -> int:
        """Rows ``Q`` of the state: the global tokens, or one learned query per rank without them."""
        return self.num_global_tokens or self.r

    @property
    def tokens_per_eviction(self) -> int:
        """``m = max(1, floor(evict_ratio * W))``, thought tokens that leave together.

        Raises:
            ValueError: The cache is unbounded.
        """
        if self.cache_window is None:
            raise ValueError("`cache_window` must be a number of tokens for an eviction to happen, got None.")
        return max(1, math.floor(self.evict_ratio * self.cache_window))

    @property
    def evictions_per_window(self) -> int:
        """Evictions after which nothing is left of a full window.

        Raises:
            ValueError: The cache is unbounded.
        """
        return (self.cache_window or 0) // self.tokens_per_eviction

    def scale(self, rank: int, alpha: float | None = None) -> float:
        """``scale``, the factor on an adapter.

        Args:
            rank: Of the adapter.
            alpha: In place of the config's (``alpha_pattern``).

        Returns:
            ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        """
        numerator = alpha if alpha is not None else self.alpha
        numerator = 2.0 * rank if numerator is None else numerator
        return numerator / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The fields that belong to the adapter; those that belong to the machine are left out."""
        return {name: value for name, value in super().to_dict().items() if name not in _MACHINE_FIELDS}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as peft does, and tell the model card beside it how to load a method that peft does not ship."""
        super().save_pretrained(save_directory, **kwargs)
        card = os.path.join(save_directory, "README.md")
        above = os.path.join(os.path.dirname(os.path.abspath(save_directory)), "README.md")
        if not os.path.isfile(card) and is_card(above):
            # An adapter of another name than "default" lies in a folder of its own, below the card.
            card = above
        add_section(card, self)


_OWN_FIELDS = frozenset(f.name for f in fields(PTEConfig)) - {f.name for f in fields(PeftConfig)}
_NAMES_OF_MODULES = ("target_modules", "exclude_modules")
_SWITCHES = ("use_rslora", "fan_in_fan_out", "init_weights", "backprop_through_cache", "recompute_layers", "offload")


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, list) else names


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}. Leave it out for the default.")


def _require_int(name: str, value: Any, least: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}. {remedy}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}. {remedy}.")
