"""Every trainer of TRL that takes ``peft_config``, as a table of cases, and the measurement that is made of each.

A case builds an unmodified trainer on a tiny random model and runs one optimisation step. What is measured does not look inside
the package: a hook on the model sees what the trainer passed and what it got back, a logits processor sees what its rollouts
sampled from, and both are compared with the same rows scored alone, with labels that say where the prompt ends.
"""

import contextlib
import dataclasses
import io
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

from tests.helpers import trainable
from tests.integrations.common import COMPLETION, WINDOW, make_tokenizer, make_trl_base, pte_config

MARKER = 60
"""The word that ends every prompt (``w60``); in the chat template, the header of an assistant's turn."""

TOOL = 57
"""The header of what a tool returns, in the chat template."""

EQUAL = 1e-4
EVICTED = 1e-2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}w58 {{ message.content }} "
    "{% elif message.role == 'tool' %}w57 {{ message.content }} "
    "{% elif message.role == 'system' %}w59 {{ message.content }} "
    "{% else %}w60 {% generation %}{{ message.content }} {% endgeneration %}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments }} {% endfor %}<eos> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}w60 {% endif %}"
)

# Data --------------------------------------------------------------------------------------------------------------------------

PROMPTS = ["w3 w4 w5 w60", "w7 w60", "w9 w10 w60", "w11 w12 w13 w14 w60"]


def words(start: int, step: int, count: int) -> str:
    """A completion without the marker."""
    return " ".join(f"w{3 + (start + step * index) % 50}" for index in range(count))


def completions(step: int) -> list[str]:
    """Three windows and a little more, of different lengths."""
    return [words(start, step, COMPLETION + start) for start in range(len(PROMPTS))]


def prompt_data(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, **columns})


def long_prompt_data() -> Dataset:
    return Dataset.from_dict({"prompt": [f"{words(start, 7, 2 * WINDOW)} w{MARKER}" for start in range(4)]})


def completion_data() -> Dataset:
    return prompt_data(completion=[f" {text}" for text in completions(7)])


def preference_data(**columns: list[Any]) -> Dataset:
    return prompt_data(
        chosen=[f" {text}" for text in completions(7)], rejected=[f" {text}" for text in completions(3)], **columns
    )


def message_data() -> Dataset:
    return Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": prompt[:-4]}, {"role": "assistant", "content": text}]
                for prompt, text in zip(PROMPTS, completions(7), strict=True)
            ]
        }
    )


def question_data() -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt[:-4]}] for prompt in PROMPTS]})


def text_data() -> Dataset:
    return Dataset.from_dict(
        {"text": [f"{prompt} {text}" for prompt, text in zip(PROMPTS, completions(7), strict=True)]}
    )


def small_words(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that differs between completions: how many words are below w30."""
    texts = [part if isinstance(part, str) else part[0]["content"] for part in completions]
    rows = [[word for word in text.split() if word[1:].isdigit()] for text in texts]
    return [sum(int(word[1:]) < 30 for word in row) / max(len(row), 1) for row in rows]


def make_chat_tokenizer(kind: Any = None) -> Any:
    tokenizer = make_tokenizer() if kind is None else kind(tokenizer_object=make_tokenizer().backend_tokenizer)
    if kind is not None:
        tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token = "<pad>", "<eos>", "<unk>"
        tokenizer.padding_side = "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# Cases -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One trainer, as it is built and what is known of it."""

    name: str
    make: Callable[..., Any]
    note: str = ""
    """How to use it, or why it was not tried."""
    generates: bool = False
    labels: bool = False
    """Whether the trainer hands its labels to the causal LM, as read in TRL."""
    slow: bool = False
    task: str = "CAUSAL_LM"
    untried: str = ""
    refused: str = ""
    """Words of the refusal, where a policy with a bounded cache is refused whatever its config says."""
    prompt_end: Any = dataclasses.field(default_factory=lambda: [MARKER])
    keep: int = 0
    """With an integer `prompt_end`, how many tokens are prompt."""
    base: Callable[..., Any] = make_trl_base
    reference: bool = False
    """Whether the base model, on its full cache, is scored too."""
    check: Callable[["Outcome"], str] = lambda outcome: ""
    """What else is asked of a case: what is wrong, or nothing."""
    limit: str = ""
    """What happens without `prompt_end` where it is neither equal nor refused, as no single call could tell."""


def arguments(kind: Any, directory: Path, **fields: Any) -> Any:
    """The config of a trainer: one step of one batch in float32 on the CPU, everything else as TRL has it."""
    return kind(
        **{
            "output_dir": str(directory),
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "bf16": False,
            "seed": 3,
            **fields,
        }
    )


def make_sft(model, config, directory, data=completion_data, tokenizer=make_tokenizer, extra=None, **fields):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=arguments(SFTConfig, directory, **fields),
        train_dataset=data(),
        processing_class=tokenizer(),
        peft_config=config,
        **(extra or {}),
    )


