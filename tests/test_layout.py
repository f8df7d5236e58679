"""Where prompts end, and the layout in which all rows end theirs in one column."""

import torch

from peft_pte.layout import PromptSpec, lay_out

IGNORE = -100


def boundaries(labels=None, mask=None, **fields):
    mask = None if mask is None else torch.tensor(mask).bool()
    shape = torch.tensor(labels if labels is not None else fields.get("shift_labels")).shape
    spec = PromptSpec(
        labels=None if labels is None else torch.tensor(labels),
        shift_labels=None if "shift_labels" not in fields else torch.tensor(fields["shift_labels"]),
        length=fields.get("length"),
    )
    return spec.boundaries(shape[0], shape[1], mask, torch.device("cpu")).tolist()


def test_first_label_starts_the_thoughts():
    assert boundaries([[IGNORE, IGNORE, 5, 6], [IGNORE, 5, IGNORE, 6]]) == [2, 1]


def test_shifted_labels_start_one_later():
    assert boundaries(shift_labels=[[IGNORE, 5, 6, IGNORE]]) == [2]


def test_a_row_without_labels_is_prompt_to_its_end():
    assert boundaries([[IGNORE] * 4, [IGNORE, IGNORE, 3, 3]], mask=[[0, 1, 1, 0], [1, 1, 1, 1]]) == [3, 2]


def test_an_explicit_length_overrides():
    assert boundaries([[IGNORE, 5, 6]], length=2) == [2]
    assert boundaries([[IGNORE, 5, 6], [IGNORE, 5, 6]], length=torch.tensor([2, 0])) == [2, 0]


def test_no_word_about_prompts():
    assert PromptSpec().boundaries(2, 3, None, torch.device("cpu")) is None


def test_grpo_layout_is_left_alone():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    layout = lay_out(torch.tensor([2, 2]), mask, 5)
    assert (layout.prompt, layout.columns, layout.source) == (2, 5, None)


def test_right_padded_rows_are_aligned_and_moved_back():
    rows = torch.tensor([[1, 2, 3, 9, 8, 0], [1, 9, 8, 7, 0, 0]])
    mask = rows != 0
    layout = lay_out(torch.tensor([3, 1]), mask, 6)
    assert (layout.prompt, layout.columns) == (3, 6)
    packed = layout.pack(rows)
    assert packed.masked_fill(~layout.mask, 0).tolist() == [[1, 2, 3, 9, 8, 0], [0, 0, 1, 9, 8, 7]]
    assert layout.unpack(packed).tolist() == rows.tolist()
    hidden = torch.randn(2, 6, 4)
    assert torch.equal(layout.unpack(layout.pack(hidden)), hidden * mask[..., None])


def test_holes_are_closed():
    rows = torch.tensor([[1, 2, 0, 9, 0, 8]])
    layout = lay_out(torch.tensor([3]), rows != 0, 6)
    assert layout.pack(rows).tolist() == [[1, 2, 9, 8]]
    assert layout.unpack(layout.pack(rows)).tolist() == rows.tolist()
