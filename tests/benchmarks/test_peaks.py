"""Peaks counted on fake tensors."""

from dataclasses import replace

import pytest

from benchmarks.peaks import METHODS, PeakCase, counted_peak

CASE = PeakCase("tiny", completion=768, prompt=64, window=512, rank=4)


def test_one_layer_at_a_time_needs_least():
    peaks = {method: counted_peak(CASE, method, 4) for method in METHODS}
    assert peaks["pte_offload"] < peaks["pte"] < peaks["pte_whole_segments"] < peaks["lora"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_peaks_follow_straight_lines(method):
    by_layers = [counted_peak(CASE, method, layers) for layers in (2, 3, 4)]
    by_length = [counted_peak(replace(CASE, completion=length), method, 2) for length in (768, 1024, 1280)]
    for few, more, most in (by_layers, by_length):
        assert most == pytest.approx(2 * more - few, rel=0.02)