def own_loss(outputs, labels, num_items_in_batch=None):
    """The loss of a user who passes ``compute_loss_func``."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def make_sft_own_loss(model, config, directory):
    return make_sft(model, config, directory, extra={"compute_loss_func": own_loss})


def make_sft_metrics(model, config, directory):
    extra = {"compute_metrics": lambda prediction: {"seen": 1.0}, "eval_dataset": completion_data()}
    return make_sft(model, config, directory, extra=extra, eval_on_start=True)


def make_grpo(model, config, directory, kind=None, data=prompt_data, tokenizer=make_tokenizer, extra=None, **fields):
    from trl import GRPOConfig, GRPOTrainer

    trainer, arguments_kind = kind or (GRPOTrainer, GRPOConfig)
    fields = {"num_generations": 4, "max_completion_length": COMPLETION, **fields}
    return trainer(
        model=model,
        reward_funcs=small_words,
        args=arguments(arguments_kind, directory, **fields),
        train_dataset=data(),
        processing_class=tokenizer(),
        peft_config=config,
        **(extra or {}),
    )


BATCHING = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"max_requests_per_batch": 3},
}


def make_rloo(model, config, directory, **fields):
    from trl import RLOOConfig, RLOOTrainer

    return make_grpo(model, config, directory, (RLOOTrainer, RLOOConfig), **fields)


def make_gmpo(model, config, directory):
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    return make_grpo(model, config, directory, (GMPOTrainer, GMPOConfig))


def look_up() -> str:
    """
    Looks a word up.

    Returns:
        The words that were found.
    """
    return "w20 w21 w22 w23 w24"


def make_tool_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    class ToolTokenizer(PreTrainedTokenizerFast):
        """Reads a call of the tool out of any turn whose first word says how many calls its row makes: none, one or two."""

        def parse_response(self, response, prefix=None, tools=None, **kwargs):
            made = prefix.count(TOOL)
            parsed = {"role": "assistant", "content": self.decode(response, skip_special_tokens=True)}
            first = (prefix + response)[prefix.index(MARKER) + 1]
            if made < first % 3:
                parsed["tool_calls"] = [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]
            return parsed

    tokenizer = make_chat_tokenizer(ToolTokenizer)
    tokenizer.response_template = {"parsed": "by the class"}
    return tokenizer


def make_tool_base() -> Any:
    """Ends its turns early, so that there is room for the next."""
    base = make_trl_base()
    base.generation_config.eos_token_id = [1, *range(30, 36)]
    return base


def make_grpo_wrapped(model, config, directory):
    torch.manual_seed(5)
    return make_grpo(get_peft_model(model, config), None, directory, beta=0.1)


def kl_of_the_base(outcome: "Outcome") -> str:
    """The reference is the base model, from which the adapter differs, by its window at least."""
    return "" if outcome.log["kl"] > 1e-3 else f"the first KL is {outcome.log['kl']}"


def kl_of_a_copy(outcome: "Outcome") -> str:
    """The reference is a copy of the adapter under the same window, so that the first step has no KL."""
    if not any(call.adapter == "ref" for call in outcome.calls):
        return "no adapter `ref` was scored"
    return "" if abs(outcome.log["kl"]) < 1e-6 else f"the first KL is {outcome.log['kl']}"


def no_cache_asked_for(outcome: "Outcome") -> str:
    return "" if all(turn.use_cache is False for turn in outcome.turns) else "`generate` was asked for a cache"


def two_calls_of_a_tool(outcome: "Outcome") -> str:
    most = max(turn.given.count(TOOL) for turn in outcome.turns)
    return "" if most >= 2 else f"no row called the tool twice, at most {most} times"


def make_grpo_tools(model, config, directory, **fields):
    return make_grpo(
        model,
        config,
        directory,
        data=question_data,
        tokenizer=make_tool_tokenizer,
        extra={"tools": [look_up]},
        per_device_train_batch_size=8,
        max_completion_length=4 * COMPLETION,
        **fields,
    )


def make_dpo(model, config, directory):
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=model,
        args=arguments(DPOConfig, directory),
        train_dataset=preference_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


def make_kto(model, config, directory):
    from trl import KTOConfig, KTOTrainer

    data = prompt_data(completion=[f" {text}" for text in completions(7)], label=[True, False, True, False])
    return KTOTrainer(
        model=model,
        args=arguments(KTOConfig, directory),
        train_dataset=data,
        processing_class=make_tokenizer(),
        peft_config=config,
    )


def make_distillation(model, config, directory):
    from trl import DistillationConfig, DistillationTrainer

    return DistillationTrainer(
        model=model,
        teacher_model=make_trl_base(seed=9),
        args=arguments(DistillationConfig, directory, max_completion_length=COMPLETION),
        train_dataset=prompt_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


class TeacherOnThisMachine:
    """Stands where the client of a vLLM server with the teacher stands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.teacher = make_trl_base(seed=9).eval()

    @torch.no_grad()
    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs=1, temperature=1.0, **kwargs):
        found: dict[str, list[Any]] = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for tokens, length in zip(sequences, prompt_lengths, strict=True):
            ids = torch.tensor(tokens)[None]
            log_probs = (self.teacher(ids).logits[0, length - 1 : -1] / temperature).log_softmax(dim=-1)
            best = log_probs.topk(top_logprobs)
            found["logprobs"].append(best.values.tolist())
            found["logprob_token_ids"].append(best.indices.tolist())
            found["actual_logprobs"].append(log_probs.gather(-1, ids[0, length:, None]).tolist())
        return found


