"""The recipe benchmark in small: its stages run, its notes say what they ask for, its tables hold what its runs found."""

import dataclasses
import random

import pytest
import torch

from benchmarks.recipe import report
from benchmarks.recipe.notes import NOTES, write
from benchmarks.recipe.run import TASKS, name_of, run, save
from benchmarks.recipe.tasks import BASES
from benchmarks.recipe.train import ARMS, Settings, Stage
from benchmarks.small import digest

RATES = {"supervise": 6e-3, "distil": 2e-3, "grpo": 3e-4, "lora": 3e-3}
COUNT = 32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in ("permutation", "memory", "shifted"):
        monkeypatch.setitem(run.__globals__["COUNT"], name, COUNT)
        monkeypatch.setitem(run.__globals__["PROBED"], name, COUNT)
        monkeypatch.setattr(type(TASKS[name]), "batch", 4)
        monkeypatch.setattr(type(TASKS[name]), "micro_batch", 4)


def settings(task, *stages, **fields):
    return Settings(task=task, stages=tuple(Stage.parse(text, RATES) for text in stages), **{"arm": "slots", **fields})


def test_stages_are_read():
    assert Stage.parse("distil:400", RATES) == Stage("distil", 400, 2e-3)
    assert Stage.parse("grpo:30,rate=1e-4,beta=0.1,schedule=constant", RATES) == Stage(
        "grpo", 30, 1e-4, 0.1, "constant"
    )
    for text in ("distil", "distil:x", "learn:3"):
        with pytest.raises(ValueError, match="A stage must be"):
            Stage.parse(text, RATES)
    with pytest.raises(ValueError, match="got speed in"):
        Stage.parse("distil:3,speed=4", RATES)


def test_names_tell_runs_apart():
    runs = [
        settings("permutation", "distil:4"),
        settings("permutation", "distil:5"),
        settings("permutation", "distil:4,rate=1"),
        settings("permutation", "distil:4,beta=0.5"),
        settings("permutation", "distil:4", ranged=True),
        settings("permutation", "distil:4", arm="lora"),
        settings("memory", "distil:4"),
        settings("permutation", "supervise:4", "distil:4"),
    ]
    assert len({name_of(one) for one in runs}) == len(runs)


@pytest.mark.parametrize("arm", ARMS)
def test_a_recipe_runs(arm, tmp_path):
    stages = ("supervise:2", "distil:2", "grpo:2") if arm == "slots" else ("distil:1",)
    what = settings("permutation", *stages, arm=arm, ranged=arm == "slots", probe_every=1)
    result = run(what, 0, "python -m benchmarks.recipe run", tmp_path / "kept")
    assert result["base_full_cache"]["recall"]["accuracy"] > 0.9
    assert [row["step"] for row in result["curve"]] == list(range(sum(stage.steps for stage in what.stages) + 1))
    windows = [None] if arm == "lora-full" else [6, 8, 12, 16, None]
    assert [row["window"] for row in result["evaluation"]] == windows
    assert ("swapped_evictions" in result) == (arm not in ("global-only", "lora", "lora-key_diff", "lora-full"))
    assert save(result, tmp_path).exists()
    text = report.report(tmp_path)
    assert ("GRPO" in text) == (arm == "slots")
    assert (tmp_path / "windows.png").exists()


def test_traces_are_given(tmp_path):
    result = run(settings("memory", "supervise:1", "distil:2"), 0, "-")
    assert set(result["evaluation"][0]) == {"window", "recall", "all", "in_window", "evicted", "running"}
    assert result["stages"][1]["logs"] == [] or "pte/ratio_p5" in result["stages"][1]["logs"][0]
    save(result, tmp_path)
    assert "beyond relay" in report.report(tmp_path)


def test_a_converted_lora_goes_on(tmp_path):
    what = settings("shifted", "lora:2", "supervise:2", probe_every=1)
    for one in (what, settings("shifted", "supervise:2", probe_every=1)):
        save(run(one, 0, "-"), tmp_path)
    text = report.converted(tmp_path)
    assert "LoRA on the full cache 2 (0.003), then supervision 2 (0.006)" in text
    assert text.count("| PTE, slots |") == 4


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
    whole = run(what, 0, "-")
    monkeypatch.setattr("benchmarks.recipe.train.SAVE_STEPS", (2, 2))
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
        run(probed, 0, "-", tmp_path)
    monkeypatch.setattr(type(task), "evaluate", evaluate)
    again = run(what, 0, "-", tmp_path)
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
