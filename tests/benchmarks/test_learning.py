"""Recipes in small: stages run, notes say what they ask for, tables hold what runs found."""

import argparse
import dataclasses
import random

import pytest
import torch

from benchmarks.learning import report
from benchmarks.learning.arms import ARMS, Settings, Stage, assignment
from benchmarks.learning.measure import KEY, measure, run
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.tasks.notes import NOTES, write
from benchmarks.learning.tasks.task import BASES, digest
from tests.benchmarks.test_runner import SOURCE, session

COUNT = 32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for task in {type(TASKS[name]) for name in ("permutation", "memory")}:
        for field, value in {"count": COUNT, "probed": COUNT, "batch": 4, "micro_batch": 4}.items():
            monkeypatch.setattr(task, field, value)


def settings(task, *stages, **fields):
    return Settings(task=task, stages=tuple(map(Stage.parse, stages)), **{"arm": "slots", **fields})


def record(what, folder=None):
    return {**run(what, 0, 0, folder), "source": SOURCE}


def test_stages_are_read():
    assert Stage.parse("distil:400") == Stage("distil", 400, 6e-3)
    assert Stage.parse("grpo:30,rate=1e-4,beta=0.1,schedule=constant") == Stage("grpo", 30, 1e-4, 0.1, "constant")
    for text in ("distil", "distil:x", "learn:3"):
        with pytest.raises(ValueError, match="A stage must be"):
            Stage.parse(text)
    with pytest.raises(ValueError, match="got speed in"):
        Stage.parse("distil:3,speed=4")


def test_names_tell_runs_apart():
    runs = [
        settings("permutation", "distil:4"),
        settings("permutation", "distil:5"),
        settings("permutation", "distil:4,rate=1"),
        settings("permutation", "distil:4,beta=0.5"),
        settings("permutation", "distil:4", ranged=True),
        settings("permutation", "distil:4", arm="lora"),
        settings("memory", "distil:4"),
        settings("permutation", "distil:4", overrides={"update_gain": 3.0}),
        settings("permutation", "supervise:4", "distil:4"),
    ]
    assert len({one.name for one in runs}) == len(runs)


@pytest.mark.parametrize("arm", ["base", "lora-full", "lora-detached", "global-only", "linear-value", "slots"])
def test_a_recipe_runs(arm, tmp_path):
    stages = {"slots": ("supervise:2", "distil:2", "grpo:2,beta=0.1"), "base": ()}.get(arm, ("distil:1",))
    what = settings("permutation", *stages, arm=arm, ranged=arm == "slots", probe_every=1)
    result = record(what, tmp_path / "kept")
    assert result["base_full_cache"]["recall"]["accuracy"] > 0.9
    assert [row["step"] for row in result["curve"]] == list(range(sum(stage.steps for stage in what.stages) + 1))
    windows = [None] if arm in ("base", "lora-full") else [6, 8, 12, 16, None]
    assert [row["window"] for row in result["evaluation"]] == windows
    writes = ARMS[arm][1].get("state_update", "progressive") == "progressive"
    assert ("swapped_evictions" in result) == ("frozen_state" in result) == writes
    if arm == "slots":
        text = report.recipes([result])
        assert (
            "| PTE, slots | supervision 2 (0.006), then distillation 2 (0.006), then GRPO 2 (0.0003, beta 0.1), windows drawn | 0 |"
            in text
        )
        assert result["stages"][2]["max_log_ratio"] < 1e-4
        report.draw_windows([result], tmp_path / "windows.png")
        report.draw_grpo([result], tmp_path / "grpo.png")
        assert (tmp_path / "grpo.png").stat().st_size > 10_000


def test_traces_are_given(tmp_path):
    result = record(settings("memory", "supervise:1", "distil:2"))
    assert set(result["evaluation"][0]) >= {"window", "length", "recall", "all", "in_window", "evicted", "running"}
    assert result["stages"][1]["logs"] == [] or "pte/ratio_p5" in result["stages"][1]["logs"][0]
    assert "beyond relay" in report.recipes([result])
    assert "**Facts recalled, %, traces of 96 thoughts**" in report.distances([result])
    report.draw_distances([result], tmp_path / "distances.png")
    with pytest.raises(NotImplementedError, match="nothing that a model writes"):
        record(settings("memory", "grpo:1"))


