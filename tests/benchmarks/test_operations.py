"""The operations that are counted without numbers, against those of a real run and against arithmetic by hand."""

from dataclasses import replace

import pytest

from benchmarks.common.models import shape_config
from benchmarks.operations.measure import METHODS, FlopsCase, count_parts, extrapolate

CASE = FlopsCase("tiny", prompt=4, completion=20, window=8, rank=3)


def by_hand(case, layers, calls, head_tokens, *, adapters_per_token):
    """Operations of a forward pass: ``calls`` are pairs of new tokens and slots that they see."""
    config = shape_config(case.shape)
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = hidden // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    linears = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    tokens = sum(new for new, _ in calls)
    weights = sum(rows * columns for rows, columns in linears)
    adapters = sum(adapters_per_token(rows, columns) for rows, columns in linears)
    attention = sum(4 * hidden * new * slots for new, slots in calls)
    total = layers * (2 * tokens * (weights + adapters) + attention) + 2 * head_tokens * hidden * config.vocab_size
    return total, layers * attention


def lora_adapters(rows, columns):
    return CASE.rank * (rows + columns)


@pytest.mark.parametrize("layers", [1, 2])
def test_lora_scoring_is_arithmetic(layers):
    total = CASE.prompt + CASE.completion
    dense, attention = by_hand(CASE, layers, [(total, total)], CASE.completion, adapters_per_token=lora_adapters)
    found = count_parts(CASE, "lora", layers, fake=False)
    assert (found["old_policy"].dense, found["old_policy"].attention) == (dense, attention)
    assert found["scoring"] == found["old_policy"]


def test_lora_decoding_is_arithmetic():
    steps = CASE.completion - 1
    calls = [(1, CASE.prompt + step) for step in range(1, steps + 1)]
    dense, attention = by_hand(CASE, 1, calls, steps, adapters_per_token=lora_adapters)
    found = count_parts(CASE, "lora", 1, fake=False)["decode"]
    assert (found.dense, found.attention, found.visible_attention) == (dense, attention, attention)


def test_pte_decodes_over_a_window():
    """The state adds ``R * Q`` per adapter and token to LoRA, an eviction its encoder, and nothing grows with the length."""
    config = shape_config(CASE.shape)
    kv = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    steps, full = CASE.completion - 1, CASE.prompt + CASE.window
    after = steps - CASE.window
    # Nothing moves in a full window: slots that an eviction freed are masked until they are written.
    slots = [*range(CASE.prompt + 1, full + 1), *([full] * after)]
    dense, attention = by_hand(
        CASE,
        1,
        [(1, held) for held in slots],
        steps,
        adapters_per_token=lambda i, o: lora_adapters(i, o) + CASE.rank**2,
    )
    rank, evict = CASE.rank, CASE.evict
    queries, projected, mixed = 2 * rank * kv * rank, 4 * evict * kv * rank, 4 * rank * evict * rank
    evictions = -(-after // evict)
    found = count_parts(CASE, "pte", 1, fake=False)["decode"]
    assert found.attention == attention
    assert found.dense == dense + evictions * (queries + projected + mixed)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name != "pte" else name for name in METHODS]
)
def test_fake_tensors_count_as_real_ones_do(method):
    short = replace(CASE, completion=CASE.window + 2)
    assert count_parts(short, method, 1) == count_parts(short, method, 1, fake=False)


@pytest.mark.parametrize("method", ["lora", "pte"])
def test_layers_are_equal(method):
    short = replace(CASE, completion=CASE.window + 2)
    one, two, three = (count_parts(short, method, layers, fake=False) for layers in (1, 2, 3))
    assert extrapolate(one, two, 3) == three
