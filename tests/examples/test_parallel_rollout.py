"""A rollout over processes writes what one process writes, in the order of the prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_pte
from peft_pte import PTEConfig
from tests.integrations.trainers import make_chat_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 8


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("rollout"), make_chat_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    base.save_pretrained(folder / "base")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    fields = {"r": 4, "cache_window": WINDOW, "prompt_end": peft_pte.prompt_end(tokenizer), "init_weights": False}
    get_peft_model(base, PTEConfig(task_type="CAUSAL_LM", **fields)).save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter"


def asked(words):
    return [{"role": "user", "content": words}]


def launch(processes, folder, adapter, prompts, *options):
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    program = [
        str(ROOT / "examples" / "parallel_rollout.py"),
        "prompts.jsonl",
        "written.jsonl",
        "--adapter",
        str(adapter),
    ]
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    several += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *(several if processes > 1 else []), *program, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"on {processes} processes" in done.stdout
    return [json.loads(line) for line in (folder / "written.jsonl").read_text().splitlines()]


def test_two_processes_write_what_one_writes(adapter, tmp_path):
    # An odd number, of both forms, so that shares differ in size.
    prompts = [asked(" ".join(f"w{n + 3}" for n in range(row))) for row in range(1, 7)]
    prompts.append(
        make_chat_tokenizer().apply_chat_template(asked("w9 w4"), add_generation_prompt=True, tokenize=False)
    )
    greedy = "--temperature", "0", "--max-new-tokens", str(3 * WINDOW), "--rows", "2"
    one, two = (launch(count, tmp_path, adapter, prompts, *greedy) for count in (1, 2))
    assert one == two
    assert [record["prompt"] for record in one] == prompts
    assert len({record["completion"] for record in one}) > 3
    assert max(record["tokens"] for record in one) == 3 * WINDOW


def test_processes_draw_apart(adapter, tmp_path):
    # One prompt four times: with one seed in both processes there would be pairs.
    options = "--samples", "4", "--max-new-tokens", str(2 * WINDOW), "--rows", "4"
    written = launch(2, tmp_path, adapter, [asked("w3 w4")], *options)
    assert len(written) == 4
    assert len({record["completion"] for record in written}) == 4


@pytest.mark.slow
def test_more_processes_than_prompts(adapter, tmp_path):
    assert len(launch(2, tmp_path, adapter, [asked("w3 w4")], "--max-new-tokens", "3")) == 1
