"""Law 3: a row's result depends neither on its neighbours nor on where, or how much, it is padded."""

import pytest
import torch

from tests.cases import FAMILIES, PAD
from tests.helpers import POLICIES, SMALL, assert_close, log_probs, make_prompts, make_pte, roll_out, thought_logits

WINDOW = SMALL["cache_window"]
PROMPTS = (6, 3, 5)
THOUGHTS = (3 * WINDOW, 2 * WINDOW + 3, 4)


def make_rows(model):
    """Rows ``(ids, prompt length)`` without any padding."""
    rollout = roll_out(model, make_prompts(PROMPTS), max(THOUGHTS))
    width = max(PROMPTS)
    return [
        (rollout.input_ids[row, width - prompt : width + thoughts], prompt)
        for row, (prompt, thoughts) in enumerate(zip(PROMPTS, THOUGHTS, strict=True))
    ]


def lay_out(rows, left, total):
    """A batch of ``total`` columns in which row ``i`` starts at column ``left[i]``."""
    ids = torch.full((len(rows), total), PAD)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, ((tokens, prompt), start) in enumerate(zip(rows, left, strict=True)):
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
        labels[row, start + prompt : start + len(tokens)] = tokens[prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def row_log_probs(model, batch, left, rows):
    with torch.no_grad():
        logits = model(**batch).logits.log_softmax(dim=-1)
    return [
        logits[row, start + prompt - 1 : start + len(tokens) - 1].gather(-1, tokens[prompt:, None])[:, 0]
        for row, ((tokens, prompt), start) in enumerate(zip(rows, left, strict=True))
    ]


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_on_itself_alone(family, dtype, eviction):
    model = make_pte(family, dtype=dtype, eviction=eviction)
    rows = make_rows(model)
    alone = [row_log_probs(model, lay_out([row], [0], len(row[0])), [0], [row])[0] for row in rows]
    widest = max(len(tokens) for tokens, _ in rows)
    layouts = {
        "prompts end together": ([6 - prompt for _, prompt in rows], 6 + max(THOUGHTS)),
        "more padding on both sides": ([6 - prompt + 9 for _, prompt in rows], 6 + max(THOUGHTS) + 9 + 5),
        "padded right": ([0, 0, 0], widest),
        "padded left": ([widest - len(tokens) for tokens, _ in rows], widest),
        "anyhow": ([4, 0, 11], widest + 8),
    }
    # transformers rounds rotary angles in float32, at positions that are the same in all layouts: exact in float64 too.
    for left, total in layouts.values():
        for together, expected in zip(row_log_probs(model, lay_out(rows, left, total), left, rows), alone, strict=True):
            assert_close(together, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_depends_on_the_row_alone(family):
    model = make_pte(family)
    together = model.generate(**make_prompts(PROMPTS), max_new_tokens=2 * WINDOW, do_sample=False)
    prompts = make_prompts(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = prompts["input_ids"][row : row + 1, -prompt:]
        alone = model.generate(input_ids=ids, max_new_tokens=2 * WINDOW, do_sample=False)
        assert torch.equal(alone[0, prompt:], together[row, max(PROMPTS) :])


def test_padding_among_the_thoughts_is_no_thought():
    # The second turn of a conversation, padded left to the width of its neighbours' turns.
    model = make_pte("llama")
    rows = make_rows(model)
    tokens, prompt = rows[0]
    gap = 3
    ids = torch.cat([tokens[: prompt + 2], torch.full((gap,), PAD), tokens[prompt + 2 :]])[None]
    mask = torch.ones_like(ids)
    mask[:, prompt + 2 : prompt + 2 + gap] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    with torch.no_grad():
        gapped = model(input_ids=ids, attention_mask=mask, labels=labels).logits
        plain = model(input_ids=tokens[None], labels=tokens[None].masked_fill(torch.arange(len(tokens)) < prompt, -100))
    kept = mask[0].bool()
    assert_close(gapped[:, kept], plain.logits)


def test_neighbours_may_have_no_label_at_all():
    # GRPO masks truncated completions out whole.
    model = make_pte("llama")
    rollout = roll_out(model, make_prompts(PROMPTS), 2 * WINDOW)
    batch = rollout.truncated(2 * WINDOW, [2 * WINDOW, 0, 2 * WINDOW])
    with torch.no_grad():
        scored = log_probs(thought_logits(model, batch), batch)
    assert_close(scored[[0, 2]], log_probs(rollout.logits, rollout.truncated(2 * WINDOW))[[0, 2]])
