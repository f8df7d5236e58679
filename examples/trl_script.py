"""TRL's own training scripts (``trl sft``, ``trl grpo``, ...) with PTE where they would build a LoRA: all of their options, and three more.

    python examples/trl_script.py grpo --model_name_or_path Qwen/Qwen2.5-3B-Instruct --dataset_name trl-lib/DeepMath-103K \
        --reward_funcs accuracy_reward --lora_r 32 --cache_window 1024 --output_dir adapter

On several GPUs ``accelerate launch`` starts it. ``--lora_dropout`` is not used: scoring would then use other weights than the rollout.
"""

import importlib
import sys
from dataclasses import dataclass, field

import trl
from transformers import AutoTokenizer

import peft_pte
from peft_pte import PTEConfig


@dataclass
class PTEArguments:
    """What TRL's scripts do not ask for."""

    cache_window: int = field(default=1024, metadata={"help": "Thoughts that the cache holds."})
    num_global_tokens: int = field(default=32, metadata={"help": "Rows of the state."})
    prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "First tokens of a row that never leave, for text without a chat template; else it is asked."
        },
    )


def adapter(model: trl.ModelConfig, pte: PTEArguments) -> PTEConfig:
    """The adapter that the options describe."""
    if model.use_dora or model.lora_target_parameters:
        raise ValueError("`use_dora` and `lora_target_parameters` must be left out: PTE has neither.")
    prompt_end = pte.prompt_tokens
    if prompt_end is None:
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
        prompt_end = peft_pte.prompt_end(tokenizer)
    return PTEConfig(
        task_type=model.lora_task_type,
        r=model.lora_r,
        alpha=model.lora_alpha,
        target_modules=model.lora_target_modules,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        num_global_tokens=pte.num_global_tokens,
        cache_window=pte.cache_window,
        prompt_end=prompt_end,
    )


def main() -> None:
    """Run the script that the first argument names."""
    script = importlib.import_module(f"trl.scripts.{sys.argv.pop(1)}")
    parser = trl.TrlParser((*script.make_parser().dataclass_types, PTEArguments))
    *parts, pte = parser.parse_args_and_config()
    config = adapter(next(part for part in parts if isinstance(part, trl.ModelConfig)), pte)
    # The scripts ask this function for their adapter.
    trl.get_peft_config = lambda model: config
    script.main(*parts)


if __name__ == "__main__":
    main()
