"""Other packages' commands, with the method registered: ``python -m peft_pte PROGRAM``."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, pipeline

from tests.integrations.common import make_tokenizer, make_trl_base, pte_config
from tests.integrations.trainers import MARKER, make_chat_tokenizer

TASK = """
task: {kind}_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{rest}
"""
KINDS = {
    # A score of given text, and text that is written far past the window.
    "loglikelihood": "output_type: loglikelihood",
    "generate": "output_type: generate_until\ngeneration_kwargs: {until: ['</s>'], max_gen_toks: 24, do_sample: false}",
}


def run(*arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "peft_pte", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_lm_evaluation_harness_scores_and_generates(tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'peft-pte[eval]'")
    base = make_trl_base("llama")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = get_peft_model(base, pte_config(prompt_end=2, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    words = [[f"w{3 + (5 * row + place) % 50}" for place in range(30)] for row in range(3)]
    rows = [{"question": " ".join(row[:3]), "answer": " " + " ".join(row[3:])} for row in words]
    file = tmp_path / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    for kind, rest in KINDS.items():
        (tmp_path / "tasks" / f"{kind}.yaml").write_text(TASK.format(kind=kind, file=file, rest=rest))
    options = f"pretrained={tmp_path / 'base'},peft={tmp_path / 'adapter'},dtype=float32"
    done = run(
        *("lm_eval", "run", "--model", "hf", "--model_args", options, "--device", "cpu", "--batch_size", "2"),
        *("--include_path", tmp_path / "tasks", "--tasks", ",".join(f"{kind}_words" for kind in KINDS)),
        *("--log_samples", "--output_path", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for kind in KINDS:
        (log,) = (tmp_path / "out").rglob(f"samples_{kind}_words_*.jsonl")
        found[kind] = [json.loads(line) for line in log.read_text().splitlines()]

    tokenizer = make_tokenizer()
    for sample in found["loglikelihood"]:
        text = sample["arguments"]["gen_args_0"]
        context = tokenizer(text["arg_0"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokenizer(text["arg_0"] + text["arg_1"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(dim=-1)
        expected = logits[0, :-1].gather(1, ids[0, 1:, None])[len(context) - 1 :].sum()
        assert float(sample["resps"][0][0][0]) == pytest.approx(float(expected), rel=1e-4)
    for sample in found["generate"]:
        text = sample["arguments"]["gen_args_0"]["arg_0"]
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        written = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0].split() == written.split()


def served(port, model, log):
    """What a server answers to a chat, once it is there."""
    question = {
        "model": str(model),
        "messages": [{"role": "user", "content": "w3 w4"}],
        "max_tokens": 30,
        "temperature": 0.0,
        "stream": False,
    }
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = Request(address, json.dumps(question).encode(), {"Content-Type": "application/json"})
    for _ in range(120):
        answer = ask(request)
        if answer is not None:
            return answer["choices"][0]["message"]["content"]
        time.sleep(1)
    pytest.fail(log.read_text()[-2000:])


def ask(request):
    """The answer; ``None``: nobody is there yet."""
    try:
        with urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except HTTPError:
        raise
    except URLError:
        return None


def test_transformers_serves_a_base_model_and_its_adapter_from_one_folder(tmp_path):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="needs pip install 'transformers[serving]'")
    make_trl_base("llama").save_pretrained(tmp_path)
    tokenizer = make_chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(base, pte_config(prompt_end=[MARKER], init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "peft_pte", "transformers", "serve", "--device", "cpu", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            answer = served(port, tmp_path, log)
        finally:
            server.terminate()
    chat = [{"role": "user", "content": "w3 w4"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert answer.split() == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()
    assert len(answer.split()) > 20


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "sft": ([{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": " ".join(["w5 w6 w7"] * 8)}], []),
    "grpo": (
        [{"role": "user", "content": "w3 w4"}],
        ["--reward_funcs", "think_format_reward", "--num_generations", "2", "--max_completion_length", "24"],
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_of_trl_train_pte(name, tmp_path):
    messages, options = SCRIPTS[name]
    make_trl_base("llama").save_pretrained(tmp_path / "base")
    make_chat_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"messages" if name == "sft" else "prompt": messages})] * 4
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    command = [
        *(sys.executable, ROOT / "examples" / "trl_script.py", name, "--model_name_or_path", tmp_path / "base"),
        *("--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "adapter", "--max_steps", 1, "--use_cpu"),
        *("--lora_r", 4, "--num_global_tokens", 5, "--cache_window", 8, "--lora_target_modules", "q_proj", "down_proj"),
        *("--per_device_train_batch_size", 2, "--report_to", "none", "--bf16", "False", *options),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    config = model.peft_config["default"]
    assert (config.peft_type, config.r, config.alpha, config.cache_window) == ("PTE", 4, 32, 8)
    assert set(config.target_modules) == {"q_proj", "down_proj"}
    assert config.prompt_end == [MARKER]


@pytest.mark.parametrize("name", ["trl", "accelerate", "torchrun"])
def test_commands_that_start_processes_of_their_own(name):
    done = run(name, "sft")
    assert done.returncode != 0
    assert "starts processes of its own" in done.stderr
    assert "examples/trl_script.py" in done.stderr


def test_a_command_that_is_not_there():
    done = run("no_such_command")
    assert done.returncode != 0
    assert "No installed package has the command 'no_such_command'" in done.stderr
    assert "python -m peft_pte PROGRAM" in run().stderr


def test_a_pipeline_generates_in_the_bounded_cache():
    model = get_peft_model(make_trl_base("llama"), pte_config(init_weights=False)).eval()
    tokenizer = make_tokenizer()
    written = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "w3 w4 w5", max_new_tokens=30, do_sample=False
    )
    ids = model.generate(**tokenizer("w3 w4 w5", return_tensors="pt"), max_new_tokens=30, do_sample=False)
    # The pipeline puts no blank between what it was given and what was written.
    assert written[0]["generated_text"].replace(" ", "") == tokenizer.decode(ids[0], skip_special_tokens=True).replace(
        " ", ""
    )
