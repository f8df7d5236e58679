"""The arithmetic behind the table of ``ops/README.md``, and that the table is what it gives."""

import dataclasses

import pytest

from benchmarks.kernels import report as accounts

SHAPES = {shape.name: shape for shape in accounts.shapes()}
TINY = accounts.Shape("tiny", 2, 3, 4, 10, 12, 20, 1000, batch=5, window=8, evicted=7, queries=6, rank=3)


def test_shapes_are_those_of_the_models():
    facts = {name: (s.layers, s.heads, s.head_dim, s.hidden, s.inter) for name, s in SHAPES.items()}
    assert facts == {
        "Qwen2.5-3B": (36, 2, 128, 2048, 11008),
        "Qwen2.5-7B": (28, 4, 128, 3584, 18944),
        "Llama-3.1-8B": (32, 8, 128, 4096, 14336),
    }


def test_compress_counts_every_operand_once():
    keys = values = 2 * 5 * 7 * 12 * 2
    states, folded, projection, cos_sin = 2 * 5 * 6 * 3 * 4, 2 * 6 * 12 * 4, 2 * 3 * 12 * 4, 2 * 5 * 7 * 2 * 4
    account = accounts.compress(TINY)
    assert account.bytes == keys + values + 2 * states + folded + projection + cos_sin
    assert account.operations == 2 * 2 * 5 * 7 * (6 * 12 + 3 * 12 + 6 * 3)


def test_delta_group_counts_every_operand_once():
    hidden, down, states, read = 5 * 10 * 2, 2 * 3 * 10 * 2, 5 * 6 * 3 * 4, 2 * 5 * 6 * 4
    bases, ups = 5 * (12 + 8) * 2, (12 + 8) * 6 * 2
    account = accounts.delta_group(TINY, 10, (12, 8))
    assert account.bytes == hidden + down + states + 2 * read + 2 * bases + ups
    assert account.operations == 2 * 5 * (2 * 3 * 10 + 2 * 6 * 3 + (12 + 8) * 6)


def test_training_counts_every_operand_once():
    rows, saved, states, weights = 2 * 5 * 7 * 12 * 4, 2 * 5 * 7 * 3 * 4, 5 * 6 * 3 * 4, 2 * 3 * 12 * 4
    assert accounts.encode_forward(TINY).bytes == rows + saved + 3 * states + weights
    hidden, bases, down, up = 5 * 9 * 10 * 2, 5 * 9 * 8 * 2, 3 * 10 * 2, 8 * 6 * 2
    low, read = 5 * 9 * 3 * 2, 5 * 9 * 6 * 2
    account = accounts.delta_segment(TINY, 9, 10, 8)
    assert account.bytes == hidden + 2 * bases + down + up + low + 2 * read + states
    assert account.operations == 2 * 5 * 9 * (3 * 10 + 6 * 3 + 6 * 8)


def test_sums_of_accounts():
    assert accounts.Account(1, 2) + accounts.Account(3, 4) == accounts.Account(4, 6)
    groups = [accounts.delta_group(TINY, inner, outs).bytes for inner, outs in TINY.groups]
    assert accounts.delta_step(TINY).bytes == TINY.layers * sum(groups)


@pytest.mark.parametrize("name", SHAPES)
def test_values_are_projected_first_unless_more_leave_than_the_width(name):
    shape = SHAPES[name]
    first, last = accounts.projected_values_first(shape), accounts.weighted_values_first(shape)
    assert (first <= last) == (shape.evicted <= shape.width)
    long = dataclasses.replace(shape, evicted=4 * shape.width)
    assert accounts.weighted_values_first(long) < accounts.projected_values_first(long)
    # In blocks, as the kernel goes, a block is never longer than the width.
    block = dataclasses.replace(shape, evicted=128)
    assert accounts.projected_values_first(block) < accounts.weighted_values_first(block)


def test_the_readme_holds_the_table():
    assert accounts.render() in accounts.README.read_text()
