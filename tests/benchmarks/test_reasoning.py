"""The reasoning benchmark: task, estimator, intervals and report alone; a whole run on a tiny random model, left to `slow`."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common.intervals import wilson
from benchmarks.reasoning import report as reports
from benchmarks.reasoning.__main__ import parser
from benchmarks.reasoning.evaluate import bootstrap, evictions, pass_at_k, solved
from benchmarks.reasoning.run import name_of
from benchmarks.reasoning.settings import ARMS, FORMS, Settings, settings_for
from benchmarks.reasoning.task import BARE, TASKS, evaluation_problems, identity, training_problems
from benchmarks.reasoning.train import make_reward
from benchmarks.rollouts import Watch, peak_bytes, reset_peak
from benchmarks.small import assignment
from examples.common import extract_answer

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_is_in_both_splits_and_none_twice_in_the_evaluation(task):
    held_out = evaluation_problems(task, 24)
    training = training_problems(task, 0, 200, held_out)
    asked = [identity(entry["question"]) for entry in held_out.entries]
    assert len(set(asked)) == len(asked) == 24
    assert len(training) == 200
    assert not {identity(entry["question"]) for entry in training.entries} & set(asked)


def test_splits_depend_on_the_seed_alone():
    held_out = evaluation_problems("products", 24)
    assert held_out.entries == evaluation_problems("products", 24).entries
    first, again, other = (training_problems("products", seed, 50, held_out).entries for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_too_many_problems_are_refused():
    with pytest.raises(ValueError, match="`count` must be at most"):
        evaluation_problems("products", 3000)
    with pytest.raises(ValueError, match="`task` must be one of"):
        evaluation_problems("sudoku", 3)


@pytest.mark.parametrize("task", TASKS)
def test_verifier_takes_the_answer_and_nothing_else(task):
    problems = evaluation_problems(task, 8)
    for index, entry in enumerate(problems.entries):
        answer = int(entry["answer"])
        assert problems.right(index, f"It is 3 and so on.\nAnswer: {answer}.")
        assert problems.right(index, f"5 and then {answer}")
        assert not problems.right(index, f"{answer}, or rather {answer + 1}")
        # The floor that a wrong answer gets from reasoning-gym is not a mark here.
        assert not problems.right(index, "I do not know.")
        assert BARE not in problems.prompt(index)[0]["content"]
    assert extract_answer("no digits") is None


def test_reward_wants_a_right_answer_after_enough_thought():
    problems = evaluation_problems("products", 2)
    model = LlamaForCausalLM(tiny_config())

    class Words:
        def apply_chat_template(self, prompts, **kwargs):
            return {"input_ids": [[1] * 5 for _ in prompts]}

    logged = {}
    reward = make_reward(problems, model, Words(), min_thought=10)
    answer = problems.entries[0]["answer"]
    texts = [f"Answer: {answer}", f"Answer: {answer}", "Answer: 1000"]
    found = reward(
        prompts=[problems.prompt(0)] * 3,
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[1] * 10, [1] * 9, [1] * 12],
        problem=[0, 0, 0],
        log_metric=logged.__setitem__,
    )
    assert found == [1.0, 0.0, 0.0]
    assert logged["right"] == pytest.approx(2 / 3)
    # 5 + 12 - 1 columns of 2 layers, keys and values, 2 heads of 8, float32, 3 rows.
    assert logged["full_cache_bytes"] == 3 * 16 * 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize(("samples", "right", "k"), [(8, 3, 1), (8, 3, 4), (8, 0, 8), (8, 1, 8), (6, 5, 2), (5, 2, 5)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(samples, right, k):
    subsets = list(itertools.combinations(range(samples), k))
    share = sum(any(index < right for index in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(samples, right, k) == pytest.approx(share)


def test_pass_at_k_wants_enough_samples():
    with pytest.raises(ValueError, match="`k` must be between 1 and the 4 samples"):
        pass_at_k(4, 1, 8)
    with pytest.raises(ValueError, match="`right` must be between"):
        pass_at_k(4, 5, 2)


def test_intervals():
    # Wilson's own numbers for 8 of 10, to three digits.
    assert wilson(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    low, high = wilson(1.0, 20)
    assert low < 0.9
    assert high == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(400, generator=generator)
    mean, half = float(values.mean()), 1.96 * float(values.std()) / 400**0.5
    assert bootstrap(values.tolist()) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_only_long_enough_samples_are_solved():
    evaluation = {"right": [[True, True], [False, True]], "lengths": [[40, 20], [50, 36]]}
    assert solved(evaluation, 36) == [[True, False], [False, True]]


def test_forms_make_thoughts_outgrow_the_window():
    for form in FORMS:
        settings = settings_for("pte", "products", form)
        if form != "quick":
            assert evictions(settings.min_thought, settings) >= 2
        assert settings.samples >= reports.K
        assert settings.prompts * settings.generations % settings.micro_batch == 0


def test_evictions_are_those_of_the_cache():
    # Window of 24, of which 6 leave: the 25th token makes the first six leave, the 31st the next.
    assert [evictions(length, Settings()) for length in (24, 25, 30, 31, 64)] == [0, 1, 1, 2, 7]


def test_fresh_adapters_are_the_base_model():
    # What sharing the evaluation before training rests on.
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config()).eval()
    ids = torch.randint(3, 200, (2, 60))
    expected = []
    for arm in ("lora-c", "global-only", "pte"):
        model = get_peft_model(LlamaForCausalLM(tiny_config()), Settings(arm=arm).config()).eval()
        model.get_base_model().load_state_dict(
            {adapted(name, model): tensor for name, tensor in base.state_dict().items()}, strict=False
        )
        expected.append(model(input_ids=ids, prompt_length=10).logits)
    assert torch.equal(expected[0], expected[1])
    assert torch.equal(expected[0], expected[2])
    assert not torch.allclose(expected[0], base(ids).logits)


def adapted(name, model):
    """The name of a weight of the base model once its linear is wrapped."""
    module, _, leaf = name.rpartition(".")
    wrapped = getattr(model.get_base_model().get_submodule(module), "base_layer", None)
    return name if wrapped is None else f"{module}.base_layer.{leaf}"


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="`arm` must be one of"):
        Settings(arm="other").config()


def test_command_line():
    options = parser().parse_args(["run", "--arm", "pte", "--set", "update_gain=1.0", "key_rotation=kept"])
    assert dict(options.set) == {"update_gain": 1.0, "key_rotation": "kept"}
    assert settings_for("pte", "products", overrides=dict(options.set)).config().update_gain == 1.0
    assert options.task == list(TASKS)
    assert assignment('target_modules=["q_proj"]') == ("target_modules", ["q_proj"])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process its peak")
def test_peak_of_memory_is_counted_anew():
    device = torch.device("cpu")
    reset_peak(device)
    start = peak_bytes(device)
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 60e6 < peak_bytes(device) - start < 90e6
    del block
    reset_peak(device)
    assert peak_bytes(device) - start < 30e6


def result(arm, task="products", seed=0, form="default"):
    """A results file as a run writes it; half the samples are right before, three quarters after."""
    settings = asdict(settings_for(arm, task))

    def evaluation(right):
        problems = settings["evaluation_problems"]
        return {"right": [[i < right for i in range(8)]] * problems, "lengths": [[40] * 8] * problems, "seconds": 1.0}

    step = {"reward": 0.5, "tokens": 100, "seconds": 4.0, "rollout_seconds": 2.0, "max_log_ratio": 3e-6}
    held = {"full_cache_bytes": 7e6} if arm == "lora" else {"full_cache_bytes": 7e6, "cache_bytes": 5e6}
    return {
        "form": form,
        "seed": seed,
        "settings": settings,
        "before": evaluation(4),
        "after": evaluation(6),
        "training": {"curve": [{"step": i + 1, **step, **held} for i in range(4)], "peak_bytes": 2_500_000_000},
        "seconds": 90.0,
        "date": "2026-01-01T00:00:00+00:00",
        "command": "python -m benchmarks.reasoning run",
        "commit": "0" * 40,
        "dirty": False,
        "cpu": "a CPU",
        "cores": 2,
        "threads": 1,
        "gpu": None,
        "versions": {"torch": "2"},
    }


def test_report(tmp_path):
    for arm in ARMS:
        (tmp_path / f"products-{arm}-seed-0.json").write_text(json.dumps(result(arm)))
    text = reports.report(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| products")]
    assert len(rows) == len(ARMS)
    cells = [cell.strip() for cell in rows[-1].strip("|").split("|")]
    row = dict(zip(reports.HEADER, cells, strict=True))
    assert row["pass@1 before"] == "50.0 (50.0 to 50.0)"
    assert row["gain"] == "+25.0 (+25.0 to +25.0)"
    assert row["pass@8 after"].startswith("100.0 (86")
    assert row["evictions"] == "3.0"
    assert row["tokens/s rollout / step"] == "50 / 25"
    assert row["cache MB"] == "5.0"
    assert row["max abs log ratio"] == "3e-06"
    assert (tmp_path / "reasoning.png").stat().st_size > 10_000


def test_runs_that_differ_have_names_that_differ():
    assert name_of(result("pte")) == "products-pte"
    changed = result("pte")
    changed["settings"] |= {"overrides": {"state_address": "value"}, "steps": 3}
    assert name_of(changed) == "products-pte-state_address-value-steps-3"
    rows = [line for line in reports.render([result("pte"), changed]).splitlines() if line.startswith("| products")]
    assert [row.split(" | ")[1] for row in rows] == ["PTE", "PTE, state_address value, steps 3"]
    usual = result("pte")
    usual["settings"] |= {"overrides": {"state_address": "key"}}
    assert name_of(usual) == "products-pte"
    roomy = {**result("pte"), "form": "roomy", "settings": asdict(settings_for("pte", "products", "roomy"))}
    assert name_of(roomy) == "roomy-products-pte"


def watched(scored):
    """A row of a watch of one completion of two tokens, sampled with log-probs of log 1/2 and scored with ``scored``."""
    watch = Watch()
    ids, mask = torch.tensor([[5, 7, 8]]), torch.ones(1, 3, dtype=torch.long)
    watch._sampled = {(5, 7, 8): torch.full((2,), 0.5).log()}
    watch._scoring(lambda *args: (scored, None))(None, ids, mask, 2)
    return watch._row


def test_the_watch_sees_what_is_off_policy():
    on_policy = torch.full((1, 2), 0.5).log()
    assert watched(on_policy) == {"max_log_ratio": 0.0, "compared": 2}
    shifted = on_policy + torch.tensor([[0.0, -0.25]])
    assert watched(shifted)["max_log_ratio"] == pytest.approx(0.25)
    with pytest.raises(FloatingPointError, match="log ratio of sampled tokens is nan"):
        watched(on_policy * torch.nan)


def test_report_takes_the_mean_over_seeds():
    text = reports.render([result("pte", seed=0), {**result("pte", seed=1), "after": result("pte")["before"]}])
    assert "| 0, 1 |" in text
    assert "+12.5 (+12.5 to +12.5)" in text


def test_report_without_results_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no results"):
        reports.report(tmp_path)


def tiny_config():
    return LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random model of two layers that reads and writes bytes."""
    folder = tmp_path_factory.mktemp("reasoning") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: index + 2 for index, letter in enumerate(letters)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_quick_form_runs_all_arms(tiny_model, tmp_path):
    command = [sys.executable, "-m", "benchmarks.reasoning", "run", "--quick", "--task", "products"]
    finished = subprocess.run(
        [*command, "--model", str(tiny_model), "--device", "cpu", "--output", str(tmp_path / "results")],
        cwd=ROOT,
        env={**os.environ, "PEFT_PTE_CHECK_SHAPES": "0", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    results = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("quick-*.json")]
    assert {found["settings"]["arm"] for found in results} == set(ARMS)
    for found in results:
        curve = found["training"]["curve"]
        assert [step["step"] for step in curve] == [1, 2]
        for step in curve:
            assert step["compared"] == step["tokens"] > 0
            assert step["max_log_ratio"] < 1e-4
            assert step["seconds"] >= step["rollout_seconds"] > 0
        bounded = found["settings"]["arm"] != "lora"
        assert all(("evictions" in step) == bounded for step in curve)
        for when in ("before", "after"):
            assert [len(row) for row in found[when]["right"]] == [8] * 4
    shared = {found["settings"]["arm"]: found["before"] for found in results}
    assert shared["pte"] == shared["lora-c"]
    assert shared["pte"] != shared["lora"]
    assert "LoRA, full cache" in reports.render(results)
