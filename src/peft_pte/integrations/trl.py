"""What TRL's trainers (and transformers' own) log about a PTE run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
        named = {prefix + name: value for name, value in figures.items()}
        logs.update(named)
        if state.log_history:
            state.log_history[-1].update(named)


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
            f"`model` must carry a PTE adapter for PTECallback, got {type(inner).__name__} without one. Give the trainer "
            "peft_config=PTEConfig(...), or leave the callback out."
        )
    return seam
