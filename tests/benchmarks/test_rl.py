"""The RL benchmark: its task and verifier, the window at evaluation; `--quick` end to end is slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from benchmarks.common.intervals import clustered_share, share
from benchmarks.rl import task
from benchmarks.rl.evaluate import EVALUATION_SEED, window_of
from benchmarks.rl.report import peak_cache, report
from benchmarks.rl.train import ARMS, Settings, adapt, evict_of
from benchmarks.small import gone
from peft_pte.cache.store import ThoughtLayer
from tests.cases import make_base

ROOT = Path(__file__).resolve().parents[2]


def problems(batch=8, steps=6, asked=3, seed=0):
    return task.make_problems(batch, steps, asked, torch.Generator().manual_seed(seed))


def test_operations_are_permutations():
    assert torch.equal(task.TABLE.sort(dim=1).values, torch.arange(len(task.STATES)).expand(len(task.OPERATIONS), -1))


def test_solutions_follow_the_prompt():
    made = problems()
    for prompt, completion, asked in zip(
        made.prompt_ids.tolist(), made.completion_ids.tolist(), made.asked.tolist(), strict=True
    ):
        given, _, questions = task.words(prompt).partition(" ask ")
        _, state, *pairs = given.split()
        trace, _, answers = task.words(completion).partition(" answer ")
        steps = [trace.split()[start : start + task.STEP] for start in range(0, len(trace.split()), task.STEP)]
        assert [word for step in steps for word in step[:2]] == pairs
        for _, operation, after in steps:
            state = task.STATES[task.TABLE[task.OPERATIONS.index(operation), task.STATES.index(state)]]
            assert after == state
        assert questions.split() == [steps[step][0] for step in asked] + ["think"]
        assert answers.split() == [word for step in asked for word in (steps[step][0], steps[step][2])] + ["<eos>"]


def test_columns_point_at_states_and_at_what_recalls_them():
    made = problems()
    stated = made.completion_ids.gather(1, made.stated)
    assert torch.equal(stated, made.completion_ids[:, made.recalled + 1])
    assert made.distance.min() > 0
    # The word before an answer, and the one that opens the step that states it, are the same index.
    assert torch.equal(made.completion_ids[:, made.recalled], made.completion_ids.gather(1, made.stated - 2))


def test_what_the_window_holds_is_what_a_cache_holds():
    made, window, prompt = problems(batch=1, steps=10, asked=10), 8, 5
    evict = evict_of(window)
    model = get_peft_model(make_base("llama"), Settings(window=window, rank=4, global_tokens=4).config())
    cache, held = model.base_model.new_cache(), {}
    tokens = torch.randint(3, 20, (1, prompt + made.completion_ids.shape[1]))
    with torch.no_grad():
        model(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True)
        for thought in range(tokens.shape[1] - prompt):
            column = tokens[:, prompt + thought, None]
            cache = model(input_ids=column, past_key_values=cache, use_cache=True).past_key_values
            held[thought] = {place - prompt for place in cache.window_positions(0)[0, 0].tolist() if place >= 0}
            assert int(gone(torch.tensor(thought), window, evict)) == min(held[thought])
    expected = [[int(s) in held[int(r)] for s, r in zip(made.stated[0], made.recalled, strict=True)]]
    assert made.held(window, evict).tolist() == expected
    assert made.held(None, 0).all()


def test_the_tokenizer_gives_words_back():
    tokenizer, made = task.make_tokenizer(), problems()
    for ids in (made.prompt_ids, made.completion_ids):
        for row in ids.tolist():
            assert tokenizer(task.words(row))["input_ids"] == row
    assert tokenizer.decode(made.completion_ids[0], skip_special_tokens=True) == task.words(
        made.completion_ids[0, :-1].tolist()
    )


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("1 a A 2 b B answer 2 B 1 A <eos>", [True, True]),
        ("answer 2 B 1 A", [True, True]),
        ("1 a A 2 b B answer 2 B 1 C <eos>", [True, False]),
        ("answer 1 A 2 B <eos>", [False, False]),
        ("answer 2 B <eos> 1 A", [True, False]),
        ("answer 2 B 1", [True, False]),
        ("answer answer 2 B 1 A", [False, False]),
        ("2 B 1 A <eos>", [False, False]),
        ("", [False, False]),
    ],
)
def test_grades(completion, right):
    solution = "1 a A 2 b B answer 2 B 1 A <eos>"
    assert task.grade(completion, solution) == right
    assert task.share_right([completion], [solution]) == [sum(right) / 2]
    assert task.exact([completion], [solution]) == [float(all(right))]


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="`steps` must be from 1 to 24, got 25"):
        problems(steps=25)
    with pytest.raises(ValueError, match="`asked` must be from 1 to the number of steps, 3, got 4"):
        problems(steps=3, asked=4)


@pytest.mark.parametrize("arm", ARMS)
def test_the_window_of_an_evaluation_bounds_its_cache(arm, monkeypatch):
    model = adapt(make_base("llama"), Settings(arm=arm, window=8, rank=4, global_tokens=4), 0)
    before = model.peft_config["default"]
    sizes = []
    original = ThoughtLayer.lose
    monkeypatch.setattr(ThoughtLayer, "lose", lambda self, *args: (sizes.append(self.window), original(self, *args))[1])
    prompt = torch.randint(3, 20, (2, 5))
    generate = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    for window in (12, None):
        sizes.clear()
        with window_of(model, window):
            model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **generate)
        assert set(sizes) == ({12} if window else set())
    assert model.peft_config["default"] is before


def test_intervals_count_problems():
    right = torch.tensor([[True, True], [False, False], [True, True], [False, False]])
    found = clustered_share(right, torch.ones_like(right))
    assert found["n"] == 8
    assert found["accuracy"] == 0.5
    assert found["low"] < 0.05
    assert found["high"] > 0.95
    # Answers that are independent: the interval of a binomial share, which Wilson's is near where there are many.
    right = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    found, expected = clustered_share(right, chosen), share(right[chosen])
    assert found["n"] == expected["n"]
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["high"] - found["low"] == pytest.approx(expected["high"] - expected["low"], rel=0.05)
    assert clustered_share(right, torch.zeros_like(chosen))["accuracy"] is None


def test_no_seed_of_a_training_comes_near_that_of_the_evaluation():
    assert EVALUATION_SEED > 100_000


@pytest.mark.slow
def test_quick_runs_and_reports(tmp_path):
    from benchmarks.rl import model as base

    # A base model that solved nothing: what is tested is that everything runs.
    base.new_model().save_pretrained(tmp_path / "outputs" / "base-2-layers-seed-0")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.rl",
        "run",
        "--arm",
        *ARMS,
        "--protocol",
        "straight",
        "warm",
        "--quick",
    ]
    command += ["--output", str(tmp_path), "--checkpoints", str(tmp_path / "outputs")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(results) == 2 * len(ARMS)
    for result in results:
        assert result["grpo"]["max_log_ratio"] < 1e-4
        assert [row["decoding"] for row in result["before_grpo"]] == ["sampled", "greedy"]
        assert result["grpo"]["log_ratio_tokens"] > 0
        assert ("warm_up" in result) == (result["protocol"] == "warm")
        assert {row["window"] for row in result["evaluation"]} >= {result["config"]["cache_window"], None}
    assert report(tmp_path).partition("\n\n")[0].count("\n") == 1 + len(results)
    assert (tmp_path / "rl.png").stat().st_size > 1000


def test_a_full_cache_is_computed_where_none_was_logged():
    settings = {"steps": 4, "asked": 2, "layers": 2, "prompts": 3, "generations": 5}
    logged = {"settings": settings, "grpo": {"curve": {"cache_bytes": [1.0, 3.0, None]}}}
    assert peak_cache(logged) == 3.0
    full = {"settings": settings, "grpo": {"curve": {"cache_bytes": [None, None]}}}
    columns = (1 + 1 + 2 * 4 + 1 + 2 + 1) + (3 * 4 + 1 + 2 * 2 + 1 - 1)
    assert peak_cache(full) == 15 * columns * 2 * 2 * 64 * 4