def make_server_distillation(model, config, directory):
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
    from trl.generation import vllm_client

    client = vllm_client.VLLMClient
    vllm_client.VLLMClient = TeacherOnThisMachine
    try:
        return ServerDistillationTrainer(
            model=model,
            args=arguments(
                ServerDistillationConfig,
                directory,
                max_completion_length=COMPLETION,
                teacher_model_server_url="http://none",
            ),
            train_dataset=prompt_data(),
            processing_class=make_tokenizer(),
            peft_config=config,
        )
    finally:
        vllm_client.VLLMClient = client


def make_gkd(model, config, directory, **fields):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return GKDTrainer(
        model=model,
        teacher_model=make_trl_base(seed=9),
        args=arguments(GKDConfig, directory, max_new_tokens=COMPLETION, **fields),
        train_dataset=message_data(),
        processing_class=make_chat_tokenizer(),
        peft_config=config,
    )


def make_gkd_on_policy(model, config, directory):
    return make_gkd(model, config, directory, lmbda=1.0)


def make_gkd_off_policy(model, config, directory):
    return make_gkd(model, config, directory, lmbda=0.0)


def make_gold(model, config, directory, lmbda=1.0):
    from tokenizers import pre_tokenizers
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    # It counts bytes, and takes no tokenizer that does not say that it works on them.
    tokenizer = make_chat_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return GOLDTrainer(
        model=model,
        teacher_model=make_trl_base(seed=9),
        args=arguments(GOLDConfig, directory, max_completion_length=COMPLETION, max_length=128, lmbda=lmbda),
        train_dataset=message_data(),
        processing_class=tokenizer,
        peft_config=config,
    )


def make_iw_opd(model, config, directory):
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    # It opens the teacher's tokenizer by the teacher's name, to see whether it is the student's.
    tokenizer, teacher = make_chat_tokenizer(), make_trl_base(seed=9)
    tokenizer.save_pretrained(directory / "teacher")
    teacher.config.save_pretrained(directory / "teacher")
    teacher.config._name_or_path = str(directory / "teacher")
    return IWOPDTrainer(
        model=model,
        teacher_model=teacher,
        args=arguments(IWOPDConfig, directory, max_completion_length=COMPLETION, max_length=128),
        train_dataset=message_data(),
        processing_class=tokenizer,
        peft_config=config,
    )


def make_sdft(model, config, directory, **fields):
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    return SDFTTrainer(
        model=model,
        args=arguments(
            SDFTConfig,
            directory,
            max_completion_length=COMPLETION,
            num_generations=1,
            distillation_topk=8,
            **fields,
        ),
        train_dataset=question_data().add_column("privileged_context", [f"w{50 + row}" for row in range(len(PROMPTS))]),
        processing_class=make_chat_tokenizer(),
        peft_config=config,
    )


def make_sdft_live(model, config, directory):
    return make_sdft(model, config, directory, teacher_model_kind="live")


def make_sdpo(model, config, directory, **fields):
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    fields = {"teacher_model_kind": "base", "success_reward_threshold": 0.0, **fields}
    return SDPOTrainer(
        model=model,
        reward_funcs=small_words,
        args=arguments(SDPOConfig, directory, max_completion_length=COMPLETION, num_generations=4, **fields),
        train_dataset=question_data(),
        processing_class=make_chat_tokenizer(),
        peft_config=config,
    )


def make_sdpo_default(model, config, directory):
    return make_sdpo(model, config, directory, teacher_model_kind="ema")


