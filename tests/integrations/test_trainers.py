"""Every trainer of TRL that takes ``peft_config``, unmodified, one step each, with LoRA as the control."""

import dataclasses
import re

import pytest
import torch

from peft_pte import prompt_end
from tests.integrations.common import COMPLETION, WINDOW, make_trl_base, pte_config
from tests.integrations.trainers import (
    CASES,
    EQUAL,
    MARKER,
    PAGE,
    cell,
    describe,
    head,
    judge,
    line,
    long_prompt_data,
    make_chat_tokenizer,
    make_grpo,
    make_online_dpo,
    make_sft,
    make_sft_metrics,
    measure,
    quiet,
)

TRIED = [case for case in CASES if not case.untried]
cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in TRIED]
)


def measured(case, adapter):
    with quiet():
        outcome = measure(case, adapter)
    return outcome, judge(case, outcome, adapter)


@cases
def test_lora_trains(case):
    # The control: what is measured, and how, holds for an adapter whose cache is the model's own.
    outcome, verdict = measured(case, "lora")
    assert verdict == "equal", outcome.refusal


@pytest.mark.parametrize(
    "case", [case for case in TRIED if case.name in ("DPO", "CPO", "Distillation")], ids=lambda case: case.name
)
def test_a_trainer_that_never_evicts_is_found(case):
    with quiet():
        outcome = measure(case, "pte", cache_window=None)
    assert outcome.refusal is None
    assert judge(case, outcome, "pte, prompt_end") == "nothing was evicted"


@cases
def test_pte_trains_what_it_rolls_out(case):
    outcome, with_end = measured(case, "pte, prompt_end")
    assert with_end == ("refused" if case.refused else "equal"), outcome.refusal
    second, without = measured(case, "pte")
    # Where no call could tell, the page says so.
    assert without in ("equal", "refused") or case.limit, second.refusal
    assert not case.limit or without not in ("equal", "refused")
    if case.labels:
        # The trainer shows the prompt's end by its labels.
        assert without == "equal", second.refusal
    assert (
        line(case, describe(outcome), with_end, cell(case, without)) in PAGE.read_text(encoding="utf-8").splitlines()
    ), "docs/trainers.md says something else: python -m tests.integrations.trainers writes it again"


def test_the_page_has_every_case_once():
    text = PAGE.read_text(encoding="utf-8")
    made_with = head(*re.search(r"Made with TRL (\S+) and transformers (\S+) by", text).groups())
    assert text.startswith(made_with)
    rows = text.removeprefix(made_with).splitlines()
    assert [row.split(" | ")[0] for row in rows] == [f"| {case.name}" for case in CASES]
    assert all(line(case) in rows for case in CASES if case.untried)


@pytest.mark.parametrize("adapter", ["pte", "pte, prompt_end"])
def test_rows_of_prompt_alone_are_no_mistake(adapter):
    # GRPO masks a completion that was cut short: nothing of its row is labelled, and its prompt may be longer than a window.
    case = dataclasses.replace(
        next(case for case in TRIED if case.name == "GRPO"),
        make=lambda *a: make_grpo(*a, data=long_prompt_data, mask_truncated_completions=True, num_generations=2),
    )
    with quiet():
        outcome = measure(case, adapter)
    assert outcome.refusal is None
    lengths = [len(row) for call in outcome.calls for row in call.rows]
    assert min(lengths) > WINDOW
    assert any(log_probs.isnan().all() for call in outcome.calls for log_probs in call.log_probs)
    assert outcome.alone is None or outcome.alone < EQUAL


def named(name, **fields):
    return dataclasses.replace(next(case for case in TRIED if case.name == name), **fields)


def test_a_loss_of_the_user_sees_the_same_logits():
    with quiet():
        own = measure(named("SFT, `compute_loss_func`"), "pte, prompt_end")
        trainers = measure(named("SFT"), "pte, prompt_end")
    assert own.loss == pytest.approx(trainers.loss, rel=1e-5)


def test_label_smoothing_is_that_of_rows_scored_alone(tmp_path):
    with quiet():
        model, config = make_trl_base(), pte_config(prompt_end=[MARKER])
        trainer = make_sft(model, config, tmp_path, label_smoothing_factor=0.1)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    nll, spread = [], []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        ids, labels = ids[mask][None], labels[mask][None]
        with torch.no_grad():
            log_probs = trainer.model(input_ids=ids, labels=labels).logits[:, :-1].log_softmax(dim=-1)
        known = labels[:, 1:] != -100
        nll.append(-log_probs.gather(-1, ids[:, 1:, None])[..., 0][known])
        spread.append(-log_probs.mean(dim=-1)[known])
    assert min(len(row) for row in nll) > 2 * WINDOW
    expected = 0.9 * torch.cat(nll).mean() + 0.1 * torch.cat(spread).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_metrics_without_prompt_end_are_warned_of(tmp_path):
    trainer = make_sft_metrics(make_trl_base(), pte_config(), tmp_path)
    with pytest.warns(UserWarning, match="prompt_end"):
        trainer.train()


def test_bf16_differs_as_with_lora():
    case = named("GRPO", make=lambda *a: make_grpo(*a, bf16=True))
    with quiet():
        lora, pte = (measure(case, adapter).rollout for adapter in ("lora", "pte, prompt_end"))
    assert EQUAL < pte < 4 * lora


def test_online_dpo_that_cuts_markers_off_is_refused():
    # It scores the end of the prompt alone where both together are longer than `max_length`.
    case = named("OnlineDPO", make=lambda *a: make_online_dpo(*a, max_length=COMPLETION - 4))
    with quiet():
        outcome = measure(case, "pte, prompt_end")
    assert "truncation" in str(outcome.refusal)


def test_the_window_alone_is_a_kl_to_the_base():
    # The adapter adds nothing yet: what is left is what the window lost.
    with quiet():
        outcome = measure(named("GRPO, `beta`"), "pte, prompt_end", init_weights=True)
    assert outcome.log["kl"] > 1e-3


def test_the_marker_is_that_of_the_template():
    assert prompt_end(make_chat_tokenizer()) == [MARKER]
