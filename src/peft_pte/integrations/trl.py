"""Callbacks for trainers of TRL (and transformers' own): logs, evictions of a rollout that are scored as they were, windows that are drawn."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_pte.eviction.records import EvictionMemory
from peft_pte.seam import Seam

# Where wrappers keep what they wrap: parallel wrappers, torch.compile.
_WRAPPED = ("module", "_orig_mod")


class PTECallback(TrainerCallback):  # type: ignore[misc]
    """Adds what the cache did since the last log to the logs of a trainer.

    ``pte/evictions_per_sequence``, ``pte/state_norm`` and ``pte/cache_bytes`` (of this process), under ``eval_pte/...``
    where the trainer logs an evaluation. They go into ``logs``, for the callbacks that come after this one, and into
    ``state.log_history``, which checkpoints carry. Nothing is printed.

    A trainer asks its reporters (TensorBoard, W&B, ...) before the callbacks it was given, so ``callbacks=[PTECallback()]``
    comes too late for them; :meth:`attach` does not::

        trainer = GRPOTrainer(model=model, peft_config=PTEConfig(task_type="CAUSAL_LM"), ...)
        PTECallback.attach(trainer)
        trainer.train()
    """

    @classmethod
    def attach(cls, trainer: Any) -> PTECallback:
        """Put the callback before all others of ``trainer``, reporters included; one that is there already moves.

        Args:
            trainer: A ``transformers.Trainer`` or a trainer of TRL.

        Returns:
            The callback.
        """
        callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is not None:
            callbacks.remove(found)
        callback = found or cls()
        callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting with the training.

        Raises:
            ValueError: The model has no PTE adapter.
        """
        find_seam(kwargs["model"]).statistics.drain()

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
        figures = find_seam(kwargs["model"]).statistics.drain()
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
        if not hasattr(args, "num_generations"):
            raise ValueError(
                f"{type(trainer).__name__} rolls nothing out, so there is nothing to remember. Leave the callback out; GRPOTrainer and RLOOTrainer have it."
            )
        callback = cls(rows=2 * int(steps) * int(args.per_device_train_batch_size))
        callback.begin(trainer.model)
        trainer.add_callback(callback)
        return callback

    def begin(self, model: nn.Module) -> None:
        """Begin to remember what leaves sequences that ``model`` writes.

        Raises:
            ValueError: The model has no PTE adapter, or nothing is chosen.
        """
        seam = find_seam(model)
        adapter = seam.active_adapter()
        if adapter is None or seam.config(adapter).cache_window is None or seam.policy(adapter).uniform:
            raise ValueError(
                'Nothing is chosen with eviction="sliding_window" or without a window: the oldest leave, and scoring knows them by itself. Leave the '
                "callback out."
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

    An adapter that is trained at one window knows that one. Works in any trainer: those that roll out draw when they generate, and score what was
    generated under the window that it was generated in; the others draw at every optimizer step. Every process draws the same. Evaluations,
    checkpoints and what comes after the training have the window of the config::

        trainer = SFTTrainer(model=base, peft_config=PTEConfig(cache_window=1024, ...), ...)
        WindowRange.attach(trainer, [768, 1024, 2048, None])
        trainer.train()

    Args:
        windows: Of thoughts; ``None`` is the full cache. One that is listed twice is drawn twice as often.
        batches: Micro-batches for which a window holds: those of one rollout.
        seed: Of the draws.

    Raises:
        ValueError: There are no windows, or one of them is none for the adapter's config.
    """

    def __init__(self, windows: Sequence[int | None], batches: int, seed: int = 0) -> None:
        if not windows:
            raise ValueError(
                "`windows` must not be empty. Use e.g. [768, 1024, None]; without a range leave the callback out."
            )
        if batches < 1:
            raise ValueError(
                f"`batches` must be at least 1, got {batches}. Use the micro-batches of a rollout, or of a step."
            )
        self.windows, self.batches, self.seed = list(windows), batches, seed
        self._done = self._part = 0
        self._drawn: int | None = None
        self._own: dict[str, int | None] = {}

    @classmethod
    def attach(cls, trainer: Any, windows: Sequence[int | None]) -> WindowRange:
        """Add the callback to ``trainer``.

        Args:
            trainer: A ``transformers.Trainer`` or a trainer of TRL.
            windows: See above.

        Returns:
            The callback.

        Raises:
            ValueError: The model has no PTE adapter, or see above.
        """
        args = trainer.args
        rollout: Any = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
        callback = cls(windows, int(rollout) * int(getattr(args, "num_iterations", None) or 1), args.seed)
        seam = find_seam(trainer.model)
        for window in callback.windows:
            dataclasses.replace(seam.config(seam.require_adapter()), cache_window=window)
        trainer.add_callback(callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin at a rollout, also where a training is taken up again: trainers do."""
        self._done = 0

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
        self._done, self._part = self._done + 1, self._part + 1
        self._set(kwargs["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the config its own window back."""
        self._done += 1
        for name, window in self._own.items():
            find_seam(kwargs["model"]).config(name).cache_window = window
        self._own = {}

    def _set(self, model: nn.Module, state: TrainerState) -> None:
        seam = find_seam(model)
        name = seam.require_adapter()
        config = seam.config(name)
        self._own.setdefault(name, config.cache_window)
        if self._done % self.batches == 0:
            self._drawn = random.Random(f"{self.seed} {state.global_step} {self._part}").choice(self.windows)
        config.cache_window = self._drawn


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