def make_orpo(model, config, directory):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(
        model=model,
        args=arguments(ORPOConfig, directory),
        train_dataset=preference_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


def make_cpo(model, config, directory):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer(
        model=model,
        args=arguments(CPOConfig, directory),
        train_dataset=preference_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


def make_tpo(model, config, directory):
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    return TPOTrainer(
        model=model,
        args=arguments(TPOConfig, directory),
        train_dataset=preference_data(reference=[f" {text}" for text in completions(11)]),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


def make_online_dpo(model, config, directory, **fields):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    return OnlineDPOTrainer(
        model=model,
        reward_funcs=small_words,
        args=arguments(OnlineDPOConfig, directory, max_new_tokens=COMPLETION, **fields),
        train_dataset=prompt_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


def make_online_dpo_cached(model, config, directory):
    return make_online_dpo(model, config, directory, generation_kwargs={"use_cache": True})


def make_a2po(model, config, directory):
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    torch.manual_seed(5)
    return A2POTrainer(
        model=get_peft_model(model, config),
        reward_funcs=small_words,
        args=arguments(
            A2POConfig, directory, max_completion_length=COMPLETION, num_value_samples=2, filter_all_incorrect=False
        ),
        train_dataset=prompt_data(),
        processing_class=make_tokenizer(),
    )


def make_reward(model, config, directory):
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(
        model=model,
        args=arguments(RewardConfig, directory),
        train_dataset=preference_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
    )


def make_reward_base() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.cases import GROUPED

    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**GROUPED, "num_labels": 1}))


REFILLED = "`use_transformers_continuous_batching=True`: `generate_batch` on rows that are refilled"
TURNS_DIFFER = "**differs**: each turn of the rollout takes all that went before for its prompt, and no call can tell"

CASES = [
    Case("SFT", make_sft, "prompt and completion columns", labels=True),
    Case(
        "SFT, `messages`",
        lambda *a: make_sft(*a, data=message_data, tokenizer=make_chat_tokenizer),
        "labels on every column",
    ),
    Case(
        "SFT, `assistant_only_loss`",
        lambda *a: make_sft(*a, data=message_data, tokenizer=make_chat_tokenizer, assistant_only_loss=True),
        "the labels begin with the first answer of the assistant",
        labels=True,
    ),
    Case(
        "SFT, `text`",
        lambda *a: make_sft(*a, data=text_data),
        "text without a prompt: `prompt_end=4`",
        prompt_end=4,
        keep=4,
    ),
    Case(
        "SFT, `label_smoothing_factor`",
        lambda *a: make_sft(*a, label_smoothing_factor=0.1),
        "the trainer keeps the labels to itself",
    ),
    Case("SFT, `compute_loss_func`", make_sft_own_loss, "the trainer keeps the labels to itself"),
    Case(
        "SFT, `compute_metrics`",
        make_sft_metrics,
        "the logits for the metrics are computed without labels: without `prompt_end` of the full cache, with a warning",
        labels=True,
    ),
    Case(
        "SFT, `packing`",
        lambda *a: make_sft(*a, packing=True, max_length=64),
        "one row of the cache holds one sequence: `packing=False, padding_free=False`",
        refused="packing=False",
    ),
    Case("GRPO", make_grpo, generates=True, labels=True),
    Case(
        "GRPO, `beta`",
        lambda *a: make_grpo(*a, beta=0.1),
        "the reference is the base model on its full cache: the first KL is not zero",
        generates=True,
        labels=True,
        reference=True,
        check=kl_of_the_base,
    ),
    Case(
        "GRPO, `beta`, PeftModel",
        make_grpo_wrapped,
        "the reference is a copy of the adapter under the same window: the first KL is zero",
        generates=True,
        labels=True,
        check=kl_of_a_copy,
    ),
    Case(
        "GRPO, `tools`",
        make_grpo_tools,
        "each turn is a call of `generate` on all that went before, in rows of different lengths",
        generates=True,
        check=two_calls_of_a_tool,
        limit=TURNS_DIFFER,
        base=make_tool_base,
    ),
    Case(
        "GRPO, continuous batching",
        lambda *a: make_grpo(*a, **BATCHING),
        REFILLED,
        generates=True,
        labels=True,
    ),
    Case(
        "GRPO, `tools`, continuous batching",
        lambda *a: make_grpo_tools(*a, **BATCHING),
        REFILLED,
        generates=True,
        check=two_calls_of_a_tool,
        limit=TURNS_DIFFER,
        base=make_tool_base,
    ),
    Case("RLOO", make_rloo, generates=True, labels=True, reference=True),
    Case(
        "RLOO, continuous batching",
        lambda *a: make_rloo(*a, **BATCHING),
        REFILLED,
        generates=True,
        labels=True,
        reference=True,
    ),
    Case("DPO", make_dpo, labels=True, reference=True),
    Case("KTO", make_kto, labels=True, reference=True),
    Case("Distillation", make_distillation, generates=True),
    Case(
        "Reward",
        make_reward,
        "a classifier writes no thoughts; use LoRA",
        task="SEQ_CLS",
        base=make_reward_base,
        refused="RewardTrainer|sequence classification|must have `generate`",
    ),
    Case("A2PO", make_a2po, "takes a PeftModel, no `peft_config`", generates=True),
    Case("CPO", make_cpo),
    Case(
        "GKD",
        make_gkd_on_policy,
        "asks `generate` for `use_cache=False` unless `gradient_checkpointing=False`",
        generates=True,
        check=no_cache_asked_for,
    ),
    Case("GKD, `lmbda=0`", make_gkd_off_policy, slow=True),
    Case("GMPO", make_gmpo, generates=True, labels=True, slow=True),
    Case("GOLD", make_gold, generates=True),
    Case("IW-OPD", make_iw_opd, generates=True, slow=True),
    Case(
        "OnlineDPO",
        make_online_dpo,
        "asks `generate` for `use_cache=False` unless `generation_kwargs` say otherwise",
        generates=True,
        reference=True,
        check=no_cache_asked_for,
    ),
    Case(
        "OnlineDPO, `use_cache`",
        make_online_dpo_cached,
        '`generation_kwargs={"use_cache": True}`',
        generates=True,
        slow=True,
        reference=True,
    ),
    Case("ORPO", make_orpo),
    Case("SDFT", make_sdft, "the teacher is the base model on its full cache", generates=True, reference=True),
    Case(
        'SDFT, `"live"`',
        make_sdft_live,
        "the teacher is the policy; its prompt too must end in the marker, which a chat template sees to",
        generates=True,
    ),
    Case(
        "SDPO",
        make_sdpo,
        '`teacher_model_kind="base"`: the base model on its full cache',
        generates=True,
        reference=True,
    ),
    Case(
        'SDPO, `"ema"`',
        make_sdpo_default,
        'TRL averages LoRA adapters only: `teacher_model_kind="base"` or `"live"`',
        generates=True,
        refused="teacher_model_kind",
    ),
    Case(
        "ServerDistillation",
        make_server_distillation,
        "tried with a teacher in the same process",
        generates=True,
        slow=True,
    ),
    Case("TPO", make_tpo, slow=True),
    Case(
        "AsyncGRPO",
        None,
        untried="needs a vLLM server and a GPU; it merges the adapter into the server's weights and packs rows, both refused",
    ),
    Case(
        "AsyncDistillation",
        None,
        untried="needs a vLLM server and a GPU; it merges the adapter into the server's weights and packs rows, both refused",
    ),
]

# Measurement -------------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call that a trainer made, and the log-probs it got: of each row's real tokens, NaN where it asked for none."""

    rows: list[list[int]]
    log_probs: list[torch.Tensor]
    target: str
    labels: str
    use_cache: Any
    positions: bool
    grad: bool
    training: bool
    adapter: str | None
    """The adapter that was active, or None where adapters were disabled."""
    step: int
    dtype: torch.dtype

    def describe(self) -> str:
        return (
            f"{self.target}, labels {self.labels}, use_cache={self.use_cache}, grad={self.grad}, training={self.training}, "
            f"adapter={self.adapter}, {self.dtype}, rows {[len(row) for row in self.rows]}"
        )


@dataclass
class Turn:
    """A row of a rollout: what was given, what was sampled, and the log-probs it was sampled with."""

    given: list[int]
    sampled: list[int]
    log_probs: torch.Tensor
    use_cache: Any


@dataclass
class Outcome:
    calls: list[Call] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    refusal: BaseException | None = None
    alone: float | None = None
    """Largest difference of a thought's log-prob in the loss to that of its row scored alone."""
    others: float | None = None
    """The same in the trainer's other calls of the policy: old log-probs, metrics, a teacher that is the policy itself."""
    reference: float | None = None
    """Largest difference of the calls with the adapter disabled to the base model on its full cache."""
    rollout: float | None = None
    """Largest difference of a thought's log-prob to that which it was sampled with."""
    unbounded: float | None = None
    """The same to the row on an unbounded cache: large if anything was evicted."""
    thoughts: int = 0
    turns_found: int = 0
    silent: list[str] = field(default_factory=list)
    """Trainable parameters that got no gradient."""
    log: dict[str, Any] = field(default_factory=dict)
    """What the trainer logged of the step."""

    @property
    def loss(self) -> float | None:
        return self.log.get("loss")


class Watch:
    """Notes the outermost calls of a model and its rollouts, and the gradients of a step."""

    def __init__(self, trainer: Any, eos: set[int]) -> None:
        self.trainer, self.eos = trainer, eos
        self.model = trainer.model
        self.host = self.model.get_base_model()
        self.calls: list[Call] = []
        self.turns: list[Turn] = []
        self.gradients: dict[str, float] = {}
        self._depth = 0
        self._generating = False
        self._hooks = []
        for module, name in ((self.model, "model"), (self.host.base_model, "backbone")):
            self._hooks += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(
                    lambda module, args, kwargs, output, name=name: self._leave(name, args, kwargs, output),
                    with_kwargs=True,
                    always_call=True,
                ),
            ]
        if self.host.can_generate():
            self._generate = self.host.generate
            self.host.generate = self._rollout
            self._generate_batch = self.host.generate_batch
            self.host.generate_batch = self._rollout_of_requests
        watch = self

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                for name, parameter in trainable(watch.model).items():
                    size = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
                    watch.gradients[name] = size

        trainer.add_callback(Gradients())

    @staticmethod
    def _counts(args, kwargs) -> bool:
        # The calls that recompute activations in the backward pass are no calls of the trainer, and what DistillationTrainer
        # passes through the wrapped model is a function of its own, with a call of the backbone inside.
        return torch._C._current_graph_task_id() == -1 and isinstance(
            args[0] if args else kwargs.get("input_ids"), torch.Tensor
        )

    def _enter(self, module, args, kwargs):
        self._depth += self._counts(args, kwargs)

    def _leave(self, name, args, kwargs, output):
        if not self._counts(args, kwargs):
            return
        self._depth -= 1
        if self._depth == 0 and output is not None and not self._generating:
            self._note(name, args, kwargs, output)

    def stop(self):
        for hook in self._hooks:
            hook.remove()
        if self.host.can_generate():
            self.host.generate = self._generate
            self.host.generate_batch = self._generate_batch

    @torch.no_grad()
    def _note(self, name, args, kwargs, output):
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        labels = kwargs.get("labels")
        shown = "none"
        if labels is not None:
            first = [(row != -100).nonzero() for row in labels[:, :]]
            full = any(
                len(found) and int(found[0]) == int(real.nonzero()[0]) for found, real in zip(first, mask, strict=True)
            )
            shown = "from the first token" if full else "of the completion"
        log_probs = torch.full(ids.shape, float("nan"))
        fused = getattr(output, "log_probs", None)
        if fused is not None:
            known = labels[:, 1:] != -100
            log_probs[:, 1:] = torch.where(known, fused.detach().float(), log_probs[:, 1:])
        else:
            logits = getattr(output, "logits", None)
            if logits is None:
                logits = self.host.get_output_embeddings()(output.last_hidden_state)
            if logits.dim() == 3:
                kept = logits.shape[1] - 1
                targets = ids[:, ids.shape[1] - kept :]
                picked = logits[:, :-1].detach().float().log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
                log_probs[:, ids.shape[1] - kept :] = picked
        self.calls.append(
            Call(
                rows=[row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)],
                log_probs=[row[real.bool()] for row, real in zip(log_probs, mask, strict=True)],
                target=name + (" (fused head)" if kwargs.get("fused_lm_head") else ""),
                labels=shown,
                use_cache=kwargs.get("use_cache"),
                positions=kwargs.get("position_ids") is not None,
                grad=next((value.requires_grad for value in vars_of(output) if isinstance(value, torch.Tensor)), False),
                training=self.model.training,
                adapter=None
                if any(layer.disable_adapters for layer in self.model.modules() if isinstance(layer, BaseTunerLayer))
                else self.model.active_adapter,
                step=self.trainer.state.global_step,
                dtype=next(value.dtype for value in vars_of(output) if isinstance(value, torch.Tensor)),
            )
        )

    def _rollout(self, *args, **kwargs):
        recorder = RecordLogProbs()
        self._generating = True
        try:
            output = self._generate(*args, logits_processor=LogitsProcessorList([recorder]), **kwargs)
        finally:
            self._generating = False
        sequences = getattr(output, "sequences", output)
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs["attention_mask"].bool()
        copies = len(sequences) // len(ids)
        ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
        log_probs = torch.stack(recorder.steps, dim=1)
        config = kwargs.get("generation_config")
        for row, given, real, steps in zip(sequences, ids, mask, log_probs, strict=True):
            sampled = row[len(given) :].tolist()
            end = next((index + 1 for index, token in enumerate(sampled) if token in self.eos), len(sampled))
            picked = steps[:end].gather(-1, row[len(given) : len(given) + end, None])[:, 0]
            self.turns.append(
                Turn(given[real].tolist(), sampled[:end], picked.float(), getattr(config, "use_cache", None))
            )
        return output

    def _rollout_of_requests(self, inputs, continuous_batching_config, **kwargs):
        batching = dataclasses.replace(continuous_batching_config, return_logprobs=True)
        self._generating = True
        try:
            outputs = self._generate_batch(inputs, continuous_batching_config=batching, **kwargs)
        finally:
            self._generating = False
        for output in outputs.values():
            log_probs = torch.tensor(output.logprobs)
            self.turns.append(Turn(list(output.prompt_ids), list(output.generated_tokens), log_probs, None))
        return outputs


