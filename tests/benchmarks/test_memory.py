"""The memory benchmark: its traces and variants (quick), and its short form (minutes: pretraining and three adaptations)."""

import pytest
import torch
from peft import get_peft_model

from benchmarks.memory import run as runner
from benchmarks.memory.evaluate import buckets, evaluate, frozen_state, swapped_evictions
from benchmarks.memory.model import new_model, recall
from benchmarks.memory.task import ASK, EQUALS, PROMPT, VOCABULARY, Traces, held, make_traces
from benchmarks.memory.train import Settings
from benchmarks.memory.variants import VARIANTS, Delta, install, share_state
from benchmarks.small import same_base
from peft_pte.method.encoder import PTEEncoder
from peft_pte.method.state import Evicted


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


@pytest.mark.parametrize("arm", ["pte", "pte-value"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_learn_from_what_left(name, arm):
    torch.manual_seed(0)
    config = Settings(arm=arm, window=8, rank=4, global_tokens=4, overrides={"init_weights": False}).config()
    model = get_peft_model(new_model(), config)
    install(model, name, config)
    traces = make_traces(2, 48, torch.Generator().manual_seed(0))
    model(input_ids=traces.input_ids, labels=traces.answers, prompt_length=PROMPT).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in trained.values())
    assert all(bool(weight.grad.any()) for name, weight in trained.items() if "thought_encoder" in name)


def test_a_shared_state_is_that_of_the_first_layer():
    torch.manual_seed(0)
    config = Settings(window=8, rank=4, global_tokens=4, overrides={"init_weights": False}).config()
    model = get_peft_model(new_model(), config)
    with pytest.raises(ValueError, match="must be 0, the layer that runs before all others, got 1"):
        share_state(model, 1)
    share_state(model, 0)
    traces = make_traces(2, 48, torch.Generator().manual_seed(0))
    model(input_ids=traces.input_ids, labels=traces.answers, prompt_length=PROMPT).loss.backward()
    used = {
        name.split(".layers.")[1][0] for name, w in model.named_parameters() if "pte_key" in name and w.grad is not None
    }
    assert used == {"0"}


@pytest.mark.parametrize("by_key", [True, False])
def test_the_delta_rule_of_many_tokens_is_that_of_one_after_the_other(by_key):
    torch.manual_seed(0)
    encoder = Delta.__new__(Delta)
    torch.nn.Module.__init__(encoder)
    encoder.by_key = by_key
    encoder.prepare(rank=3, queries=5)
    state, scores, values = torch.randn(2, 5, 3), torch.randn(2, 6, 5), torch.randn(2, 6, 3)
    tokens = torch.randn(2, 6, 6)
    expected = state
    for token in range(6):
        one = slice(token, token + 1)
        expected = encoder.update(expected, scores[:, one], values[:, one], tokens[:, one], 0.7)
    torch.testing.assert_close(encoder.update(state, scores, values, tokens, 0.7), expected)


def test_controls_change_what_a_model_recalls_and_then_leave_it_alone():
    torch.manual_seed(0)
    config = Settings(window=8, rank=4, global_tokens=4, overrides={"init_weights": False}).config()
    model = get_peft_model(new_model(), config)
    traces = make_traces(4, 48, torch.Generator().manual_seed(0))

    def logits():
        with torch.no_grad():
            return model(input_ids=traces.input_ids, prompt_length=PROMPT).logits

    plain = logits()
    for control in (swapped_evictions, frozen_state):
        with control(model):
            assert not torch.equal(logits(), plain)
    assert torch.equal(logits(), plain)
    assert set(evaluate(model, 48, 4, 8, 2, 2)["buckets"]) >= {"window", "beyond_relay"}


def test_buckets_are_told_apart_by_distance():
    # One trace: a window of 8, of which 2 leave. Asked for in column 30, thought 29: thoughts up to 21 are gone.
    stated = torch.tensor([[29, 23, 22, 18, 17, 14, 13, 10, 9, 1]])
    empty = torch.empty(1, 0, dtype=torch.long)
    traces = Traces(empty, empty, empty, stated, torch.full_like(stated, 30), empty)
    found = {name: chosen[0].nonzero()[:, 0].tolist() for name, chosen in buckets(traces, 8, 2, layers=2).items()}
    assert found == {
        "window": [0, 1],
        "evicted_to_1.5": [2, 3],
        "1.5_to_2.5": [4, 5, 6, 7],
        "over_2.5": [8, 9],
        "evicted": [2, 3, 4, 5, 6, 7, 8, 9],
        "beyond_relay": [6, 7, 8, 9],
    }


def test_swapped_evictions_are_those_of_the_neighbour():
    torch.manual_seed(0)
    config = Settings(window=8, rank=4, global_tokens=4, overrides={"init_weights": False}).config()
    encoder = next(m for m in get_peft_model(new_model(), config).modules() if isinstance(m, PTEEncoder))
    state, rows, places = torch.randn(3, 4, 4), torch.randn(2, 3, 4, 2, 16), torch.arange(2).expand(3, 1, 2)
    rolled = Evicted(*rows.roll(1, dims=1), places, None)
    expected = encoder("default", state, rolled)
    with swapped_evictions(encoder):
        assert torch.equal(encoder("default", state, Evicted(*rows, places, None)), expected)
    assert not torch.equal(encoder("default", state, Evicted(*rows, places, None)), expected)


def test_recall_is_that_of_the_value():
    traces = make_traces(2, 48, torch.Generator().manual_seed(0))
    logits = torch.zeros(*traces.input_ids.shape, VOCABULARY)
    row = torch.arange(2)[:, None]
    values = traces.input_ids[row, traces.stated]
    logits[row, traces.asked, values] = 1.0
    assert bool(recall(logits, traces).all())
    logits[0, traces.asked[0, 0], traces.input_ids[0, traces.asked[0, 0]]] = 2.0
    assert recall(logits, traces).logical_not().nonzero().tolist() == [[0, 0]]


def test_runs_on_other_base_models_are_not_compared():
    run = {"seed": 0, "settings": {}, "base_weights": "a"}
    assert len(same_base([run, run, {**run, "seed": 1, "base_weights": "b"}])) == 3
    with pytest.raises(ValueError, match="must share their base model, got several for seed 0"):
        same_base([run, {**run, "base_weights": "b"}])


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
