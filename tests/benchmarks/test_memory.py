"""The memory benchmark: its traces and variants (quick), and its short form (minutes: pretraining and three adaptations)."""

import pytest
import torch
from peft import get_peft_model

from benchmarks.memory import run as runner
from benchmarks.memory.evaluate import evaluate, frozen_state, swapped_evictions
from benchmarks.memory.model import new_model
from benchmarks.memory.task import ASK, EQUALS, PROMPT, held, make_traces
from benchmarks.memory.train import Settings
from benchmarks.memory.variants import VARIANTS, Delta, install, share_state


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


@pytest.mark.parametrize("shared", [0, 1])
def test_a_shared_state_is_that_of_one_layer(shared):
    torch.manual_seed(0)
    config = Settings(window=8, rank=4, global_tokens=4, overrides={"init_weights": False}).config()
    model = get_peft_model(new_model(), config)
    share_state(model, shared)
    traces = make_traces(2, 48, torch.Generator().manual_seed(0))
    model(input_ids=traces.input_ids, labels=traces.answers, prompt_length=PROMPT).loss.backward()
    used = {
        name.split(".layers.")[1][0] for name, w in model.named_parameters() if "pte_key" in name and w.grad is not None
    }
    assert used == {str(shared)}


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
