"""The clock and the plan, against brute force; no model, no tensor."""

import random

import pytest

from peft_pte.cache.schedule import evictions_before, first_visible, held_after, is_due, slot_of
from peft_pte.passes.plan import Counts, Sizes, make_plan


def decode(window, step, thoughts):
    """One thought at a time: before each, the evictions so far, what it sees, and its slot in a ring."""
    held, evictions, slots = [], 0, [None] * window
    for thought in range(thoughts):
        if len(held) == window:
            for gone in held[:step]:
                slots[slots.index(gone)] = None
            held, evictions = held[step:], evictions + 1
        held.append(thought)
        slot = thought % window
        assert slots[slot] is None
        slots[slot] = thought
        yield evictions, list(held), slot


@pytest.mark.parametrize("window", range(1, 40))
def test_the_clock_of_a_row(window):
    for step in range(1, window + 1):
        for thought, (evictions, held, slot) in enumerate(decode(window, step, 3 * window + 5)):
            assert evictions_before(thought, window, step) == evictions
            assert list(range(first_visible(thought, window, step), thought + 1)) == held
            assert slot_of(thought, window) == slot
            assert held_after(thought + 1, window, step) == len(held)
            assert is_due(thought, window, step) == (
                thought > 0 and evictions > evictions_before(thought - 1, window, step)
            )


def test_a_plan_does_what_decoding_does():
    rng = random.Random(0)
    for _ in range(3000):
        window = rng.randint(1, 20)
        step = rng.randint(1, window)
        counts = Counts(rng.randint(0, 9), 0, rng.randint(0, 30), rng.randint(0, 70), 0)
        if rng.random() < 0.5:  # Nothing is prompt behind a thought.
            thoughts = rng.randint(0, 50)
            counts = Counts(counts.prompt, thoughts, 0, counts.new_thoughts, held_after(thoughts, window, step))
        sizes = Sizes(window, step, rng.randint(1, 30), rng.choice([1, 2, 100]))
        plan = make_plan(counts, sizes)
        history = list(decode(window, step, counts.thoughts + counts.new_thoughts))
        column, prompt, thought = 0, counts.prompt, counts.thoughts
        for chunk in plan.chunks:
            assert chunk.length > 0
            assert (chunk.start, chunk.held[0]) == (column, prompt)
            held = history[thought - 1][1] if thought else []
            assert chunk.held[1] == len(held)
            assert chunk.thought == thought - counts.thoughts
            assert chunk.drop == (step if chunk.evictions else 0)
            assert chunk.before == (history[thought - 1][0] if thought else 0)
            assert chunk.evictions <= sizes.evictions
            assert chunk.evictions * step <= len(held)
            assert chunk.length <= 1.5 * sizes.chunk
            assert chunk.evictions < 2 or chunk.thoughts == chunk.evictions * step
            for place in range(chunk.thoughts):
                evictions, seen, _ = history[thought + place]
                block = place // step if chunk.evictions else 0
                assert evictions == chunk.before + (block + 1 if chunk.evictions else 0)
                # What had left by then is hidden of what the chunk started from.
                gone = step * (block + 1) if chunk.evictions else 0
                assert [*held[gone:], *range(thought, thought + place + 1)] == seen
            column, prompt, thought = column + chunk.length, prompt + chunk.prompt, thought + chunk.thoughts
            assert chunk.kept == held_after(thought, window, step)
        assert column == counts.new_prompt + counts.new_thoughts
        longest = rng.choice([None, 1, 7, 40])
        passes = list(plan.passes(longest))
        assert [chunk for part in passes for chunk in part.chunks] == list(plan.chunks)
        if longest is not None:
            assert all(part.stop - part.start <= longest or len(part.chunks) == 1 for part in passes)
        assert longest is not None or len(passes) <= 1
        assert sum(part.evictions for part in passes) == plan.evictions


def test_full_windows_take_one_chunk_each():
    plan = make_plan(Counts(0, 0, 64, 3072, 0), Sizes(1024, 256, 1024, 4))
    assert [(chunk.prompt, chunk.thoughts, chunk.evictions) for chunk in plan.chunks] == [
        (64, 1024, 0),
        (0, 1024, 4),
        (0, 1024, 4),
    ]
    assert str(plan).splitlines() == [
        "        columns  prompt thoughts evictions    states slots seen",
        "        0..1087      64     1024         0        S0       1088",
        "     1088..2111       0     1024         4    S1..S4       1856",
        "     2112..3135       0     1024         4    S5..S8       1856",
    ]


def test_a_row_that_starts_late_lets_the_first_block_go_alone():
    # Another row is in the middle of a block: until it has started, nothing is evicted twice, and nothing is forgotten.
    plan = make_plan(Counts(2, 8, 0, 12, 7, late=1), Sizes(8, 2, 8, 4))
    assert [(chunk.thoughts, chunk.evictions, chunk.drop, chunk.held[1], chunk.kept) for chunk in plan.chunks] == [
        (2, 1, 0, 7, 8),
        (8, 4, 2, 8, 8),
        (2, 1, 2, 8, 8),
    ]


def test_one_thought_of_rows_that_share_no_clock():
    (chunk,) = make_plan(Counts(2, 11, 0, 1, 8, due=True), Sizes(8, 2, 8, 4)).chunks
    assert (chunk.thoughts, chunk.evictions, chunk.drop, chunk.kept) == (1, 1, 0, 9)
    prompt, thought = make_plan(Counts(2, 3, 1, 1, 3, due=False), Sizes(8, 2, 8, 4)).chunks
    assert (prompt.prompt, prompt.thoughts) == (1, 0)
    assert (thought.held, thought.evictions) == ((3, 3), 0)
