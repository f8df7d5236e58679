"""examples/paper offline: tiny random models for the three, ten-row files in the data sets' own schemas for the data."""

import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "examples" / "paper"
# Last, because scripts have everyday names.
sys.path.append(str(PAPER))

import arms  # noqa: E402
import distill  # noqa: E402
import table  # noqa: E402
import train  # noqa: E402
from tasks import grading  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# A size of its own for each of the three, under its short name.
TINY = {
    "qwen2.5-3b": (Qwen2, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen2.5-7b": (Qwen2, Qwen2Config(**{**SIZES, "num_hidden_layers": 3})),
    "r1-llama-8b": (LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
}
PROMPT = grading.INSTRUCTION
# The columns of the published data sets, one row each; the answer to problem i is i + 1.
ROWS = {
    "math500": lambda i, q, a: {"problem": q, "solution": f"${a}$", "answer": a, "subject": "Algebra", "level": 1},
    "olympiadbench": lambda i, q, a: {
        "id": i,
        "question": q,
        "solution": [a],
        "final_answer": [a],
        "context": None,
        "is_multiple_answer": False,
        "unit": None,
        "answer_type": "Numerical",
    },
    "minerva": lambda i, q, a: {"question": q, "answer": a},
    "amc": lambda i, q, a: {"id": i, "problem": q, "answer": float(a), "url": ""},
    "aime24": lambda i, q, a: {"id": i, "problem": q, "solution": "", "answer": a, "url": "", "year": "2024"},
    "aime25": lambda i, q, a: {"problem": q, "answer": a, "id": str(i)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models under their short names, ``<task>.json`` and ``dapo.jsonl``."""
    folder = tmp_path_factory.mktemp("paper")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: index + 2 for index, letter in enumerate(letters)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    for name, (model_class, config) in TINY.items():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    problems = [(index, f"What is {index} + 1?", str(index + 1)) for index in range(10)]
    for task, row in ROWS.items():
        (folder / f"{task}.json").write_text(json.dumps([row(*problem) for problem in problems]))
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": PROMPT.format(problem=question)}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"id-{index % 5}"},
        }
        for index, question, answer in problems
    ]
    (folder / "dapo.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def train_arguments(folder, output, model, arm, *more):
    return [
        *("--model", folder / model, "--arm", arm, "--dataset", folder / "dapo.jsonl", "--output-dir", output / "run"),
        *("--results", output / "results", "--batch", 8, "--rollout-batch", 4, "--micro-batch", 2),
        *("--num-generations", 2, "--max-completion-length", 12, "--cache-window", 4, "--rank", 4),
        *("--num-global-tokens", 5, "--max-steps", 1, "--dtype", "float32", *more),
    ]


def evaluate_arguments(folder, output, model, arm, *more):
    data = [f"{task}={folder / task}.json" for task in ROWS]
    return [
        *("--model", folder / model, "--arm", arm, "--data", *data, "--limit", 2, "--max-new-tokens", 6),
        *("--dtype", "float32", "--device", "cpu", "--results", output / "results", *more),
    ]


def texts(arguments):
    return [str(argument) for argument in arguments]


# Arms


def test_the_arms_are_those_of_the_paper():
    assert set(arms.ARMS) == {"lora", *arms.STATE_UPDATE}
    assert {*table.MAIN_ARMS, "no_global"} == set(arms.ARMS)
    assert arms.adapter_config("no_global").num_global_tokens == 0
    pte = arms.adapter_config("pte")
    assert (pte.r, pte.num_global_tokens, pte.evict_ratio, pte.state_update) == (32, 32, 0.25, "progressive")
    assert arms.adapter_config("lora_c").state_update == "off"
    assert arms.adapter_config("global_only").state_update == "frozen"
    assert arms.adapter_config("lora").peft_type == "LORA"
    assert [arms.short_name(arms.model_name(name)) for name in arms.MODELS] == list(arms.MODELS)
    with pytest.raises(ValueError, match="`arm` must be one of"):
        arms.adapter_config("dora")


def test_all_arms_adapt_the_same_linears_at_the_same_scale():
    model_class, config = TINY["qwen2.5-3b"]

    def adapted(arm):
        model = get_peft_model(model_class(config), arms.adapter_config(arm))
        layers = {
            name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "base_layer")
        }
        return set(layers), {(layer.scaling if arm == "lora" else layer.scale)["default"] for layer in layers.values()}

    layers, scales = zip(*map(adapted, arms.ARMS), strict=True)
    assert len(layers[0]) == 7 * config.num_hidden_layers
    assert layers == (layers[0],) * 5
    assert scales == ({2.0},) * 5


# Grading


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("so\nAnswer: 34", "34", True),
        ("**Answer:** $34$.", "34", True),
        ("Answer: 33\nno, wait\nanswer: 34", "34", True),
        ("Answer: 34\nno, wait\nAnswer: 33", "34", False),
        (r"thus \boxed{\frac{1}{2}}", "0.5", True),
        (r"Answer: \boxed{34}", "34", True),
        (r"Answer: \(\left(3, \frac{\pi}{2}\right)\)", r"\left( 3, \frac{\pi}{2} \right)", True),
        ("Answer: Evelyn", r"\text{Evelyn}", True),
        ("it is 34", "34", False),
        ("Answer:", "34", False),
        (r"\boxed{34", "34", False),
        ("Answer: -34", "34", False),
        ("**Answer**: 34", "34", True),
        (r"Answer: \$18.90", "18.9", True),
        ("Answer: 18.9", r"\$18.90", True),
        (r"Answer: 4.5 \times 10^{33}", "4.5e33", True),
        (r"Answer: 6.63 \times 10^{-34}", "6.63e-34", True),
        (r"Answer: 6.63 \times 10^{-33}", "6.63e-34", False),
        ("Answer: 6.63e-34", "6.63e-34", True),
        (r"Answer: \boxed{6.63e-34}", "6.63e-34", True),
        ("Answer: 6.63e-33", "6.63e-34", False),
        (r"Answer: x = 4500", "4.5e3", True),
        (r'<think>end with "Answer: $Answer"</think>so \boxed{34}', "34", True),
    ],
)
def test_answers_are_graded(response, gold, right):
    assert grading.is_correct(response, gold) is right
    assert train.correctness([[{"role": "assistant", "content": response}]], [gold]) == [float(right)]


def test_pass_at_k():
    assert grading.pass_at_k([True, False, False, False], 1) == pytest.approx(0.25)
    assert grading.pass_at_k([True, False, False, False], 2) == pytest.approx(0.5)
    assert grading.pass_at_k([False] * 16, 16) == 0.0
    with pytest.raises(ValueError, match="`k` must be at most"):
        grading.pass_at_k([True], 2)


# Training


@pytest.fixture
def alternating(monkeypatch):
    """Half of the answers of every problem are right, so that there is something to learn."""
    calls = itertools.count()
    monkeypatch.setattr(train, "is_correct", lambda *args: next(calls) % 2 == 0)


@pytest.mark.parametrize("processes", [1, 8, 16])
def test_a_step_sees_512_completions_however_many_processes_share_them(processes):
    plan = train.batch_plan(512, processes, rollout_batch=64, micro_batch=4)
    assert plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"] * processes == 512
    # Whole rollouts make up a step, so all of it is on-policy, and whole groups make up a rollout.
    assert plan["gradient_accumulation_steps"] % plan["steps_per_generation"] == 0
    rollout = plan["per_device_train_batch_size"] * plan["steps_per_generation"] * processes
    assert rollout % arms.NUM_GENERATIONS == 0


@pytest.mark.parametrize(("processes", "rollout", "micro"), [(7, 64, 4), (8, 48, 4), (8, 64, 3), (8, 64, 0)])
def test_batches_that_do_not_divide_are_refused(processes, rollout, micro):
    with pytest.raises(ValueError, match="must divide its share"):
        train.batch_plan(512, processes, rollout, micro)


def test_problems_come_once_and_not_too_long(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2.5-3b")
    rows = train.load_problems(str(folder / "dapo.jsonl"), tokenizer, 1024)
    assert rows["solution"][:] == ["1", "2", "3", "4", "5"]
    assert "What is 0 + 1?" in rows["prompt"][0][0]["content"]
    assert len(train.load_problems(str(folder / "dapo.jsonl"), tokenizer, 20)) == 0


@pytest.mark.parametrize(
    ("model", "arm"),
    [("qwen2.5-3b", "lora"), ("qwen2.5-7b", "lora_c"), ("r1-llama-8b", "global_only"), ("qwen2.5-3b", "pte")],
)
def test_every_arm_trains(folder, tmp_path, model, arm, alternating):
    train.main(texts(train_arguments(folder, tmp_path, model, arm)))
    record = json.loads(next((tmp_path / "results").glob("train-*.json")).read_text())
    step = record["history"][0]
    assert step["reward"] == 0.5
    assert step["grad_norm"] > 0
    assert ("pte/evictions_per_sequence" in step) == (arm != "lora")
    assert record["changed"]["max_steps"] == 1
    # What starts at zero has moved.
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    written = [weight for name, weight in weights.items() if "pte_up" in name or "lora_B" in name]
    assert written
    assert all(weight.abs().max() > 0 for weight in written)


def distill_arguments(folder, output, model, arm, *more):
    return [
        *(
            "--model",
            folder / model,
            "--arm",
            arm,
            "--dataset",
            folder / "dapo.jsonl",
            "--output-dir",
            output / "distilled",
        ),
        *("--batch", 4, "--micro-batch", 2, "--max-completion-length", 12, "--cache-window", 4, "--rank", 4),
        *("--num-global-tokens", 5, "--max-steps", 1, "--dtype", "float32", *more),
    ]


def test_an_arm_is_distilled_then_reinforced(folder, tmp_path, alternating):
    distill.main(texts(distill_arguments(folder, tmp_path, "qwen2.5-3b", "pte", "--windows", 4, "none")))
    assert "pte/ratio_p5" in json.loads((tmp_path / "distilled" / "history.json").read_text())[0]
    start = load_file(tmp_path / "distilled" / "adapter_model.safetensors")
    more = ["--adapter", tmp_path / "distilled", "--rows", 2]
    train.main(texts(train_arguments(folder, tmp_path, "qwen2.5-3b", "pte", *more, "--learning-rate", 0.0)))
    record = json.loads(next((tmp_path / "results").glob("train-*.json")).read_text())
    assert record["changed"]["adapter"] == str(tmp_path / "distilled")
    assert "rows" not in record["changed"]
    assert record["history"][0]["pte/evictions_per_sequence"] > 0
    end = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(end[name], start[name]) for name in start)
    for other in (["--arm", "lora_c"], ["--rank", 8], ["--cache-window", 8]):
        options = [
            *train_arguments(folder, tmp_path, "qwen2.5-3b", "pte", *more),
            *other,
            "--output-dir",
            tmp_path / "other",
        ]
        with pytest.raises(ValueError, match=r"`--arm` must be what|`--adapter` must be what"):
            train.main(texts(options))


def test_a_distillation_that_cannot_be_shared_out_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="`--micro-batch` must divide"):
        distill.main(texts([*distill_arguments(folder, tmp_path, "qwen2.5-3b", "pte"), "--micro-batch", 3]))


def test_an_interrupted_run_is_continued_and_never_overwritten(folder, tmp_path, alternating, capsys):
    arguments = train_arguments(folder, tmp_path, "qwen2.5-3b", "pte", "--save-steps", 1)
    train.main(texts(arguments))
    with pytest.raises(SystemExit):
        train.main(texts(arguments))
    assert "`--output-dir` must be new or empty" in capsys.readouterr().err
    train.main(texts([*arguments, "--max-steps", 2, "--resume"]))
    records = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("train-*.json")]
    assert {tuple(row["step"] for row in record["history"] if "reward" in row) for record in records} == {(1,), (1, 2)}


# Evaluation


@pytest.fixture(scope="module")
def evaluation():
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'peft-pte[eval]'")
    import evaluation

    return evaluation


class Scripted:
    """A language model for the harness that answers 1 at every other call."""

    def __new__(cls):
        from lm_eval.api.model import LM

        class Answers(LM):
            tokenizer_name = "scripted"

            def generate_until(self, requests):
                return [f"Answer: {1 - index % 2}" for index, _ in enumerate(requests)]

            def loglikelihood(self, requests):
                raise NotImplementedError

            loglikelihood_rolling = loglikelihood

            def apply_chat_template(self, messages, add_generation_prompt=True):
                return messages[-1]["content"]

        return Answers()


def scores_of(evaluation, folder, tmp_path, model, *more):
    from lm_eval.tasks import TaskManager

    args = evaluation.parse_arguments(texts(evaluate_arguments(folder, tmp_path, "qwen2.5-3b", "base", *more)))
    evaluation.override_data(args.data, tmp_path)
    manager = TaskManager(include_path=[str(PAPER / "tasks"), str(tmp_path)], include_defaults=False)
    return evaluation.evaluate(model, manager, args, 6)[0]


def test_scores_come_from_the_harness_repeats(evaluation, folder, tmp_path):
    # Of the two problems, the first has the answer 1: half of its 16 samples are right.
    scores = scores_of(evaluation, folder, tmp_path, Scripted())
    assert scores["aime24"] == {"pass_at_1": 0.25, "pass_at_16": 0.5, "problems": 2, "samples": 16}
    assert all(
        scores[task] == {"pass_at_1": 0.5, "problems": 2, "samples": 1} for task in ("math500", "minerva", "amc")
    )


def test_lora_is_evaluated_on_its_full_cache(evaluation, folder, tmp_path):
    train.main(texts(train_arguments(folder, tmp_path, "qwen2.5-3b", "lora")))
    arguments = evaluate_arguments(folder, tmp_path, "qwen2.5-3b", "lora", "--adapter", tmp_path / "run")
    evaluation.main(texts([*arguments, "--cache-window", "full", "--tasks", "olympiadbench"]))
    assert set(only(tmp_path / "results", "qwen2.5-3b-lora-full-6-*.json")["scores"]) == {"olympiadbench"}


def test_a_trained_adapter_is_evaluated_under_other_windows(evaluation, folder, tmp_path):
    train.main(texts(train_arguments(folder, tmp_path, "r1-llama-8b", "pte")))
    model = evaluation.load_model(str(folder / "r1-llama-8b"), tmp_path / "run", 8, "float32", "cpu")
    assert model.peft_config["default"].cache_window == 8
    arguments = evaluate_arguments(folder, tmp_path, "r1-llama-8b", "pte", "--adapter", tmp_path / "run")
    evaluation.main(texts([*arguments, "--cache-window", 4, "--tasks", "math500", "aime25"]))
    results = tmp_path / "results"
    record = only(results, "r1-llama-8b-pte-4-6-*.json")
    assert record["scores"]["aime25"]["samples"] == 16
    assert record["scores"]["math500"]["problems"] == 2
    assert record["changed"] == {"dtype": "float32", "r": 4, "num_global_tokens": 5, "cache_window": 4}
    responses = next(results.glob("r1-llama-8b-pte-4-6-*/aime25.jsonl")).read_text().splitlines()
    assert [len(json.loads(row)["responses"]) for row in responses] == [16, 16]
    # Further test sets are added to the record; other settings make another one.
    evaluation.main(texts([*arguments, "--cache-window", 4, "--tasks", "minerva"]))
    assert set(only(results, "r1-llama-8b-pte-4-6-*.json")["scores"]) == {"math500", "aime25", "minerva"}
    evaluation.main(texts([*arguments, "--cache-window", 4, "--tasks", "minerva", "--temperature", 0]))
    assert len(list(results.glob("r1-llama-8b-pte-4-6-*.json"))) == 2
    for arm in ("lora_c", "no_global"):
        with pytest.raises(ValueError, match=f"`--arm` must be what the adapter was trained as, pte .*, got {arm}"):
            evaluation.main(texts([*arguments, "--arm", arm, "--cache-window", 4]))
    with pytest.raises(ValueError, match="`--model` must be the adapter's own"):
        evaluation.main(texts([*arguments, "--model", folder / "qwen2.5-3b", "--cache-window", 4]))


def test_windows_are_evaluated_one_after_the_other(evaluation, folder, tmp_path, monkeypatch):
    alive, asked = [], []
    original = evaluation.load_model

    def load(*args):
        gc.disable()  # What runs by chance proves nothing.
        asked.append([model() is not None for model in alive])
        model = original(*args)
        alive.append(weakref.ref(model))
        return model

    sampling = []
    monkeypatch.setattr(evaluation, "load_model", load)
    monkeypatch.setattr(evaluation.HFLM, "_model_generate", record_sampling(sampling, evaluation.HFLM._model_generate))
    arguments = evaluate_arguments(
        folder, tmp_path, "qwen2.5-3b", "base", "--tasks", "amc", "--cache-window", 4, 8, "full"
    )
    try:
        evaluation.main(texts(arguments))
    finally:
        gc.enable()
    assert asked == [[], [False], [False, False]]
    assert len(list((tmp_path / "results").glob("qwen2.5-3b-base-*-6-*.json"))) == 3
    assert {(s["do_sample"], s["temperature"], s["top_p"], s["top_k"]) for s in sampling} == {(True, 0.6, 0.95, 0)}


def record_sampling(into, original):
    def generate(self, *args, **kwargs):
        into.append(kwargs)
        return original(self, *args, **kwargs)

    return generate


def only(folder, pattern):
    (file,) = folder.glob(pattern)
    return json.loads(file.read_text())


@pytest.mark.parametrize("window", [8, None])
def test_the_harness_neither_cuts_prompts_nor_stops_at_the_models_length(evaluation, folder, window):
    from accelerate import Accelerator
    from lm_eval.api.instance import Instance

    tokens = SIZES["max_position_embeddings"] + 40 if window else 40
    model = evaluation.load_model(str(folder / "qwen2.5-7b"), None, window, "float32", "cpu")
    model.generation_config.eos_token_id = None if window else 1
    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2.5-7b", padding_side="left")
    harness = evaluation.make_harness(model, tokenizer, tokens, 2, Accelerator(cpu=True))
    prompts = ["a" * 480, "b" * 450]
    greedy = {"until": [], "do_sample": False, "max_gen_toks": tokens}
    requests = [
        Instance("generate_until", {}, (prompt, greedy), index, metadata=("task", index, 1))
        for index, prompt in enumerate(prompts)
    ]
    written = harness.generate_until(requests, disable_tqdm=True)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    expected = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert written == [text.split("<eos>")[0] for text in tokenizer.batch_decode(expected, skip_special_tokens=True)]
    if window:
        assert expected.shape[1] == tokens


@pytest.mark.parametrize("options", [["base", "--adapter", "folder"], ["pte"], ["lora", "--adapter", "folder"]])
def test_arguments_that_contradict_each_other_are_refused(evaluation, folder, tmp_path, options, capsys):
    with pytest.raises(SystemExit):
        evaluation.parse_arguments(texts(evaluate_arguments(folder, tmp_path, "qwen2.5-3b", *options)))
    assert "must be" in capsys.readouterr().err


# Configs and tables


@pytest.mark.parametrize(
    ("name", "distributed", "processes"),
    [
        ("single", "NO", 1),
        ("ddp_8", "MULTI_GPU", 8),
        ("ddp_16", "MULTI_GPU", 16),
        ("fsdp2_8", "FSDP", 8),
        ("fsdp2_16", "FSDP", 16),
        ("zero3_8", "DEEPSPEED", 8),
        ("zero3_16", "DEEPSPEED", 16),
    ],
)
def test_accelerate_reads_the_configs(name, distributed, processes):
    file = str(PAPER / "configs" / f"{name}.yaml")
    config = load_config_from_file(file)
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == (
        distributed,
        processes,
        "bf16",
    )
    launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "train.py"]))
    assert launch.num_processes == processes
    assert launch.num_machines == max(1, processes // 8)
    assert launch.use_fsdp == (distributed == "FSDP")
    if launch.use_fsdp:
        assert launch.fsdp_version == 2
    if launch.use_deepspeed:
        assert launch.zero_stage == 3


def test_the_table_says_what_nobody_has_run(tmp_path, capsys):
    table.main(["--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| qwen2.5-3b | PTE | 45.3 % | not run | 30.1 | not run |" in printed
    assert "No evaluation: not run." in printed


def test_the_table_shows_whole_runs_and_leaves_trials_out(tmp_path, capsys):
    scores = {task: {"pass_at_1": 0.5} for task in table.TASKS}
    run = {"kind": "evaluation", "model": "r1-llama-8b", "arm": "pte", "cache_window": 768, "max_new_tokens": 3072}
    run |= {"changed": {}, "seed": 0}
    (tmp_path / "a.json").write_text(json.dumps({**run, "scores": scores}))
    # Nor is what was trained or sampled in another way the protocol's.
    other = {task: {"pass_at_1": 0.9} for task in table.TASKS}
    (tmp_path / "0.json").write_text(json.dumps({**run, "scores": other, "changed": {"r": 4}}))
    (tmp_path / "b.json").write_text(json.dumps({**run, "cache_window": 1024, "scores": scores, "limit": 2}))
    trained = {
        "kind": "training",
        "model": "r1-llama-8b",
        "arm": "pte",
        "cache_window": 768,
        "peak_gpu_bytes": 20 * 2**30,
        "changed": {},
    }
    (tmp_path / "c.json").write_text(json.dumps(trained))
    table.main(["--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| r1-llama-8b | PTE | 59.8 % | 50.0 % | 45.6 | 50.0 |" in printed
    assert "| PTE | 48.4 | 50.0 | 52.2 | not run | 55.4 | not run |" in printed
    assert "| PTE + HeadKV | 50.7 | not run |" in printed
    assert "| 90.0 | r=4 |" in printed
    (tmp_path / "d.json").write_text(json.dumps({**run, "scores": other, "seed": 1}))
    table.main(["--results", str(tmp_path)])
    assert "| PTE | 48.4 | 70.0 (2 runs) |" in capsys.readouterr().out


# Two processes


def launch(script, arguments):
    # torchrun, because `accelerate launch --cpu` starts a single process, whatever it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PEFT_PTE_CHECK_SHAPES": "0", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(PAPER / script), *texts(arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_train_and_evaluate(evaluation, folder, tmp_path):
    launch("train.py", train_arguments(folder, tmp_path, "qwen2.5-3b", "pte"))
    record = json.loads(next((tmp_path / "results").glob("train-*.json")).read_text())
    assert record["processes"] == 2
    more = ["--adapter", tmp_path / "run", "--cache-window", 4, "--tasks", "math500", "aime24", "--limit", 3]
    launch("evaluation.py", evaluate_arguments(folder, tmp_path, "qwen2.5-3b", "pte", *more))
    record = only(tmp_path / "results", "qwen2.5-3b-pte-4-6-*.json")
    assert {task: score["problems"] for task, score in record["scores"].items()} == {"math500": 3, "aime24": 3}
