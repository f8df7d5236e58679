"""The protocol's settings: three models, their arms, the paper's hyper-parameters (arXiv 2602.16839, section 4).

What the paper prints is marked so; what it leaves open and was chosen here is marked [ours] (README.md lists it).
"""

from __future__ import annotations

from peft import LoraConfig, PeftConfig

from peft_pte import PTEConfig

MODELS = {
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "r1-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
ARMS = {
    "lora": "LoRA, full cache",
    "lora_c": "LoRA, bounded cache",
    "global_only": "Global-Only",
    "pte": "PTE",
    "no_global": "PTE, no global tokens",
}
"""The paper's four, and its ablation of the global tokens."""
STATE_UPDATE = {"lora_c": "off", "global_only": "frozen", "pte": "progressive", "no_global": "progressive"}

RANK = 32  # paper
GLOBAL_TOKENS = 32  # paper
EVICT_RATIO = 0.25  # paper
LEARNING_RATE = 1e-5  # paper
MAX_GRAD_NORM = 1.0  # paper
MAX_COMPLETION_LENGTH = 3072  # paper
GLOBAL_BATCH = 512  # paper; counted in completions [ours]
CACHE_WINDOW = 768  # one of the paper's three; the tightest of them for training [ours]
NUM_GENERATIONS = 8  # [ours]


def model_name(name: str) -> str:
    """The hub id of a short name; anything else (a hub id, a local folder) is itself."""
    return MODELS.get(name, name)


def short_name(name: str) -> str:
    """What results are filed under: the short name of one of the three, however it was named."""
    return {hub: short for short, hub in MODELS.items()}.get(name, name.rstrip("/").rpartition("/")[2])


def adapter_config(
    arm: str,
    *,
    rank: int = RANK,
    num_global_tokens: int = GLOBAL_TOKENS,
    cache_window: int = CACHE_WINDOW,
    state_address: str = "key",
    encoder_attention: str = "linear",
    prompt_end: list[int] | None = None,
) -> PeftConfig:
    """What ``GRPOTrainer(peft_config=...)`` is given for an arm; all arms adapt the same linears at the same scale.

    ``prompt_end`` is the marker of the model's chat template, ``peft_pte.prompt_end(tokenizer)``.

    Raises:
        ValueError: ``arm`` is unknown.
    """
    if arm == "lora":
        # "all-linear" leaves the output head out, as PTEConfig's default does; alpha = 2 R there is `None`.
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    if arm not in STATE_UPDATE:
        raise ValueError(f"`arm` must be one of {', '.join(ARMS)}, got {arm!r}.")
    return PTEConfig(
        task_type="CAUSAL_LM",
        r=rank,
        num_global_tokens={"lora_c": rank, "no_global": 0}.get(arm, num_global_tokens),
        cache_window=cache_window,
        evict_ratio=EVICT_RATIO,
        state_update=STATE_UPDATE[arm],
        state_address=state_address,
        encoder_attention=encoder_attention,
        prompt_end=prompt_end,
    )