def vars_of(output: Any) -> list[Any]:
    return list(output.values()) if hasattr(output, "values") else list(vars(output).values())


class RecordLogProbs(LogitsProcessor):
    """Sees the distribution that each token is sampled from, before its temperature."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores.log_softmax(dim=-1))
        return scores


def first_thought(case: Case, row: list[int]) -> int:
    """Where the thoughts of a row begin, by the rule of `prompt_end`."""
    return case.keep or row.index(MARKER) + 1


@torch.no_grad()
def score_alone(model: Any, row: list[int], first: int) -> torch.Tensor:
    """Log-probs of the thoughts of one row, scored alone with labels that say where its prompt ends."""
    ids = torch.tensor(row)[None]
    labels = ids.clone()
    labels[:, :first] = -100
    logits = model(input_ids=ids, labels=labels).logits[0, first - 1 : -1].float()
    return logits.log_softmax(dim=-1).gather(-1, ids[0, first:, None])[:, 0]


def lora_config(task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(task_type=task, r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)


def make_config(case: Case, adapter: str, **fields: Any) -> Any:
    """`"lora"`, `"pte"`, or `"pte, prompt_end"`; the fields are those of PTE."""
    if adapter == "lora":
        return lora_config(case.task)
    fields = {"task_type": case.task, **fields}
    if adapter == "pte, prompt_end":
        fields["prompt_end"] = case.prompt_end
    return pte_config(**fields)


@contextlib.contextmanager
def quiet():
    """Without the progress bars and the warnings of the hosts."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


