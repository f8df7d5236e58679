"""What a model card says of an adapter: the method, its cache, where its prompts end, how to load and evaluate it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_BEGIN, _END = "<!-- peft-pte:begin -->", "<!-- peft-pte:end -->"

_SECTION = """\
## Progressive Thought Encoding

With this adapter the base model thinks in a KV cache of fixed size: tokens that leave it are first encoded into a small state per sequence, which
the adapter reads as a dynamic weight ([arXiv 2602.16839](https://huggingface.co/papers/2602.16839)).

| | |
|---|---|
{rows}

## How to load this adapter

Its method is registered with peft by the package `peft-pte`, which has to be imported before peft reads the adapter:

```python
import peft_pte  # registers the method with peft
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/adapter")
model.generate(**inputs, max_new_tokens=65536)  # in the bounded cache, by itself
```

Programs that load adapters themselves are started through it, as
`python -m peft_pte lm_eval run --model hf --model_args pretrained={base},peft=path/to/this/adapter --tasks gsm8k`.
The weight differs for every sequence, so it cannot be merged.
"""


def section(config: Any) -> str:
    """The part of a card that is about an adapter of ``config``, a ``PTEConfig``, in Markdown."""
    base = config.base_model_name_or_path or "the base model"
    if config.cache_window is None:
        cache = "unbounded: nothing leaves it"
    else:
        cache = (
            f"the prompt and {config.cache_window} tokens after it; {config.tokens_per_eviction} leave at a time, chosen by "
            f"`{config.eviction}`"
        )
    end = config.prompt_end
    if end is None:
        prompt = "what each call shows: pass `prompt_length=` to `generate`"
    elif isinstance(end, int):
        prompt = f"after its first {end} tokens"
    else:
        prompt = f"after the tokens `{end}`, where they first occur"
    state = {
        "progressive": f"{config.num_queries} x {config.r} per sequence and layer, written by `{config.encoder_attention}`, read by `{config.state_address}`",
        "frozen": "learned, and the same for every sequence (Global-Only)",
        "off": "none: LoRA under a bounded cache",
    }[config.state_update]
    rows = {
        "Base model": f"`{base}`",
        "Cache": cache,
        "Where the prompt ends": prompt,
        "State": state,
        "Rank of the adapters": str(config.r),
        "Format of the files": str(config.format_version),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _SECTION.format(rows=table, base=config.base_model_name_or_path or "BASE_MODEL")


def is_card(path: str | Path) -> bool:
    """Whether the file is a card of an adapter, and not any README."""
    file = Path(path)
    return file.is_file() and "library_name: peft" in file.read_text(encoding="utf-8")


def add_section(card: str | Path, config: Any) -> None:
    """Add the part about ``config`` to the file ``card``, or renew it there; no file, nothing happens."""
    path = Path(card)
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    rest = re.sub(rf"{_BEGIN}.*?{_END}\n?", "", text, flags=re.DOTALL).rstrip("\n")
    path.write_text(f"{rest}\n\n{_BEGIN}\n{section(config)}{_END}\n", encoding="utf-8")
