"""Rows that are refilled beside rows that wait: `generate_batch`, and `generate` of LoRA and of PTE, at log-normal lengths.

Each arm writes the same numbers of tokens, sampled; what ends a row is its length. `--processes` spreads requests over processes instead.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from peft_pte import PTEConfig
from peft_pte.rollout.batch import Batch

from ..common.models import LINEARS, random_llama
from ..common.records import Record
from ..common.session import Session

ROWS, PROMPT, MEAN, LONGEST, WINDOW = 8, 16, 150, 2048, 64
SPREADS, PER_ROW = (0.3, 0.7, 1.2), (4, 8)
KEY = ("spread", "per_row", "arm")
SPREAD_OVER, OVER_PER_ROW = ((1, 1), (1, 2), (2, 1)), 16
"""Processes and threads of each; requests per row of one process."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--processes``."""
    parser.add_argument(
        "--processes", action="store_true", help="one and two processes, on a CPU that nobody else uses"
    )


def lengths(spread: float, count: int) -> list[int]:
    """Log-normal lengths of a mean of 150 tokens; ``spread`` is their coefficient of variation."""
    generator = torch.Generator().manual_seed(int(10 * spread) + count)
    sigma = math.sqrt(math.log(1 + spread**2))
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    found = (normal * sigma - sigma**2 / 2).exp().mul(MEAN).long().clamp(1, LONGEST)
    return [int(length) for length in found]


def model(adapter: Any) -> Any:
    """A small random Llama with ``adapter``."""
    torch.manual_seed(0)
    base = random_llama(512, 256, 512, 4, 4, 2, 4096, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return get_peft_model(base.eval(), adapter).eval()


class StopAt:
    """Ends a request at its length, which its first two tokens tell."""

    def __init__(self, found: Sequence[int]) -> None:
        self.lengths = found

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> bool:
        """Whether the request whose tokens these are is over."""
        first, second = input_ids[0, :2].tolist()
        return input_ids.shape[1] - PROMPT >= self.lengths[first * 256 + second]


def requests(found: Sequence[int]) -> torch.Tensor:
    """Prompts ``[B, 16]``, whose first two tokens are their number."""
    prompts = torch.randint(1, 256, (len(found), PROMPT), generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(len(found))
    prompts[:, 0], prompts[:, 1] = numbers // 256, numbers % 256
    return prompts


def waiting_rows(adapted: Any, prompts: torch.Tensor, found: Sequence[int]) -> int:
    """All requests by `generate`, a batch at a time; returns its steps."""
    steps = 0
    for start in range(0, len(found), ROWS):
        longest = max(found[start : start + ROWS])
        adapted.generate(prompts[start : start + ROWS], max_new_tokens=longest, do_sample=True, top_k=0)
        steps += longest - 1
    return steps


def refilled_rows(adapted: Any, prompts: torch.Tensor, found: Sequence[int]) -> int:
    """All requests by `generate_batch`; returns its steps."""
    steps, step = [0], Batch.step

    def counted(self: Batch) -> None:
        steps[0] += 1
        step(self)

    Batch.step = counted  # type: ignore[method-assign]
    try:
        config = GenerationConfig(max_new_tokens=LONGEST, do_sample=True, top_k=0, pad_token_id=0)
        batching = ContinuousBatchingConfig(max_requests_per_batch=ROWS)
        outputs = adapted.generate_batch(prompts.tolist(), config, batching, stopping_criteria=[StopAt(found)])
    finally:
        Batch.step = step  # type: ignore[method-assign]
    if [len(output.generated_tokens) for output in outputs.values()] != list(found):
        raise RuntimeError("Requests did not end at their lengths.")
    return steps[0]


def measure(session: Session) -> Iterator[Record]:
    """One record per case and arm; a case of which an arm is missing is measured whole, as arms take turns."""
    if session.options.processes:
        yield from over_processes(session)
        return
    lora = model(LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=sorted(LINEARS)))
    pte = model(PTEConfig(task_type="CAUSAL_LM", r=16, num_global_tokens=16, cache_window=WINDOW))
    arms: dict[str, tuple[Any, Callable[[Any, torch.Tensor, Sequence[int]], int]]] = {
        "lora generate": (lora, waiting_rows),
        "pte generate": (pte, waiting_rows),
        "pte generate_batch": (pte, refilled_rows),
    }
    for adapted, run in arms.values():
        # Whatever comes first pays for what is made once.
        run(adapted, torch.zeros(ROWS, PROMPT, dtype=torch.long), [9] * ROWS)
    for spread in SPREADS[:1] if session.quick else SPREADS:
        for per_row in (1,) if session.quick else PER_ROW:
            if all(session.results.has({"spread": spread, "per_row": per_row, "arm": name}) for name in arms):
                continue
            found = lengths(spread, ROWS * per_row)
            prompts = requests(found)
            for name, (adapted, run) in arms.items():
                torch.manual_seed(0)
                start = time.process_time()
                steps = run(adapted, prompts, found)
                yield {
                    "spread": spread,
                    "per_row": per_row,
                    "arm": name,
                    "tokens": sum(found),
                    "steps": steps,
                    "cpu_seconds": round(time.process_time() - start, 2),
                }


def over_processes(session: Session) -> Iterator[Record]:
    """One record per spread and number of processes and threads: the same requests, the best of two runs."""
    from . import processes

    for spread in SPREADS[-1:] if session.quick else SPREADS[::2]:
        for count, threads in SPREAD_OVER:
            per_row = 1 if session.quick else OVER_PER_ROW
            record = {"spread": spread, "per_row": per_row, "arm": f"{count} x {threads}", "processes": count}
            if not session.results.has(record):
                found = [processes.measure(count, threads, spread, per_row) for _ in range(1 if session.quick else 2)]
                yield {**record, **min(found, key=lambda run: run["wall_seconds"])}
