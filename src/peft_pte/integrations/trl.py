"""Callbacks for trainers of TRL (and transformers' own): logs, evictions of a rollout that are scored as they were, windows that are drawn."""

from __future__ import annotations

import functools
import math
import os
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pte.card import add_section
from peft_pte.config import PTEConfig
from peft_pte.eviction.records import EvictionMemory
from peft_pte.passes.fidelity import text_fidelity
from peft_pte.seam import Seam

# Where wrappers keep what they wrap: parallel wrappers, torch.compile.
_WRAPPED = ("module", "_orig_mod")


def _create_model_card(trainer: Any, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """What ``trainer`` writes, and the part about the adapter."""
    write(*args, **kwargs)
    describe_adapter(trainer)


def describe_adapter(trainer: Any) -> None:
    """Add to the model card in the output folder of ``trainer`` what the adapter is and how it is loaded."""
    if trainer.is_world_process_zero():
        config = active_config(find_seam(trainer.accelerator.unwrap_model(trainer.model)))
        add_section(os.path.join(trainer.args.output_dir, "README.md"), config)


class PTECallback(TrainerCallback):  # type: ignore[misc]
    """Adds what the cache did since the last log to the logs of a trainer.

    ``pte/evictions_per_sequence``, ``pte/state_norm``, ``pte/cache_bytes``, ``pte/full_cache_bytes`` (what the model's own cache would have held of
    the same tokens) and ``pte/tokens_per_second`` (of generations), all of this process, under ``eval_pte/...`` where the trainer logs an
    evaluation. They go into ``logs``, for the callbacks that come after this one, and into ``state.log_history``, which checkpoints carry. Nothing
    is printed.

    A trainer asks its reporters (TensorBoard, W&B, ...) before the callbacks it was given, so ``callbacks=[PTECallback()]``
    comes too late for them; :meth:`attach` does not::

        trainer = GRPOTrainer(model=model, peft_config=PTEConfig(task_type="CAUSAL_LM"), ...)
        PTECallback.attach(trainer)
        trainer.train()

    Args:
        full_cache_kl: Whether each log also says how near the policy is to the base model on its full cache, on the last rows that were scored:
            ``pte/kl`` in nats a token, ``pte/kl_to_1w`` and so on by how many windows had been written, ``pte/ratio_p5``
            (:meth:`peft_pte.passes.fidelity.Fidelity.figures`). It costs two calls without gradients for each log.
    """

    def __init__(self, full_cache_kl: bool = False) -> None:
        self.full_cache_kl = full_cache_kl

    @classmethod
    def attach(cls, trainer: Any, full_cache_kl: bool = False) -> PTECallback:
        """Put the callback before all others of ``trainer``, reporters included; one that is there already moves.

        The model card that the trainer writes then says of the adapter what a saved one's says: how it is loaded, its window, where prompts end.

        Args:
            trainer: A ``transformers.Trainer`` or a trainer of TRL.
            full_cache_kl: As of the class.

        Returns:
            The callback.
        """
        callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is not None:
            callbacks.remove(found)
        else:
            trainer.create_model_card = functools.partial(_create_model_card, trainer, trainer.create_model_card)
        callback = found or cls()
        callback.full_cache_kl = callback.full_cache_kl or full_cache_kl
        callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting with the training.

        Raises:
            ValueError: The model has no PTE adapter.
        """
        statistics = find_seam(kwargs["model"]).statistics
        statistics.keep_text = self.full_cache_kl
        statistics.drain()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep no text any longer."""
        statistics = find_seam(kwargs["model"]).statistics
        statistics.keep_text, statistics.text = False, None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures to ``logs`` and to the last entry of ``state.log_history``."""
        if logs is None:
            return
        prefix = "eval_pte/" if any(name.startswith("eval_") for name in logs) else "pte/"
        seam = find_seam(kwargs["model"])
        text, figures = seam.statistics.text, seam.statistics.drain()
        if text is not None:
            tokens = text_fidelity(seam, text)
            # Not of what the training did.
            seam.statistics.drain()
            found = tokens.figures() if len(tokens.kl) else {}
            figures |= {name: value for name, figure in found.items() if not math.isnan(value := figure.item())}
        _add(logs, state, {prefix + name: value for name, value in figures.items()})


class RecordedEvictions(TrainerCallback):  # type: ignore[misc]
    """Lets what left a sequence when it was written leave again when it is scored, in trainers that roll out: GRPO, RLOO and their kin.

    For a policy that looks at keys or queries (``eviction="key_diff"``, ``"attention"``, ``"head_budget"``) on a base in half precision, where
    rounding may choose otherwise the second time. Rows are found by their tokens; one that was not written here (an evaluation set) chooses for
    itself. Logs ``pte/recorded_rows``, the share of scored rows that were found: with a plain trainer 1::

        trainer = GRPOTrainer(model=model, peft_config=PTEConfig(eviction="attention", ...), ...)
        RecordedEvictions.attach(trainer)
        trainer.train()

    The old log-probs and those of every later iteration are taken under the choices of the rollout. They are integers: one for each thought that
    left, layer and KV head, on the CPU.

    Args:
        rows: Sequences that are remembered, of this process.
    """

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"`rows` must be at least 1, got {rows}. Use what is scored before the next rollout.")
        self.rows = rows

    @classmethod
    def attach(cls, trainer: Any) -> RecordedEvictions:
        """Add the callback to ``trainer``, for two of its rollouts, and begin to remember.

        Args:
            trainer: A trainer of TRL that rolls out.

        Returns:
            The callback.

        Raises:
            ValueError: The model has no PTE adapter, or nothing is chosen, or the trainer rolls nothing out.
        """
        args = trainer.args
        steps: Any = getattr(args, "steps_per_generation", None) or getattr(args, "gradient_accumulation_steps", 1)
        if not any(hasattr(args, name) for name in ("num_generations", "max_completion_length", "max_new_tokens")):
            raise ValueError(
                f"{type(trainer).__name__} rolls nothing out, so there is nothing to remember. Leave the callback out; GRPOTrainer and RLOOTrainer have it."
            )
        callback = cls(rows=2 * int(steps) * int(args.per_device_train_batch_size))
        drawn = any(isinstance(each, WindowRange) for each in trainer.callback_handler.callbacks)
        callback.begin(trainer.model, drawn)
        trainer.add_callback(callback)
        return callback

    def begin(self, model: nn.Module, drawn: bool = False) -> None:
        """Begin to remember what leaves sequences that ``model`` writes.

        Args:
            model: The adapted model.
            drawn: Whether windows are drawn, so that there are some where the config has none.

        Raises:
            ValueError: The model has no PTE adapter, or nothing is chosen.
        """
        seam = find_seam(model)
        adapter = seam.active_adapter()
        unbounded = adapter is not None and seam.config(adapter).cache_window is None and not drawn
        if adapter is None or unbounded or seam.policy(adapter).uniform:
            raise ValueError(
                'Nothing is chosen with eviction="sliding_window" or without a window: the oldest leave, and scoring knows them by itself. Leave the '
                "callback out; or attach it after WindowRange, if that draws windows."
            )
        seam.memory = EvictionMemory(self.rows)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the share of rows that were found to ``logs`` and to the last entry of ``state.log_history``."""
        memory = find_seam(kwargs["model"]).memory
        if logs is None or memory is None or not memory.asked:
            return
        _add(logs, state, {"pte/recorded_rows": memory.found / memory.asked})
        memory.asked = memory.found = 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget everything."""
        find_seam(kwargs["model"]).memory = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember, also where a training begins again."""
        seam = find_seam(kwargs["model"])
        if seam.memory is None:
            self.begin(kwargs["model"])


class WindowRange(TrainerCallback):  # type: ignore[misc]
    """Draws the window of every training batch, so that one adapter serves many windows and the full cache.

    An adapter that is trained at one window knows that one. Works in any trainer: those of TRL that buffer what they roll out (GRPO, RLOO,
    distillation) draw when they generate, and score what was generated under the window that it was generated in; the others draw at every
    optimizer step. Every process draws the same. Evaluations, checkpoints and what comes after the training have the window of the config::

        trainer = SFTTrainer(model=base, peft_config=PTEConfig(cache_window=1024, ...), ...)
        WindowRange.attach(trainer, [768, 1024, 2048, None])
        trainer.train()
    """

    def __init__(self, trainer: Any, windows: Sequence[int | None]) -> None:
        args = trainer.args
        rollout: Any = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
        self.windows, self.seed = list(windows), int(args.seed)
        self._batches = int(rollout) * int(getattr(args, "num_iterations", None) or 1)
        # Weak, as the trainer holds its callbacks.
        self._trainer = weakref.ref(trainer)
        self._part = 0
        self._drawn: int | None = None
        self._own: dict[str, int | None] = {}

    @classmethod
    def attach(cls, trainer: Any, windows: Sequence[int | None]) -> WindowRange:
        """Put the callback before all others of ``trainer``; one that is there already is replaced.

        Args:
            trainer: A ``transformers.Trainer`` or a trainer of TRL.
            windows: Of thoughts; ``None`` is the full cache. One that is listed twice is drawn twice as often.

        Returns:
            The callback.

        Raises:
            ValueError: The model has no active PTE adapter, there are no windows, or one of them is none for the adapter or the trainer.
            NotImplementedError: The model cannot be bounded by one of them.
        """
        if not windows:
            raise ValueError(
                "`windows` must not be empty. Use e.g. [768, 1024, None]; without a range leave the callback out."
            )
        config = active_config(find_seam(trainer.model))
        if None in windows and (unbounded := _without_full_cache(trainer.args)):
            raise ValueError(
                f"`windows` must not hold None with {unbounded}, which knows no unbounded cache. Use a window that is longer than any completion."
            )
        own = config.cache_window
        try:
            for window in windows:
                config.cache_window = window
        finally:
            config.cache_window = own
        callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, cls)]
        callback = cls(trainer, windows)
        # Before those that generate or save at the end of a step.
        callbacks.insert(0, callback)
        return callback

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw, or go on with what was drawn for this rollout."""
        self._part = 0
        self._set(kwargs["model"], state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next micro-batch of the same step."""
        self._part += 1
        self._set(kwargs["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the config its own window back."""
        self._restore(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same, where a training ends within a step."""
        self._restore(kwargs["model"])

    def _restore(self, model: nn.Module) -> None:
        for name, window in self._own.items():
            find_seam(model).config(name).cache_window = window
        self._own = {}

    def _set(self, model: nn.Module, state: TrainerState) -> None:
        seam = find_seam(model)
        config = active_config(seam)
        self._own.setdefault(seam.require_adapter(), config.cache_window)
        if self._begins():
            self._drawn = random.Random(f"{self.seed} {state.global_step} {self._part}").choice(self.windows)
        config.cache_window = self._drawn

    def _begins(self) -> bool:
        """Whether the next micro-batch is the first of its window."""
        trainer: Any = self._trainer()
        done = getattr(trainer, "_step", None)
        if done is None or not hasattr(trainer, "_buffered_inputs"):
            return self._part == 0
        # As the trainer itself decides whether to generate.
        return trainer._buffered_inputs is None or done % self._batches == 0


def _without_full_cache(args: Any) -> str:
    """What a trainer generates with that needs a window, if anything."""
    if getattr(args, "use_transformers_continuous_batching", False):
        return "`use_transformers_continuous_batching=True`"
    given = getattr(args, "generation_kwargs", None) or {}
    if "static" in (getattr(args, "cache_implementation", None), given.get("cache_implementation")):
        return '`cache_implementation="static"`'
    return ""


def active_config(seam: Seam) -> PTEConfig:
    """The config of the active PTE adapter.

    Raises:
        ValueError: None is active.
    """
    adapter = seam.active_adapter()
    if adapter is None:
        raise ValueError(
            "The model's PTE adapter must be active, and is disabled. Use model.enable_adapter_layers() or set_adapter(name)."
        )
    return seam.config(adapter)


def _add(logs: dict[str, Any], state: TrainerState, figures: dict[str, Any]) -> None:
    logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)


def find_seam(model: nn.Module) -> Seam:
    """The seam of an adapted model, whatever it is wrapped in.

    Raises:
        ValueError: There is none: the model has no PTE adapter.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        wrapped = next((inner._modules[name] for name in _WRAPPED if name in inner._modules), None)
        if wrapped is None:
            break
        inner = wrapped
    seam = Seam.of(inner)
    if seam is None:
        raise ValueError(
            f"`model` must carry a PTE adapter, got {type(inner).__name__} without one. Give the trainer "
            "peft_config=PTEConfig(...), or leave out what is made for it."
        )
    return seam
