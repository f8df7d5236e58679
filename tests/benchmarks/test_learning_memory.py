"""Facts of a trace: what is asked for, what the window holds, recall by distance."""

import pytest
import torch
from peft import get_peft_model

from benchmarks.learning.arms import Settings, Stage
from benchmarks.learning.controls import CONTROLS, swapped_evictions
from benchmarks.learning.measure import run
from benchmarks.learning.tasks import TASKS
from benchmarks.learning.tasks.memory import ASK, EQUALS, PROMPT, Traces, held, hits, make_traces
from benchmarks.learning.tasks.task import Batch, small_base
from peft_pte.method.encoder import PTEEncoder
from peft_pte.method.state import Evicted


def adapted():
    torch.manual_seed(0)
    config = Settings(
        "memory", "linear", (), overrides={"r": 4, "num_global_tokens": 4, "cache_window": 8, "init_weights": False}
    )
    return get_peft_model(TASKS["memory"].base(0), config.config(TASKS["memory"]))


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


def test_controls_change_what_a_model_recalls_and_then_leave_it_alone():
    model, traces = adapted(), make_traces(4, 48, torch.Generator().manual_seed(0))

    def logits():
        with torch.no_grad():
            return model(input_ids=traces.input_ids, prompt_length=PROMPT).logits

    plain = logits()
    for control in CONTROLS.values():
        with control(model):
            assert not torch.equal(logits(), plain)
    assert torch.equal(logits(), plain)


def test_facts_are_told_apart_by_distance(monkeypatch):
    # A window of 32, of which 8 leave. Asked for in column 82, thought 81: thoughts up to 55 are gone.
    stated = torch.tensor([[70, 57, 56, 33, 32, 17, 16, 2, 1]])
    ids = torch.zeros(1, 97, dtype=torch.long)
    traces = Traces(ids, ids, ids, stated, torch.full_like(stated, 82), torch.tensor([[4]]))
    monkeypatch.setattr("benchmarks.learning.tasks.memory.make_traces", lambda *args: traces)
    found = TASKS["memory"].evaluate(adapted(), 32, 1)
    counts = {name: share["n"] for name, share in found.items() if isinstance(share, dict)}
    assert counts == {
        "recall": 4,
        "in_window": 2,
        "evicted": 7,
        "to_1.5": 1,
        "to_2.5": 5,
        "over_2.5": 1,
        "all": 9,
        "running": 1,
    }
    assert sum(row["n"] for row in found["by_distance"]) == 9


def test_swapped_evictions_are_those_of_the_neighbour():
    encoder = next(module for module in adapted().modules() if isinstance(module, PTEEncoder))
    state, rows, places = torch.randn(3, 4, 4), torch.randn(2, 3, 4, 2, 16), torch.arange(2).expand(3, 1, 2)
    rolled = Evicted(*rows.roll(1, dims=1), places, None)
    expected = encoder("default", state, rolled)
    with swapped_evictions(encoder):
        assert torch.equal(encoder("default", state, Evicted(*rows, places, None)), expected)
    assert not torch.equal(encoder("default", state, Evicted(*rows, places, None)), expected)


def test_recall_is_that_of_the_value():
    traces = make_traces(2, 48, torch.Generator().manual_seed(0))
    row = torch.arange(2)[:, None]
    best = torch.zeros_like(traces.input_ids)
    best[row, traces.asked] = traces.input_ids[row, traces.stated]
    assert bool(hits(best, traces.input_ids, traces.asked).all())
    best[0, traces.asked[0, 0]] = traces.input_ids[0, traces.asked[0, 0]]
    assert hits(best, traces.input_ids, traces.asked).logical_not().nonzero().tolist() == [[0, 0]]


def test_longer_traces_come_later():
    long = TASKS["memory-162"]
    lengths = [
        long.make(1, torch.Generator(), done).input_ids.shape[1] - PROMPT for done in (0.0, 399 / 550, 400 / 550)
    ]
    assert lengths == [96, 96, 162]
    assert long.forms == ({"length": 162}, {"length": 240})


def test_a_base_model_that_has_not_learned_is_refused(tmp_path):
    def make(generator):
        traces = make_traces(2, 12, generator)
        return Batch(traces.input_ids, traces.predictable, PROMPT), traces.answers != -100

    config = {"vocabulary": 128, "positions": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    with pytest.raises(RuntimeError, match="of the answers with a full cache, which is too few"):
        small_base(tmp_path, 0, config, [(make, 2), (make, 1)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_state_recalls_what_no_kept_token_can_have_relayed():
    found = {}
    for arm in ("linear", "lora", "lora-detached"):
        stages = (Stage("supervise", 400, 3e-3, floor=0.05),)
        result = run(Settings("memory", arm, stages), 0, 0)
        found[arm] = next(row for row in result["evaluation"] if row["window"] == 32)["recall"]["accuracy"]
        found |= {name: result[name]["recall"]["accuracy"] for name in CONTROLS if name in result}
    assert found["linear"] > max(found["lora"], found["lora-detached"]) + 0.30, found
    assert found["swapped_evictions"] < 0.15, found
    assert found["frozen_state"] < 0.15, found
