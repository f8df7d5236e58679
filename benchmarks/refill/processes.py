"""One process of a rollout that is spread over several, as accelerate starts it: ``python -m benchmarks.refill.processes SPREAD PER_ROW``; prints what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import GenerationConfig

from examples.parallel_rollout import rollout
from peft_pte import PTEConfig

from .measure import LONGEST, ROWS, WINDOW, StopAt, lengths, model, requests


def measure(processes: int, threads: int, spread: float, per_row: int) -> dict[str, Any]:
    """What as many processes of ``threads`` threads take for one and the same requests."""
    starter = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    starter += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *starter, "-m", __name__, str(spread), str(per_row)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main(spread: float, per_row: int) -> None:
    """Write the requests together with the other processes."""
    state = Accelerator()
    found = lengths(spread, ROWS * per_row)
    adapted = model(PTEConfig(task_type="CAUSAL_LM", r=16, num_global_tokens=16, cache_window=WINDOW))
    config = GenerationConfig(max_new_tokens=LONGEST, do_sample=True, top_k=0, pad_token_id=0)
    prompts, criteria = requests(found), [StopAt(found)]
    # Whatever comes first pays for what is made once.
    rollout(adapted, prompts[:ROWS].tolist(), GenerationConfig(max_new_tokens=9, pad_token_id=0), ROWS)
    state.wait_for_everyone()
    began, busy = time.perf_counter(), time.process_time()
    written, seconds = rollout(adapted, prompts.tolist(), config, ROWS, stopping_criteria=criteria)
    wall, cpu = time.perf_counter() - began, gather_object([time.process_time() - busy])
    if [len(tokens) for tokens in written] != found:
        raise RuntimeError("Requests did not end at their lengths.")
    if state.is_main_process:
        idle = 1 - sum(seconds) / (max(seconds) * len(seconds))
        threads = torch.get_num_threads()
        print(
            json.dumps(
                {"tokens": sum(found), "threads": threads, "wall_seconds": wall, "cpu_seconds": sum(cpu), "idle": idle}
            )
        )
    state.end_training()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