def measure(case: Case, adapter: str, **fields: Any) -> Outcome:
    """One step of a trainer, and how its numbers compare."""
    outcome = Outcome()
    base = case.base()
    eos = base.generation_config.eos_token_id if base.can_generate() else None
    eos = set(eos if isinstance(eos, list) else [eos])
    config = make_config(case, adapter, **fields)
    with tempfile.TemporaryDirectory() as directory:
        watch = None
        try:
            torch.manual_seed(5)
            trainer = case.make(base, config, Path(directory))
            watch = Watch(trainer, eos)
            before = {name: value.detach().clone() for name, value in trainable(trainer.model).items()}
            trainer.train()
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            outcome.refusal = error
        if watch is not None:
            watch.stop()
            outcome.calls, outcome.turns = watch.calls, watch.turns
            outcome.silent = [name for name, size in watch.gradients.items() if not size > 0]
            outcome.log = next((entry for entry in trainer.state.log_history if "loss" in entry), {})
    if outcome.refusal is None and not case.refused:
        with torch.no_grad():
            for name, value in trainable(trainer.model).items():
                value.copy_(before[name])
        compare(case, adapter, trainer.model.eval(), outcome)
    return outcome


def compare(case: Case, adapter: str, model: Any, outcome: Outcome) -> None:
    """Fills in what the recorded log-probs differ by. The calls with gradients are the trainer's loss."""
    base = case.base().eval()
    unbounded = None
    if adapter != "lora":
        fields = {"cache_window": None}
        unbounded = get_peft_model(case.base(), pte_config(**fields)).eval()
        mine = dict(unbounded.named_parameters())
        with torch.no_grad():
            for name, value in trainable(model).items():
                mine[name].copy_(value)
    alone: dict[tuple[int, ...], torch.Tensor] = {}
    for call in outcome.calls:
        # Later the weights have moved. The teacher of SDPO by default is an adapter of its own.
        if call.step or call.adapter not in (None, "default", "ref"):
            continue
        for row, log_probs in zip(call.rows, call.log_probs, strict=True):
            first = first_thought(case, row)
            thoughts = log_probs[first:]
            known = ~thoughts.isnan()
            if call.adapter is None:
                outcome.reference = largest(outcome.reference, (thoughts - score_alone(base, row, first))[known])
                continue
            if tuple(row) not in alone:
                alone[tuple(row)] = score_alone(model, row, first)
            difference = (thoughts - alone[tuple(row)])[known]
            if not call.grad:
                outcome.others = largest(outcome.others, difference)
                continue
            outcome.thoughts = max(outcome.thoughts, int(known.sum()))
            outcome.alone = largest(outcome.alone, difference)
            if unbounded is not None:
                outcome.unbounded = largest(outcome.unbounded, (thoughts - score_alone(unbounded, row, first))[known])
            for turn in outcome.turns:
                # A later turn continues the row of an earlier one; a trainer may cut the end off a turn.
                start = len(turn.given)
                end = min(len(row), start + len(turn.sampled))
                if end > start and row[:end] == (turn.given + turn.sampled)[:end]:
                    scored = log_probs[start:end]
                    difference = (scored - turn.log_probs[: end - start])[~scored.isnan()]
                    outcome.rollout = largest(outcome.rollout, difference)
                    outcome.turns_found += 1


