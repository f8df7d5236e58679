"""The memory benchmark: its traces (quick), and its short form (minutes: pretraining and three adaptations)."""

import pytest
import torch

from benchmarks.memory import run as runner
from benchmarks.memory.task import ASK, EQUALS, PROMPT, held, make_traces


def test_every_question_asks_for_a_fact_stated_before():
    traces = make_traces(16, 96, torch.Generator().manual_seed(0))
    row = torch.arange(16)[:, None]
    ids = traces.input_ids
    assert ids.shape == (16, PROMPT + 96)
    assert bool((traces.distance > 0).all())
    assert bool((ids[row, traces.stated - 1] == EQUALS).all())
    assert bool((ids[row, traces.asked - 1] == ASK).all())
    assert torch.equal(ids[row, traces.stated - 2], ids[row, traces.asked])
    assert torch.equal(ids[row, traces.stated], ids[row, traces.asked + 1])
    assert int((traces.answers != -100).sum()) == traces.asked.numel()


def test_held_says_what_the_window_holds():
    window, evict, columns = 8, 2, 40
    kept = []
    for column in range(PROMPT, columns):
        if len(kept) == window:
            kept = kept[evict:]
        kept.append(column)
        stated = torch.arange(PROMPT, column + 1)
        expected = torch.tensor([int(place) in kept for place in stated])
        assert torch.equal(held(stated, torch.tensor(column), window, evict), expected)


@pytest.mark.slow
def test_the_state_recalls_what_no_kept_token_can_have_relayed(tmp_path):
    far = {}
    for arm in ("pte", "lora", "lora-detached"):
        settings = runner.settings_for(arm, short=True)
        result = runner.run(settings, seed=0, device="cpu", command="pytest", name=arm, short=True)
        far[arm] = result["evaluation"][0]["buckets"]["beyond_relay"]["accuracy"]
        if arm == "pte":
            swapped = result["swapped_evictions"]["buckets"]["beyond_relay"]
            frozen = result["frozen_state"]["buckets"]["beyond_relay"]
    assert far["pte"] > max(far["lora"], far["lora-detached"]) + 0.30, far
    assert swapped["accuracy"] < 0.15, swapped
    assert frozen["accuracy"] < 0.15, frozen
