"""The layout in which all rows end their prompts in one column."""

import torch

from peft_pte.passes.layout import lay_out


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
