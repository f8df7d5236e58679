"""Steps counted on fake tensors: what few layers and short completions say of many and long ones."""

from dataclasses import asdict

import pytest

from benchmarks.common.fake import PeakCase, counted_step
from benchmarks.footprint.report import settings as table
from benchmarks.footprint.settings import CHECKED, PEERS, counted_lengths, fields_of, measure, rows_of
from tests.benchmarks.test_runner import SOURCE, session

CASE = PeakCase("tiny", completion=768, prompt=64, window=256, rank=4)


@pytest.mark.parametrize("peer", ["lora", "default", "one_pass_offload"])
def test_few_layers_say_what_more_need(peer):
    few, more, many = (counted_step(CASE, fields_of(peer, CASE.window), layers) for layers in (2, 3, 5))
    assert few.peak_of(5, more) == many.peak
    assert 2 * (more.kept - few.kept) == many.kept - more.kept


def test_each_setting_gives_what_it_costs():
    steps = {peer: counted_step(CASE, fields_of(peer, CASE.window), 3) for peer in PEERS}
    assert steps["default"].peak < steps["one_pass"].peak < steps["lora"].peak
    for name in ("default", "one_pass"):
        assert steps[f"{name}_offload"].peak < steps[name].peak
        assert steps[f"{name}_offload"].kept < steps[name].kept
    assert steps["least"].peak < steps["default"].peak
    assert steps["least_offload"].peak == min(step.peak for step in steps.values())


def test_settings_become_a_table():
    rows = list(measure(session(peers=("lora", "default"))))
    assert [(row["peer"], row["completion"]) for row in rows] == [
        ("lora", 96),
        ("lora", 192),
        ("default", 96),
        ("default", 192),
    ]
    assert rows[0]["flop"] < rows[1]["flop"]
    assert rows[0]["launches"] == rows[1]["launches"] < rows[2]["launches"]
    text = table([{**row, "source": SOURCE} for row in rows])
    assert "| tiny | 96 | LoRA, full cache | 1.00 | 1.00 |" in text
    assert "| tiny | 192 | default |" in text


def test_lengths_that_are_counted():
    assert counted_lengths("lora", (3072, 16384, 65536)) == (3072, 16384, 65536)
    assert counted_lengths("least_offload", (3072, 16384, 65536)) == (3072, 5120)
    assert counted_lengths("one_pass", (3072, 16384, 65536)) == (3072, 12288, 16384)


@pytest.mark.slow
@pytest.mark.parametrize("peer", CHECKED)
def test_longer_completions_follow_straight_lines(peer):
    case = PeakCase("tiny", 0, prompt=64, window=256, rank=4)
    (row, *_) = rows_of(case, session(peers=(peer,)), (1536, 3072))
    assert row["checked"] == pytest.approx(dict.fromkeys(row["checked"], 1.0), rel=0.02)
    assert asdict(case)["window"] == row["window"]
