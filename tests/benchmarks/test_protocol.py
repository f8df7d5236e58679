"""The account of the paper's protocol: what it says follows from what was counted."""

import dataclasses

import pytest

from benchmarks.common.arithmetic import kv_bytes_per_token
from benchmarks.common.models import SHAPES, shape_config
from benchmarks.half import measure as half
from benchmarks.protocol import report as protocol
from tests.benchmarks.test_runner import SOURCE

SHAPE = "Qwen2.5-3B"
ROW = {
    "shape": SHAPE,
    "arm": "PTE",
    "prompt": 256,
    "completion": 3072,
    "window": 768,
    "trained": 10_000_000,
    "scoring_launches": 1e5,
    "scoring_flop": 1e14,
    "scoring_kept_bytes": 1e8,
    "scoring_peak_bytes": 1e9,
    "decoding_launches": 1000.0,
    "layers": 36,
    "source": SOURCE,
}
CARD = protocol.Card(memory=80e9, flops=1e15, bandwidth=1e12, flops_reached=1.0, bandwidth_reached=1.0, launch=1e-9)


def test_bytes_decide_where_launches_are_free():
    found = protocol.account(ROW, CARD, 8)
    config = shape_config(SHAPE)
    kept = kv_bytes_per_token(config, 2)
    columns = sum(256 + min(768, token) for token in range(3072))
    expected = (3072 * 2 * SHAPES[SHAPE].parameters + 64 * columns * kept) / 1e12
    assert found.writing == pytest.approx(expected)
    head = 6 * config.hidden_size * config.vocab_size * 3072
    assert found.scoring == pytest.approx(64 * (1e14 + head) / 1e15)
    assert found.hours == pytest.approx(272 * (found.writing + found.scoring) / 3600)


def test_launches_decide_where_they_are_dear():
    slow = dataclasses.replace(CARD, launch=1.0)
    found = protocol.account(ROW, slow, 8)
    assert found.scoring == pytest.approx(16 * 1e5)
    assert found.writing == pytest.approx(3072 * 1000)
    # One GPU has eight times as many completions; rows of a rollout go together.
    one = protocol.account(ROW, slow, 1)
    assert one.scoring == pytest.approx(8 * found.scoring)
    assert one.writing == pytest.approx(8 * found.writing)


def test_memory_is_the_larger_of_scoring_and_writing():
    weights = 2 * SHAPES[SHAPE].parameters
    scoring = protocol.account({**ROW, "scoring_peak_bytes": 1e12}, CARD, 8).memory
    assert scoring == pytest.approx(weights + 16e7 + 4 * (1e12 - 4e7))
    bounded = protocol.account({**ROW, "scoring_peak_bytes": 0}, CARD, 8).memory
    full = protocol.account({**ROW, "scoring_peak_bytes": 0, "window": None}, CARD, 8).memory
    assert full - bounded == pytest.approx(64 * (3071 - 768) * kv_bytes_per_token(shape_config(SHAPE), 2))


def test_the_table_says_what_does_not_fit():
    small = {"card": dataclasses.replace(CARD, memory=1e9)}
    text = protocol.render([ROW])
    assert "Qwen2.5-3B-Instruct" in text
    assert "too much" not in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "CARDS", small)
        assert "too much" in protocol.render([ROW])


def test_log_ratios_of_a_rollout_are_nothing_in_float32(tmp_path):
    import torch

    from tests.helpers import make_base

    base = make_base("llama", eos_token_id=1)
    base.generation_config.eos_token_id = 1
    for fields in half.ARMS.values():
        torch.manual_seed(0)
        model = half.adapted(
            make_base("llama", eos_token_id=1), None if fields is None else {**fields, "cache_window": 8}
        )
        model.generation_config.eos_token_id = 1
        found = half.log_ratios(model, torch.randint(3, 50, (2, 5)), 24)
        assert found.shape == (2, 24)
        assert found.abs().max() < 1e-4