def test_windows_are_shared_out_by_what_is_measured():
    result = record(settings("memory", "supervise:1", arm="lora-head_budget"))
    assert len(result["config"]["eviction_options"]["importance"]) == 2
    assert "| LoRA_c, `head_budget` | 0 |" in report.distances([result])


def test_a_converted_lora_goes_on():
    runs = [
        record(settings("shifted", *stages, probe_every=1)) for stages in (("lora:2", "supervise:2"), ("supervise:2",))
    ]
    text = report.converted(runs)
    assert "LoRA on the full cache 2 (0.003), then supervision 2 (0.006)" in text
    assert text.count("| PTE, slots |") == 4


def test_runs_that_are_known_are_left_out(tmp_path):
    options = argparse.Namespace(task="permutation", arm=["base"], stages=[], seed=[0, 1], base_seed=None, quick=False)
    options.__dict__.update(range=False, probe_every=0, set=[], checkpoints=tmp_path)
    given = session(path=tmp_path / "recipes.jsonl", key=KEY)
    given.options = options
    first = next(measure(given))
    given.results.append(first)
    assert [found["seed"] for found in measure(given)] == [1]


def test_runs_on_other_base_models_are_not_compared():
    run = {"task": "memory", "base_seed": 0, "base_weights": "a"}
    assert len(report.same_base([run, run, {**run, "base_seed": 1, "base_weights": "b"}])) == 3
    with pytest.raises(ValueError, match="must share their base model, got several for memory, seed 0"):
        report.same_base([run, {**run, "base_weights": "b"}])


def test_fields_of_a_command_line():
    assert assignment('target_modules=["q_proj"]') == ("target_modules", ["q_proj"])
    assert assignment("key_rotation=kept") == ("key_rotation", "kept")
    assert settings("memory", overrides={"update_gain": 3.0}).config(TASKS["memory"]).update_gain == 3.0


def test_data_are_the_sequences_of_supervision():
    for name in ("permutation", "memory"):
        task, tokenizer = TASKS[name], TASKS[name].tokenizer()
        rows = task.data(3, torch.Generator().manual_seed(1))
        batch = task.make(3, torch.Generator().manual_seed(1))
        texts = [f"{row['prompt']} {row['completion']}" for row in rows]
        assert tokenizer(texts)["input_ids"] == batch.input_ids.tolist()
        assert all(len(tokenizer(row["prompt"])["input_ids"]) == batch.prompt for row in rows)


def test_bases_are_in_the_repository():
    found = {digest(TASKS[name].base(seed)) for name in ("permutation", "memory") for seed in range(3)}
    assert len(found) == 6
    assert sum(path.stat().st_size for path in BASES.rglob("*") if path.is_file()) < 4e6


def test_a_run_that_died_goes_on(tmp_path, monkeypatch):
    what = settings("permutation", "distil:4")
    whole = run(what, 0, 0)
    monkeypatch.setattr(type(TASKS["permutation"]), "save_every", 2)
    task, calls = TASKS["permutation"], []
    evaluate = type(task).evaluate

    def die(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(self, *args)

    monkeypatch.setattr(type(task), "evaluate", die)
    probed = dataclasses.replace(what, probe_every=3)
    with pytest.raises(KeyboardInterrupt):
        run(probed, 0, 0, tmp_path)
    monkeypatch.setattr(type(task), "evaluate", evaluate)
    again = run(what, 0, 0, tmp_path)
    assert again["stages"][0]["after"] == whole["stages"][0]["after"]
    assert again["evaluation"] == whole["evaluation"]


def test_notes_ask_for_what_they_state():
    text, asked = write(random.Random(3))
    assert len(asked) == 2 * NOTES
    for start, end, stated in asked:
        value = text[start:end]
        assert text[stated : stated + len(value)] == value
        assert value.isdigit() or value.istitle()
        line = text[: start + len(value) + 1].splitlines()[-1]
        assert text.count(line) == 2
