"""Every trainer of TRL that takes ``peft_config``, unmodified, one step each, with LoRA as the control."""

import dataclasses

import pytest

from tests.integrations.common import WINDOW
from tests.integrations.trainers import (
    CASES,
    EQUAL,
    HAS_PROMPT_END,
    PAGE,
    cell,
    describe,
    head,
    judge,
    line,
    long_prompt_data,
    make_grpo,
    measure,
    quiet,
)

TRIED = [case for case in CASES if not case.untried]
cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in TRIED]
)
needs_prompt_end = pytest.mark.skipif(not HAS_PROMPT_END, reason="PTEConfig has no `prompt_end` yet")


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


@needs_prompt_end
@cases
def test_pte_trains_what_it_rolls_out(case):
    outcome, with_end = measured(case, "pte, prompt_end")
    assert with_end == ("refused" if case.refused else "equal")
    second, without = measured(case, "pte")
    assert without in ("equal", "refused") or case.limit
    if case.labels:
        # The trainer shows the prompt's end by its labels.
        assert without == "equal", second.refusal
    assert (
        line(case, describe(outcome), with_end, cell(case, without)) in PAGE.read_text(encoding="utf-8").splitlines()
    ), "docs/trainers.md says something else: python -m tests.integrations.trainers writes it again"


@needs_prompt_end
def test_the_page_has_every_case_once():
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(head())
    rows = text.removeprefix(head()).splitlines()
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
