"""On-policy self-distillation with TRL: the bounded student learns from its own weights, adapter off, on their full cache.

No labels, no second model: the student writes, the base model on its full cache says at every token what it would have written next, and the
student follows, by the generalised Jensen-Shannon divergence of *On-Policy Distillation of Language Models* (arXiv 2306.13649), in chunks over the
vocabulary (TRL's). Others begin so before they reinforce under a small cache (Sparrow, arXiv 2606.08446; DMS, arXiv 2506.05345).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, is_conversational

from peft_pte.passes.fidelity import Fidelity, base_of, fidelity, full_cache_forward, windows_of
from peft_pte.passes.modes import as_base, evaluating

from .trl import active_config, describe_adapter, find_seam


@dataclass
class SelfDistillationConfig(DistillationConfig):  # type: ignore[misc]
    """TRL's ``DistillationConfig``, and whose text is learned from; the two new fields are named as in TRL's GKD.

    ``beta`` is the divergence, as there: 0 forward KL (from the full cache to the bounded one), 1 reverse KL, between them their mixture.

    Raises:
        ValueError: ``lmbda`` is not from 0 to 1.
    """

    beta: float = field(
        default=1.0, metadata={"help": "0: forward KL, 1: reverse KL (the default here), between: a mixture."}
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of batches that the student writes itself, under its bounded cache. The others are off-policy: to start with, or with text."
        },
    )
    seq_kd: bool = field(
        default=False,
        metadata={
            "help": "Off-policy batches: True, the teacher writes them on its full cache; False, the `completion` column of the data set is taken."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.lmbda <= 1.0:
            raise ValueError(
                f"`lmbda` must be from 0 to 1, got {self.lmbda}. It is the share of batches that the student writes: use 1.0, or less to start with."
            )
        if self.use_vllm:
            raise ValueError(
                "`use_vllm` must be False: weights per sequence cannot be merged for vLLM. Leave it out, and let transformers generate."
            )


class FullCacheTeacher(nn.Module):
    """The base model of an adapted one on its full cache: the same weights, adapters off, in evaluation mode. It owns no parameter.

    Args:
        model: The adapted model. It is not registered as a child, so that what is done to a teacher is not done to the student.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        # A tuple, because a module that is assigned becomes a child.
        self._models: tuple[Any] = (find_seam(model).model,)

    @property
    def _shared(self) -> Any:
        return self._models[0]

    @property
    def config(self) -> Any:
        """That of the base model."""
        return self._shared.config

    @property
    def base_model(self) -> FullCacheTeacher:
        """Where TRL looks for the backbone: a call of the teacher is one of its backbone."""
        return self

    def get_output_embeddings(self) -> nn.Module:
        """The head of the base model, which a trained copy (``modules_to_save``) does not replace."""
        return base_of(self._shared.get_output_embeddings())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the shared model is the teacher."""
        with evaluating(self._shared), as_base(self._shared):
            yield

    def forward(self, attention_mask: Tensor, **kwargs: Any) -> Any:
        """What the backbone gives, adapters off, on a full cache.

        Args:
            attention_mask: ``[B, N]``.
            kwargs: What else TRL gives to a backbone.
        """
        with self.in_place():
            return full_cache_forward(self._shared, attention_mask, **kwargs)


class SelfDistillationTrainer(DistillationTrainer):  # type: ignore[misc]
    """TRL's ``DistillationTrainer`` whose teacher is the model itself on its full cache.

    Beyond TRL's it logs, of every step that a log is made at, how near the bounded policy is to the full cache on the tokens of the whole batch
    (:func:`peft_pte.passes.fidelity.fidelity`): ``pte/ratio_p5``, the 5th percentile over tokens of their probability in the bounded cache
    over that in the full one (Sparrow, arXiv 2606.08446), and ``pte/kl_...``, reverse KL in nats per token, by how much had left the window.

    Args:
        model: A causal LM, with ``peft_config``; or an adapted one.
        args: The settings.
        train_dataset: A column ``prompt``; with ``lmbda < 1`` and no ``seq_kd``, ``completion`` too. Text or messages.
        eval_dataset: As TRL's. Evaluated on what the student writes.
        processing_class: The tokenizer.
        callbacks: As TRL's.
        optimizers: As TRL's.
        peft_config: A ``PTEConfig``, with ``prompt_end``: the loss shows no labels.
        tools: As TRL's.

    Raises:
        ValueError: The model has no active PTE adapter to train, or its prompts would have no end, or a column is missing.
        TypeError: ``args`` is of another class.
    """

    _tag_names = ["trl", "peft-pte", "self-distillation"]  # noqa: RUF012
    _name = "SelfDistillation"
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SelfDistillationConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
    ) -> None:
        if not isinstance(args, SelfDistillationConfig):
            raise TypeError(
                f"`args` must be a SelfDistillationConfig, got {type(args).__name__}. It takes the same fields, and two more."
            )
        if args.lmbda < 1 and not args.seq_kd:
            _check_given(train_dataset, tools, args.lmbda)
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            tools=tools,
        )
        student = self.accelerator.unwrap_model(self.model)
        config = active_config(find_seam(student))
        if not isinstance(student, PeftModel):
            raise ValueError(
                f"`model` must be a PeftModel, got {type(student).__name__} with an adapter of its own. Use get_peft_model, or give `peft_config`."
            )
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise ValueError(
                "The adapter has no parameter to train. Load it with PeftModel.from_pretrained(base, adapter, is_trainable=True)."
            )
        if config.prompt_end is None:
            raise ValueError(
                "`prompt_end` of the adapter's config must say where thinking starts: distillation scores without labels. Use "
                "PTEConfig(prompt_end=peft_pte.prompt_end(tokenizer)), or an int for text without prompts."
            )
        self.teacher_model = FullCacheTeacher(student)
        self._rows: list[dict[str, Any]] = []
        self._hidden: list[Tensor] | None = None
        self._measured: list[Fidelity] = []
        self._measured_at: Any = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        if "completion" not in columns:
            self._signature_columns = [*columns, "completion"]

    def _writes_itself(self) -> bool:
        """Whether the student writes the batch that is made now; every process says the same."""
        if not self.model.training:
            return True
        draw = random.Random(f"{self.args.seed} {self.state.global_step}").random()
        return bool(draw < self.args.lmbda)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        try:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self._rows = []
        return batch

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        student = self._writes_itself()
        if not student and not self.args.seq_kd:
            return [self._given_completion(row, ids) for row, ids in zip(self._rows, prompt_ids, strict=True)]
        with contextlib.nullcontext() if student else self.teacher_model.in_place():
            written: list[list[int]] = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return written

    def _given_completion(self, row: dict[str, Any], prompt_ids: list[int]) -> list[int]:
        """The tokens of a row's ``completion``, with its end of sequence, cut to ``max_completion_length``.

        Raises:
            ValueError: There is none, or it is of another form than the prompt, or the chat template renders the prompt otherwise once it is answered,
                or leaves a part of the answer out.
        """
        completion, messages = row.get("completion"), is_conversational({"prompt": row["prompt"]})
        if not completion or isinstance(completion, str) == messages:
            raise ValueError(
                f"`completion` must be {'messages' if messages else 'text'}, as `prompt` is, got {completion!r}. Give both as one or the other; "
                "or let the teacher write: seq_kd=True."
            )
        ids = self._rendered(row, prompt_ids) if messages else self._tokenized(completion)
        return ids[: self.max_completion_length]

    def _tokenized(self, text: str) -> list[int]:
        ids: list[int] = self.processing_class(text=text, add_special_tokens=False)["input_ids"]
        return ids if ids and ids[-1] in self.eos_token_ids else [*ids, self._tokenizer.eos_token_id]

    def _rendered(self, row: dict[str, Any], prompt_ids: list[int]) -> list[int]:
        options = {"chat_template": self.chat_template, **self.chat_template_kwargs}
        whole = [*row["prompt"], *row["completion"]]
        ids = self.processing_class.apply_chat_template(whole, tokenize=True, return_dict=True, **options)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "The chat template renders a prompt otherwise once it is answered, so its `completion` cannot be told apart. Give `prompt` and "
                "`completion` as text, or let the teacher write: seq_kd=True."
            )
        text = self.processing_class.apply_chat_template(whole, tokenize=False, **options)
        for message in row["completion"]:
            if isinstance(content := message.get("content"), str) and content.strip() not in text:
                raise ValueError(
                    "The chat template leaves out a part of a `completion` (the thinking of a turn that is over?), and the rest would be learned without "
                    "it. Give `prompt` and `completion` as text, or let the teacher write: seq_kd=True."
                )
        ids = ids[len(prompt_ids) :]
        # What a template puts behind the end of a turn is never written by a model.
        ends = [place for place, token in enumerate(ids) if token in self.eos_token_ids]
        return list(ids[: ends[-1] + 1] if ends else ids)

    # What the two backbones gave, kept from one to the other end of a loss that is logged.

    def _get_last_hidden_state(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = super()._get_last_hidden_state(*args, **kwargs)
        if self._hidden is not None:
            self._hidden.append(hidden.detach())
        return hidden

    @property
    def _is_logged(self) -> bool:
        """Whether what is computed now is part of the next log: of a training, of the step that it is made at."""
        args, state = self.args, self.state
        if not self.model.training or args.logging_strategy == "epoch":
            return True
        step = state.global_step + 1
        return (step == 1 and bool(args.logging_first_step)) or step % max(state.logging_steps, 1) == 0

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        if not self._is_logged:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        # All micro-batches of one step, or of one evaluation.
        at = self.state.global_step if self.model.training else "eval"
        if at != self._measured_at:
            self._measured, self._measured_at = [], at
        self._hidden = []
        try:
            result = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
            self._measured.append(self._fidelity(unwrapped_student, inputs))
        finally:
            self._hidden = None
        return result

    def _fidelity(self, student: PeftModel, inputs: dict[str, Any]) -> Fidelity:
        completion, hidden = inputs["completion_ids"], self._hidden or []
        chosen = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        windows = windows_of(active_config(find_seam(student)), ids, mask, completion.shape[1])
        bounded, full = (rows[chosen.to(rows.device)] for rows in hidden)
        return fidelity(
            (bounded, full),
            (student.get_output_embeddings(), self.teacher_model.get_output_embeddings()),
            completion[chosen],
            windows[chosen],
            student.config.get_text_config(),
            self.temperature,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the figures of the tokens of all processes where they were measured."""
        measured, self._measured, at = self._measured, [], self._measured_at
        self._measured_at = None
        if measured:
            tokens = Fidelity.joined(measured).gathered(self._of_all_processes)
            mode = "eval" if at == "eval" else "train"
            if len(tokens.kl):
                for name, figure in tokens.figures().items():
                    # TRL makes None of NaN.
                    self._metrics[mode][f"pte/{name}"].append(figure.item())
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's, and the part about the adapter."""
        super().create_model_card(*args, **kwargs)
        describe_adapter(self)

    def _of_all_processes(self, rows: Tensor) -> Tensor:
        gathered: Tensor = self.accelerator.gather(self.accelerator.pad_across_processes(rows, pad_index=math.nan))
        return gathered


def _check_given(data: Any, tools: Any, lmbda: float) -> None:
    """Refuse data that cannot be learned from where the student does not write.

    Raises:
        ValueError: Tools would be called, or a column is missing.
    """
    if tools:
        raise ValueError(
            "`tools` would be called on completions that are given. Let the teacher write what the student does not: seq_kd=True."
        )
    # A stream does not always know its columns.
    names = getattr(data, "column_names", None)
    if names is not None and "completion" not in names:
        raise ValueError(
            f"`train_dataset` must have a column `completion` for the batches that the student does not write (lmbda={lmbda}), got {names}. Add it, "
            "or let the teacher write them: seq_kd=True."
        )