def largest(found: float | None, difference: torch.Tensor) -> float | None:
    if not difference.numel():
        return found
    return max(found or 0.0, difference.abs().max().item())


def judge(case: Case, outcome: Outcome, adapter: str) -> str:
    """`"equal"`, `"refused"`, or what is wrong."""
    if outcome.refusal is not None:
        # LoRA is never refused; a policy is, with its remedy, where nothing tells it where prompts end.
        allowed = case.refused or ("prompt_end" if adapter == "pte" else "")
        if adapter != "lora" and allowed and re.search(allowed, str(outcome.refusal)):
            return "refused"
        return f"{type(outcome.refusal).__name__}: {outcome.refusal}"
    problems = []
    if case.refused:
        return "equal" if adapter == "lora" else "not refused"
    if outcome.thoughts < 2 * WINDOW:
        problems.append(f"only {outcome.thoughts} thoughts in the loss")
    for name, value in (("row scored alone", outcome.alone), ("rollout", outcome.rollout)):
        if value is None and (case.generates or name != "rollout"):
            problems.append(f"nothing to compare with its {name}")
        elif value is not None and not value < EQUAL:
            problems.append(f"differs by {value:.1g} from its {name}")
    # Without gradients and without a sign of where the prompt ends, there is a warning.
    if adapter != "pte" and outcome.others is not None and not outcome.others < EQUAL:
        problems.append(f"calls beside the loss differ by {outcome.others:.1g} from their rows scored alone")
    if outcome.reference is not None and not outcome.reference < EQUAL:
        problems.append(f"the reference differs by {outcome.reference:.1g} from the base model")
    if adapter != "lora" and not (outcome.unbounded is not None and outcome.unbounded > EVICTED):
        problems.append("nothing was evicted")
    if case.reference and outcome.reference is None:
        problems.append("the base model was never scored")
    problems += filter(None, [case.check(outcome)])
    if outcome.silent:
        problems.append(f"no gradient in {len(outcome.silent)} parameters, as in {outcome.silent[0]}")
    return "; ".join(problems) or "equal"


def describe(outcome: Outcome) -> str:
    """How the loss of a trainer is computed, in a cell of the table."""
    loss = [call for call in outcome.calls if call.grad and call.adapter is not None]
    if not loss:
        return ""
    call = loss[0]
    target = {"model": "logits", "model (fused head)": "fused head", "backbone": "backbone"}[call.target]
    labels = {"none": "no labels", "of the completion": "labels", "from the first token": "labels on every column"}
    return f"{target}, {labels[call.labels]}"


PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
HEAD = """# Trainers

**Set `prompt_end`.** With it every trainer of TRL that takes `peft_config` trains the policy that generates. Without it one that hides
its labels from the model is refused, and one of several turns may be wrong. Why: [prompt_end.md](prompt_end.md).

```python
config = PTEConfig(task_type="CAUSAL_LM", prompt_end=peft_pte.prompt_end(tokenizer))  # plain text: 4
```

Each trainer below ran unmodified for one step, in float32, on a tiny random model with a window of {window}.

* **its loss**: what it asks the model for (`logits`, TRL's `fused head`, or hidden states of the `backbone`), and whether it passes labels.
* **with `prompt_end`**, **without**: *equal*: tokens were evicted, every parameter got a gradient, and each log-prob in the loss is, to
  {equal}, the one it was sampled with and the one of its row scored alone. *Refused*: an error takes the place of the loss, where
  a row is longer than the window (below it nothing is evicted and there is nothing to tell); it names `prompt_end`, or what the note says.

LoRA, the control, trains in every line that was tried, and is equal in all but those that say *refused* twice, where it was not
compared. Made with TRL {trl} and transformers {transformers} by
`python -m tests.integrations.trainers`; `tests/integrations/test_trainers.py` measures every line again.

## Defaults of TRL that matter

* **Truncation.** `max_length` cuts the end of a row, or the end of its prompt, marker included, if the prompt alone is longer: such a
  row is refused unless none of it is labelled. OnlineDPO samples from the whole prompt and scores it cut from the left to `max_length`
  (512), with any adapter: let it hold prompt and `max_new_tokens`. `max_prompt_length` (SDFT, SDPO) keeps the last tokens; what is the
  first marker then may be a later turn's.
* **bf16.** TRL turns autocast on where you do not say `bf16=False`. Rollout and loss then differ by its rounding, as with LoRA.
* **Dropout.** GRPO, RLOO and Distillation leave that of the base model on (`disable_dropout=True`); `PTEConfig(dropout=0.0)` is the default.
* **Continuous batching** (`use_transformers_continuous_batching=True`) runs on this package's `generate_batch`: rows of the bounded cache that
  are refilled. `transformers_continuous_batching_config={{"max_requests_per_batch": 32}}` sets the rows; without it they are what half of the free
  memory holds (TRL's share). Where `bf16` is on, which is TRL's default, TRL casts the whole model to bfloat16 in place before it, trainable
  weights included, with any adapter: set `bf16=False`, and load the base model in bfloat16 where you want it so.
* **`use_cache=False`.** GKD and OnlineDPO ask `generate` for it where gradients are checkpointed, TRL's default. The bounded cache is used
  all the same: it is part of the policy. In a scoring call it changes nothing.
* **The reference of `beta > 0`** is the base model on its full cache with `peft_config`, and a copy of the adapter under the same window if
  you wrap the model yourself: see [prompt_end.md](prompt_end.md#the-reference-of-a-kl-term). The teacher of SDFT and SDPO is the former too.

## The table

| trainer | its loss | with `prompt_end` | without | note |
|---|---|---|---|---|
"""


def cell(case: Case, without: str) -> str:
    """What the page says of a trainer without `prompt_end`."""
    return case.limit if case.limit and without not in ("equal", "refused") else without


def line(case: Case, loss: str = "", with_end: str = "not tried", without: str = "not tried") -> str:
    """A line of the page."""
    return f"| {case.name} | {loss} | {with_end} | {without} | {case.untried or case.note} |"


def measured_line(case: Case) -> str:
    """A line of the page, measured."""
    if case.untried:
        return line(case)
    outcomes = {adapter: measure(case, adapter) for adapter in ("pte, prompt_end", "pte")}
    with_end, without = (judge(case, outcome, adapter) for adapter, outcome in outcomes.items())
    return line(case, describe(outcomes["pte, prompt_end"]), with_end, cell(case, without))


def head(trl: str = trl.__version__, transformers: str = transformers.__version__) -> str:
    """The page above its lines."""
    return HEAD.format(trl=trl, transformers=transformers, window=WINDOW, equal=EQUAL)


def page() -> str:
    """The page of the docs, measured."""
    with quiet():
        return head() + "".join(f"{measured_line(case)}\n" for case in CASES)


def report(adapter: str, pattern: str) -> None:
    """Prints all that was measured of the cases whose names match."""
    for case in CASES:
        if case.untried or not re.search(pattern, case.name):
            continue
        start = time.time()
        with quiet():
            outcome = measure(case, adapter)
        print(f"{case.name} [{adapter}] {time.time() - start:.1f} s: {judge(case, outcome, adapter)[:300]}")
        print(
            f"    alone {outcome.alone} rollout {outcome.rollout} unbounded {outcome.unbounded} others {outcome.others} "
            f"reference {outcome.reference} thoughts {outcome.thoughts} turns {outcome.turns_found} of "
            f"{len(outcome.turns)} silent {len(outcome.silent)} loss {outcome.loss}"
        )
        for call in outcome.calls:
            print("   ", call.describe())
        seen = {(turn.use_cache, len(turn.given), len(turn.sampled)) for turn in outcome.turns}
        print("    rollouts (use_cache, given, sampled):", sorted(seen, key=str)[:12], flush=True)


def main() -> None:
    """Without arguments writes the page; with ``lora | pte | "pte, prompt_end"`` and a pattern prints what it measures."""
    if len(sys.argv) == 1:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        report(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ".")


if __name__ == "__main__":
    main()
